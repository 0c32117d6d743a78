"""What a run of this recipe is: one dataclass, filled from a configuration and checked.

Every field says under which key of the configuration it stands. Keys that nothing reads are named
in remarks, with the nearest that is read. All of it works before torch is imported.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from arcface.inshop_retrieval import config, inshop, pipeline
from shared.errors import UserError, did_you_mean, one_line, shortened, shown
from shared.files import read_json, read_text
from shared.settings import (
    COUNTS,
    SEEDS,
    Count,
    Positive,
    Range,
    Scope,
    ShareAboveZero,
    Size,
    Workers,
    differing,
    flat,
    number,
    read,
    sections,
)

DATASETS = (
    *("train_dataloader", "val_dataloader", "test_dataloader"),
    *("query_dataloader", "gallery_dataloader", "model.prototype"),
)
_READ_DATASETS = ("train_dataloader", "val_dataloader", "model.prototype")
_DEPTHS = {"RetrievalRecall": "Recall", "RetrievalAveragePrecision": "mAP"}
_ADAPTIVE = {"margin_min": 0.05, "margin_max": 0.5, "power": -0.25}
# Keys that can have one value alone here, each with what it may be.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model.type": ("ImageToImageRetriever",),
    "model.head.type": ("ArcFaceClsHead",),
    "model.head.loss.type": ("CrossEntropyLoss",),
    "model.head.loss.loss_weight": (1.0,),
    "model.head.init_cfg": (None,),
    "data_preprocessor.to_rgb": (True,),
    "train_cfg.type": ("EpochBasedTrainLoop",),
    "optim_wrapper.accumulative_counts": (1,),
    "optim_wrapper.clip_grad.norm_type": (2, 2.0),
    "default_hooks.logger.type": ("LoggerHook",),
    "default_hooks.checkpoint.type": ("CheckpointHook",),
    "default_hooks.checkpoint.rule": ("greater",),
    "default_hooks.checkpoint.by_epoch": (True,),
    **{f"{name}.dataset.type": ("InShop",) for name in _READ_DATASETS},
    **{f"{name}.sampler.type": ("DefaultSampler",) for name in _READ_DATASETS},
}
# What may stand in a file without a remark: it is so here anyway, or steers what is not here.
_IGNORED = (
    *("model.similarity_fn", "model.topk", "model.data_preprocessor", "model.pretrained"),
    *("model.init_cfg", "model.train_cfg", "train_cfg.by_epoch", "optim_wrapper.loss_scale"),
    *("data_preprocessor.type", "data_preprocessor.num_classes", "custom_hooks"),
    *("env_cfg.mp_cfg", "env_cfg.dist_cfg", "env_cfg.resource_limit"),
    *("randomness.deterministic", "randomness.diff_rank_seed", "default_hooks.timer"),
    *("default_hooks.param_scheduler", "default_hooks.sampler_seed", "default_hooks.logger.*"),
    *("default_hooks.visualization", "default_hooks.runtime_info", "*.dataset.test_mode"),
    *(f"*.{key}" for key in ("pin_memory", "persistent_workers", "prefetch_factor")),
    *("*.collate_fn", "*.drop_last", "*.sampler.shuffle", "*.sampler.round_up"),
)
_SECTIONS = (
    *("model", "data_preprocessor", "train_dataloader", "val_dataloader", "optim_wrapper"),
    *("train_cfg", "val_cfg", "default_hooks", "env_cfg", "auto_scale_lr", "randomness"),
)
_LAYOUT = "it holds Eval/list_eval_partition.txt and Img/img/{MEN,WOMEN}/…, or <class>/<image>"
_NOT_HERE = {"custom_imports": "this recipe runs its own code alone, with the steps it has"}
_LONGEST_NAME = 255  # of what is typed for a file of margins


def key(name: str, default: Any = None, scope: Scope = "result") -> Any:
    """A field that stands under `name`. scope: what a resumed run may do with it."""
    return field(default=default, metadata={"key": name, "scope": scope})


def _loader(name: str, scope: Scope) -> Any:
    return field(default_factory=Loader, metadata={"key": name, "scope": scope})


@dataclass(frozen=True)
class Loader:
    """Pictures of one split, and how many at a time in one process."""

    batch_size: Count = key("batch_size")
    workers: Workers = key("num_workers", 0, "free")
    root: str | None = key("dataset.data_root", None, "free")
    split: Literal["train", "query", "gallery"] = key("dataset.split", "train")
    prefix: str = key("dataset.data_prefix", "Img")
    ann_file: str = key("dataset.ann_file", inshop.LIST)
    pipeline: Any = key("dataset.pipeline")


@dataclass(frozen=True)
class Recipe:
    """A run's settings, each under its key of the configuration."""

    encoder: Any = key("model.image_encoder")  # see encoders.build_encoder
    num_classes: Annotated[int, Range(2, COUNTS.high)] = key("model.head.num_classes")
    in_channels: Size = key("model.head.in_channels")
    sub_centres: Count = key("model.head.num_subcenters", 1)
    scale: Positive = key("model.head.scale", 64.0)
    margins: Any = key("model.head.margins", 0.5)  # radians: one, or one for each class
    easy_margin: bool = key("model.head.easy_margin", False)
    sample_rate: ShareAboveZero = key("model.head.sample_rate", 1.0)
    shard: bool = key("model.head.shard", False)
    mean: Any = key("data_preprocessor.mean")  # of R, G and B in grey levels
    std: Any = key("data_preprocessor.std")
    train: Loader = _loader("train_dataloader", "result")
    query: Loader = _loader("val_dataloader", "free")
    gallery: Loader = _loader("model.prototype", "free")
    optimizer: Literal["SGD", "AdamW"] = key("optim_wrapper.optimizer.type")
    lr: Positive = key("optim_wrapper.optimizer.lr")
    weight_decay: float = key("optim_wrapper.optimizer.weight_decay", 0.0)
    momentum: float = key("optim_wrapper.optimizer.momentum", 0.0)
    nesterov: bool = key("optim_wrapper.optimizer.nesterov", False)
    dampening: float = key("optim_wrapper.optimizer.dampening", 0.0)
    eps: Positive = key("optim_wrapper.optimizer.eps", 1e-8)
    betas: Any = key("optim_wrapper.optimizer.betas", (0.9, 0.999))
    clip_norm: Positive | None = key("optim_wrapper.clip_grad.max_norm")
    norm_decay: float = key("optim_wrapper.paramwise_cfg.norm_decay_mult", 1.0)
    bias_decay: float = key("optim_wrapper.paramwise_cfg.bias_decay_mult", 1.0)
    custom_keys: Any = key("optim_wrapper.paramwise_cfg.custom_keys", ())
    wrapper: Literal["OptimWrapper", "AmpOptimWrapper"] = key("optim_wrapper.type", "OptimWrapper")
    dtype: Literal["float16", "bfloat16"] = key("optim_wrapper.dtype", "float16")
    schedule: Any = key("param_scheduler", ())  # see schedule.learning_rate_factor
    scale_lr: bool = key("auto_scale_lr.enable", False)
    base_batch_size: Count | None = key("auto_scale_lr.base_batch_size")  # that lr is meant for
    epochs: Count = key("train_cfg.max_epochs", None, "length")
    val_interval: Count = key("train_cfg.val_interval", 1, "free")
    val_begin: Count = key("train_cfg.val_begin", 1, "free")
    val_before_train: bool = key("train_cfg.val_before_train", False, "free")
    val_amp: bool = key("val_cfg.fp16", False, "free")
    evaluators: Any = key("val_evaluator", (), "free")
    log_interval: Count = key("default_hooks.logger.interval", 10, "free")  # steps
    save_interval: Annotated[int, Range(-1, COUNTS.high)] = key(  # epochs; 0 and less: none
        "default_hooks.checkpoint.interval", 1, "free"
    )
    keep: Annotated[int, Range(-1, COUNTS.high)] = key(  # files of epochs; 0 and less: all
        "default_hooks.checkpoint.max_keep_ckpts", -1, "free"
    )
    save_best: str | None = key("default_hooks.checkpoint.save_best", None, "free")
    hooks: Any = key("custom_hooks", ())
    cudnn_benchmark: bool = key("env_cfg.cudnn_benchmark", False, "free")
    seed: Annotated[int, SEEDS] | None = key("randomness.seed", None, "free")
    sync_bn: Any = key("sync_bn")
    load_from: str | None = key("load_from")
    work_dir: str | None = key("work_dir", None, "free")
    resume: bool = key("resume", False, "free")

    @property
    def is_sharded(self) -> bool:
        """Whether each process has centres of its own, beside DDP (Partial FC)."""
        return self.shard or self.sample_rate < 1

    @property
    def amp(self) -> str | None:
        """The mode of AmpOptimWrapper; its loss scale is found as training goes."""
        modes = {"float16": "fp16", "bfloat16": "bf16"}
        return modes[self.dtype] if self.wrapper == "AmpOptimWrapper" else None

    @property
    def adaptive(self) -> tuple[float, float, float] | None:
        """Smallest and largest margin and the power of margins by class frequency, if asked for."""
        for hook in _dicts(self.hooks):
            if hook["type"] == "SetAdaptiveMarginsHook":
                low, high, power = (hook.get(name, value) for name, value in _ADAPTIVE.items())
                return low, high, power
        return None

    @property
    def best(self) -> str | None:
        """The metric of the best file, as Recall@1."""
        best = self.save_best
        return "Recall@1" if best == "auto" else best.removeprefix("retrieval/") if best else None

    def depths(self, kind: str) -> tuple[int, ...]:
        """The k of Recall@k or mAP@k that val_evaluator asks for."""
        found: list[int] = []
        for entry in _dicts(self.evaluators):
            depths = entry.get("topk", 1)
            if _DEPTHS[entry["type"]] == kind:
                found += depths if isinstance(depths, list | tuple) else [depths]
        return tuple(found)

    def lr_for(self, total_batch: int) -> float:
        """The learning rate for a total batch (Goyal et al. 2017, arXiv:1706.02677, 2.1)."""
        return self.lr * total_batch / self.base_batch_size if self.scale_lr else self.lr  # type: ignore[operator]

    @property
    def largest_norm(self) -> float:
        """To which the gradients are shortened."""
        return self.clip_norm or math.inf

    def is_saved(self, epoch: int) -> bool:
        """Whether `epoch` (from 1) leaves epoch_N.pth."""
        interval = self.save_interval
        return interval > 0 and (epoch % interval == 0 or epoch == self.epochs)

    def check_weights(self, *, is_random: bool) -> None:
        """Raise UserError for a path of weights where no file is; names of weights pass.

        is_random: the encoder's init_cfg is not looked at.
        """
        name, init_cfg = "model.image_encoder.0.init_cfg.checkpoint", _init_cfg(self.encoder)
        named = {
            name: None if is_random else init_cfg.get("checkpoint"),
            "load_from": self.load_from,
        }
        for name, value in named.items():
            if isinstance(value, str) and is_path(value) and not Path(value).exists():
                raise UserError(f"{name}: {value} is missing: give a weight file's path")

    def is_validated(self, epoch: int) -> bool:
        """Whether `epoch` (from 1) ends with a validation."""
        is_due = epoch >= self.val_begin and epoch % self.val_interval == 0
        return is_due or epoch == self.epochs


@dataclass(frozen=True)
class Settings:
    """A checked recipe, the configuration it was read from, and what the user should know.

    changed: dotted key → the file's value, of what options changed (None: not in the file).
    """

    configuration: dict[str, Any]
    recipe: Recipe
    remarks: list[str]
    changed: dict[str, Any]


@dataclass(frozen=True)
class Overrides:
    """What a command line lays over a configuration.

    data_root: of every data set. scale_lr: the learning rate follows the batch size. strict: what
    has no effect is refused. seed: of the split of a directory without a list. is_stored: it is
    that of a run, with its number of classes.
    """

    options: tuple[str, ...] = ()
    data_root: Path | None = None
    scale_lr: bool = False
    strict: bool = False
    seed: int = 0
    is_stored: bool = False


def settle(configuration: dict[str, Any], over: Overrides, cwd: Path) -> Settings:
    """The settings of a configuration under `over`; relative paths in it are from `cwd`.

    Raises UserError for anything not understood, and for data that is not there.
    """
    found = without_data(configuration, over, cwd)
    changed = copy.deepcopy(found.configuration)
    for name in _READ_DATASETS:
        _put(changed, f"{name}.dataset.data_root", str(_root_of(changed, name, cwd)))
    recipe, _ = read_recipe(changed)
    partition = inshop.read(recipe.train.root, recipe.train.ann_file, over.seed)
    is_given = any(text.startswith("model.head.num_classes=") for text in over.options)
    if partition.is_folder and not (is_given or over.is_stored):
        _put(changed, "model.head.num_classes", max(2, len({p.item for p in partition.train})))
        recipe, _ = read_recipe(changed)
    return dataclasses.replace(found, configuration=changed, recipe=recipe)


def without_data(configuration: dict[str, Any], over: Overrides, cwd: Path) -> Settings:
    """As `settle`, the data left as they are named: they need not be there."""
    changed = config.with_options(configuration, over.options)
    known = {*configuration, *_NOT_HERE, *_SECTIONS, "param_scheduler", "custom_hooks", "load_from",
             "resume", "work_dir", "sync_bn", "val_evaluator"}  # fmt: skip
    remarks = [
        f"--cfg-options {shortened(name)}: the configuration has no {shortened(name)}"
        f"{did_you_mean(name, known)}"
        for name in changed
        if name not in known
    ]
    for name in DATASETS if over.data_root else ():
        if isinstance(_get(changed, f"{name}.dataset"), dict):
            _put(changed, f"{name}.dataset.data_root", str(over.data_root))
    if over.scale_lr:
        _put(changed, "auto_scale_lr.enable", True)
    before, after = (flat(json.loads(json.dumps(values))) for values in (configuration, changed))
    names = sorted(before.keys() | after.keys())
    _settle_paths(changed, cwd)
    recipe, unread = read_recipe(changed)
    remarks += unread
    if over.strict and remarks:
        raise UserError(f"{remarks[0]} (--strict-cfg refuses it)")
    different = {n: before.get(n) for n in names if before.get(n) != after.get(n)}
    return Settings(json.loads(json.dumps(changed)), recipe, remarks, different)


def check_data(parts: Mapping[str, Loader], seed: int) -> list[str]:
    """A remark for each oddity of the pictures' lists. parts: loaders by their keys.

    Raises UserError for what is wrong with lists and pipelines.
    """
    remarks: dict[str, None] = {}
    once = functools.cache(inshop.read)  # all parts may be of one list
    for name, loader in parts.items():
        partition = once(loader.root, loader.ann_file, seed)
        partition.split(loader.split)
        remarks |= dict.fromkeys(partition.remarks())
        pipeline.build_pipeline(loader.pipeline, f"{name}.dataset.pipeline")
    return list(remarks)


def stored_configuration(run_dir: Path) -> dict[str, Any]:
    """The configuration of the run in `run_dir`. Raises UserError where none is."""
    written = read_json(run_dir / "config.json")
    settings = written.get("settings") if isinstance(written, dict) else None
    configuration = settings.get("configuration") if isinstance(settings, dict) else None
    if not isinstance(configuration, dict):
        raise UserError(
            f"{run_dir / 'config.json'} is missing or is not of a run of this recipe; name the "
            "configuration file with --config"
        )
    return configuration


def changes(run_dir: Path, now: Recipe) -> list[str]:
    """What decides the numbers and is not as in the run there, 'name: old → new'."""
    before, _ = read_recipe(stored_configuration(run_dir))
    return differing(deciding(before), deciding(now))


def _root_of(configuration: dict[str, Any], name: str, cwd: Path) -> Path:
    """The directory of a data set; a relative path is looked up in `cwd`, then in arcface/."""
    value = _get(configuration, f"{name}.dataset.data_root")
    if not isinstance(value, str) or not value.strip():
        raise UserError(
            f"{name}.dataset.data_root is {'empty' if value in ('', None) else shown(value)}: type "
            f"`export data_path=/…/inshop` before the command, or --data-root PATH; {_LAYOUT}"
        )
    given = Path(value).expanduser()
    for place in (cwd / given, config.RECIPE / given):
        if place.is_dir():
            return place
    raise UserError(
        f"{name}.dataset.data_root: {cwd / given} is no directory; unpack In-shop there "
        f"({_LAYOUT}), or name the place of all data sets with --data-root PATH"
    )


def _settle_paths(configuration: dict[str, Any], cwd: Path) -> None:
    """Make paths of weights absolute and put a file of margins in their place."""
    margins = _get(configuration, "model.head.margins")
    if isinstance(margins, str) and len(margins) <= _LONGEST_NAME:
        path = cwd / Path(margins).expanduser()
        try:
            numbers = [float(word) for word in read_text(path, "utf-8-sig").split()]
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.head.margins: {path} cannot be read: {one_line(error)}; expected a number "
                "for each class"
            ) from None
        _put(configuration, "model.head.margins", numbers)
    init_cfg = _init_cfg(_get(configuration, "model.image_encoder"))
    for holder, name in ((init_cfg, "checkpoint"), (configuration, "load_from")):
        value = holder.get(name)
        if isinstance(value, str) and is_path(value):
            holder[name] = str(cwd / Path(value).expanduser())


def _init_cfg(encoder: Any) -> dict[str, Any]:
    """Where the encoder's weights are described; {} where they are not."""
    first = encoder[0] if isinstance(encoder, list | tuple) and encoder else encoder
    init_cfg = first.get("init_cfg") if isinstance(first, dict) else None
    return init_cfg if isinstance(init_cfg, dict) else {}


def is_path(name: str) -> bool:
    """Whether it is a file's path, and neither an address nor a name of weights."""
    suffixes = (".pth", ".pt", ".bin", ".safetensors")
    return "://" not in name and ("/" in name or name.endswith(suffixes))


def _put(configuration: dict[str, Any], dotted: str, value: Any) -> None:
    *above, last = dotted.split(".")
    for part in above:
        if not isinstance(configuration.get(part), dict):
            configuration[part] = {}
        configuration = configuration[part]
    configuration[last] = value


# --- reading --------------------------------------------------------------------------------------


def read_recipe(configuration: dict[str, Any]) -> tuple[Recipe, list[str]]:
    """The recipe in a merged configuration, and a line for each key that has no effect.

    Raises UserError for what is missing, of a wrong kind, or not to be had here.
    """
    for name, allowed in _FIXED.items():
        value = _get(configuration, name, allowed[0])
        if isinstance(value, bool) != isinstance(allowed[0], bool) or value not in allowed:
            near = did_you_mean(str(value), map(str, allowed))
            raise UserError(f"{name} is {shown(value)}, allowed: {allowed[0]}{near}")
    for name in _SECTIONS:
        if not isinstance(configuration.get(name, {}), dict | None):
            raise UserError(f"{name} is {shown(configuration[name])}, expected dict(…)")
    recipe = _fill(Recipe, configuration)
    _check(recipe)
    return recipe, _remarks(configuration)


def deciding(recipe: Recipe) -> dict[str, Any]:
    """The dotted keys and values that decide the numbers of a run, but for its length."""
    return flat({name: _listed(value) for name, value in _deciding(recipe, "")})


def _deciding(part: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(part):
        name, value = prefix + item.metadata["key"], getattr(part, item.name)
        if item.metadata["scope"] == "result":
            if dataclasses.is_dataclass(value):
                yield from _deciding(value, f"{name}.")
            else:
                yield name, value


def _listed(value: Any) -> Any:
    """Lists as dicts by index, so that a difference has its key."""
    if isinstance(value, dict):
        return {str(name): _listed(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return {str(place): _listed(inner) for place, inner in enumerate(value)}
    return value


def _fill(kind: type[Any], configuration: dict[str, Any], prefix: str = "") -> Any:
    defaults = kind()
    _, settings = next(iter(sections(defaults)))
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        name = prefix + item.metadata["key"]
        if item.name not in settings:
            values[item.name] = _fill(Loader, configuration, f"{name}.")
            continue
        value = _get(configuration, name, getattr(defaults, item.name))
        setting = settings[item.name]
        values[item.name] = value if setting.kind is Any else read(setting, value, name)
    return kind(**values)


def _get(configuration: Any, dotted: str, default: Any = None) -> Any:
    """The value under a dotted key; the default where it, or a dict on the way, is missing."""
    *above, last = dotted.split(".")
    for part in above:
        configuration = configuration.get(part)
        if not isinstance(configuration, dict):
            return default
    value = configuration.get(last)
    return default if value is None else value


def _dicts(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _check(recipe: Recipe) -> None:
    """Refuse values that single types cannot tell from others."""
    _check_margins(recipe)
    _check_entries("custom_hooks", recipe.hooks, {
        "SetAdaptiveMarginsHook": ("priority", *_ADAPTIVE),
        **dict.fromkeys(("PrepareProtoBeforeValLoopHook", "SyncBuffersHook"), ("priority",)),
    })  # fmt: skip
    known = ("topk", "mode", "prefix", "collect_device")
    _check_entries("val_evaluator", recipe.evaluators, dict.fromkeys(_DEPTHS, known))
    for place, entry in enumerate(_dicts(recipe.evaluators)):
        for depth in _dicts(entry.get("topk", 1)):
            number(f"val_evaluator.{place}.topk", depth, int, COUNTS)
        if entry.get("mode", "IR") != "IR":
            raise UserError(f"val_evaluator.{place}.mode is {shown(entry['mode'])}, allowed: IR")
    low, high, power = recipe.adaptive or _ADAPTIVE.values()
    number("custom_hooks: margin_min", low, float, Range(0, 1.57))
    number("custom_hooks: margin_max", high, float, Range(low, 1.57))
    number("custom_hooks: power", power, float, Range(-100, 0))
    _numbers("optim_wrapper.optimizer.betas", recipe.betas, 2, Range(0, 1, below=True))
    _numbers("data_preprocessor.mean", recipe.mean, 3, Range(-1e6, 1e6))
    _numbers("data_preprocessor.std", recipe.std, 3, Range(0, 1e6, above=True))
    for name, entry in dict(recipe.custom_keys or {}).items():
        dotted = f"optim_wrapper.paramwise_cfg.custom_keys.{name}"
        entry = config.checked(entry, dotted, lr_mult=1.0, decay_mult=1.0)
        for key_, value in entry.items():
            number(f"{dotted}.{key_}", value, float, Range())
    depths = {"Recall": {1, 10, 20, 30, 40}, "mAP": {10}}  # which are always reported
    metrics = [f"{kind}@{k}{end}" for kind, always in depths.items()
               for k in sorted({*always, *recipe.depths(kind)})
               for end in (("", "_min") if kind == "mAP" else ("",))]  # fmt: skip
    if recipe.best not in (None, *metrics):
        raise UserError(
            f"default_hooks.checkpoint.save_best is {shown(recipe.save_best)}; allowed: auto, "
            + ", ".join(f"retrieval/{name}" for name in metrics)
        )
    if recipe.nesterov and not recipe.momentum:
        raise UserError("optim_wrapper.optimizer: nesterov needs a momentum above 0")
    if recipe.scale_lr and recipe.base_batch_size is None:
        raise UserError("auto_scale_lr.base_batch_size is missing: the total batch that lr is for")


def _check_margins(recipe: Recipe) -> None:
    values, name = recipe.margins, "model.head.margins"
    if isinstance(values, list | tuple) and len(values) != recipe.num_classes:
        raise UserError(f"{name} has {len(values)} numbers for {recipe.num_classes} classes")
    for value in _dicts(values):
        if not Range(0, 1.57, below=True).fits(value, float):
            raise UserError(
                f"{name} is {shown(values)}, expected radians from 0 to 1.57: one, or a list"
            )


def _check_entries(name: str, entries: Any, kinds: Mapping[str, tuple[str, ...]]) -> None:
    """Refuse an entry of a list of dicts whose type or whose keys are not known."""
    for place, entry in enumerate(_dicts(entries)):
        kind = entry.get("type") if isinstance(entry, dict) else None
        if kind not in kinds:
            near = did_you_mean(str(kind), kinds)
            raise UserError(
                f"{name}.{place}.type is {shown(kind)}, allowed: {', '.join(kinds)}{near}"
            )
        config.checked(entry, f"{name}.{place}", **dict.fromkeys(kinds[str(kind)]))


def _numbers(name: str, value: Any, count: int, allowed: Range) -> None:
    words = {2: "two", 3: "three"}[count]
    is_right = isinstance(value, list | tuple) and len(value) == count
    if not is_right or not all(allowed.fits(one, float) for one in value):
        raise UserError(f"{name} is {shown(value)}, expected {words}: {allowed.describe(float)}")


def _remarks(configuration: dict[str, Any]) -> list[str]:
    """A line for each key that nothing reads."""
    loaders = [f"{name}.{item.metadata['key']}" for name in _READ_DATASETS
               for item in dataclasses.fields(Loader)]  # fmt: skip
    own = [item.metadata["key"] for item in dataclasses.fields(Recipe)]
    known = [*own, *loaders, *_FIXED]
    lines = []
    for name in _SECTIONS:
        lines += _unread(configuration.get(name) or {}, name, known)
    for name, why in _NOT_HERE.items():
        if configuration.get(name):
            lines.append(f"{name} has no effect: {why}")
    return lines


def _unread(values: dict[Any, Any], above: str, known: list[str]) -> Iterator[str]:
    beside = sorted({name[len(above) + 1 :].partition(".")[0] for name in known
                     if name.startswith(f"{above}.")})  # fmt: skip
    for name, value in values.items():
        dotted = f"{above}.{name}"
        if dotted in known and dotted not in _READ_DATASETS:
            continue
        if any(fnmatch.fnmatchcase(dotted, pattern) for pattern in _IGNORED):
            continue
        if str(name) in beside and isinstance(value, dict | None):
            yield from _unread(value or {}, dotted, known)
            continue
        near = did_you_mean(str(name), beside) or f"; known there: {', '.join(beside)}"
        yield f"{dotted} is not known and has no effect{near}"
