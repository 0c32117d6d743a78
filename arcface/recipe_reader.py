"""What training reads of a merged configuration, checked by name, before torch is imported.

Keys without effect here are named in remarks; what would need something that does not exist here
(another optimizer, hook, sampler …) is refused.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

from arcface.recipe import AdaptiveMargins, Checkpoints, Head, Loader, Optimizer, Recipe
from arcface.section import Section, is_number
from shared.errors import UserError, one_line, shown
from shared.files import read_text
from shared.settings import COUNTS, SEEDS, SIZES, WORKERS, Range

# Dotted keys that are read though a file may not hold them, for config_options.with_options.
KNOWN = (
    *(f"model.head.{key}" for key in ("num_subcenters", "scale", "margins", "easy_margin")),
    *("model.head.sample_rate", "model.head.shard", "model.image_encoder.*", "model.prototype"),
    *("train_cfg.val_before_train", "train_cfg.val_begin", "train_cfg.val_interval"),
    *("val_cfg.fp16", "optim_wrapper.type", "optim_wrapper.dtype", "optim_wrapper.optimizer.*"),
    *("optim_wrapper.clip_grad*", "optim_wrapper.paramwise_cfg*", "param_scheduler*"),
    *("default_hooks.logger.interval", "custom_hooks", "custom_hooks.*"),
    *(f"default_hooks.checkpoint.{key}" for key in ("interval", "max_keep_ckpts", "rule")),
    *("default_hooks.checkpoint.save_best", "auto_scale_lr.enable", "auto_scale_lr.base_*"),
    *("env_cfg.cudnn_benchmark", "randomness.seed", "load_from", "sync_bn", "*_dataloader.*"),
    *("*.dataset.data_prefix", "*.dataset.ann_file", "*_evaluator*", "data_preprocessor.*"),
)
_TOP_LEVEL = (
    *("model", "data_preprocessor", "optim_wrapper", "param_scheduler", "auto_scale_lr"),
    *("train_cfg", "val_cfg", "test_cfg", "train_dataloader", "val_dataloader", "test_dataloader"),
    *("val_evaluator", "test_evaluator", "default_hooks", "custom_hooks", "env_cfg", "load_from"),
    *("randomness", "sync_bn", "default_scope", "log_level", "resume", "visualizer"),
)
_HOOKS_OF_NO_EFFECT = ("PrepareProtoBeforeValLoopHook", "SyncBuffersHook")  # done here anyway
_ADAPTIVE = "SetAdaptiveMarginsHook"
_LONGEST_PATH = 255  # of what is typed for a list of margins
_OR_NONE = Range(-1, COUNTS.high)
_OPTIMIZERS = ("SGD", "AdamW")
# Keys of files written for mmpretrain that say what is so here anyway, or steer what is not here.
_PASSED_OVER = {
    "model": ("similarity_fn", "topk", "data_preprocessor", "init_cfg", "pretrained", "train_cfg"),
    "train_cfg": ("by_epoch",),
    "env_cfg": ("mp_cfg", "dist_cfg", "resource_limit"),
    "randomness": ("deterministic", "diff_rank_seed"),
    "default_hooks": ("timer", "param_scheduler", "sampler_seed", "visualization", "runtime_info"),
    "default_hooks.logger": ("ignore_last", "log_metric_by_epoch"),
    "optim_wrapper": ("loss_scale",),
}


class _Sections(NamedTuple):
    """The dicts of a configuration that are read, in the order of their remarks."""

    model: Section
    head: Section
    train: Section
    val: Section
    optim: Section
    optimizer: Section
    hooks: Section
    env: Section
    scaling: Section
    randomness: Section
    train_loader: Section
    query_loader: Section
    gallery_loader: Section
    logger: Section
    checkpoint: Section


def read_recipe(configuration: dict[str, Any], cwd: Path) -> tuple[Recipe, list[str]]:
    """The recipe in a merged configuration, and a line for each key that has no effect.

    cwd: what relative paths in it are relative to. Raises UserError for what is missing, of a wrong
    kind, or not to be had here.
    """
    top = Section(configuration, "")
    sections = _sections(top)
    recipe = _recipe(top, sections, cwd)
    if recipe.epochs is None:
        raise UserError("train_cfg.max_epochs is missing: the number of epochs to train")
    remarks = [line for one in sections for line in one.unknown(_PASSED_OVER.get(one.name, ()))]
    return recipe, [*_misspelt(configuration), *remarks]


def _sections(top: Section) -> _Sections:
    model = top.section("model")
    optim, hooks = top.section("optim_wrapper", {}), top.section("default_hooks", {})
    return _Sections(
        model=model,
        head=model.section("head"),
        train=top.section("train_cfg", {}),
        val=top.section("val_cfg", {}),
        optim=optim,
        optimizer=optim.section("optimizer"),
        hooks=hooks,
        env=top.section("env_cfg", {}),
        scaling=top.section("auto_scale_lr", {}),
        randomness=top.section("randomness", {}),
        train_loader=top.section("train_dataloader"),
        query_loader=top.section("val_dataloader"),
        gallery_loader=model.section("prototype"),
        logger=hooks.section("logger", {}),
        checkpoint=hooks.section("checkpoint", {}),
    )


def _recipe(top: Section, its: _Sections, cwd: Path) -> Recipe:
    its.model.one_of("type", ("ImageToImageRetriever",))
    its.train.one_of("type", ("EpochBasedTrainLoop",), "EpochBasedTrainLoop")
    recall_at, map_at = _depths(top)
    return Recipe(
        encoder=its.model.get("image_encoder"),
        head=_head(its.head, _adaptive(top), cwd),
        preprocess=top.get("data_preprocessor"),
        train=_loader(its.train_loader),
        query=_loader(its.query_loader),
        gallery=_loader(its.gallery_loader),
        optimizer=_optimizer(its.optim, its.optimizer),
        schedule=top.get("param_scheduler", []),
        base_batch_size=_base_batch_size(its.scaling),
        epochs=its.train.whole("max_epochs", None),
        val_interval=its.train.whole("val_interval", 1),
        val_begin=its.train.whole("val_begin", 1),
        val_before_train=its.train.flag("val_before_train", False),
        val_amp=its.val.flag("fp16", False),
        recall_at=recall_at,
        map_at=map_at,
        log_interval=_log_interval(its.logger),
        checkpoints=_checkpoints(its.checkpoint),
        amp=_amp(its.optim),
        seed=its.randomness.whole("seed", None, SEEDS),
        cudnn_benchmark=its.env.flag("cudnn_benchmark", False),
        sync_bn=top.get("sync_bn") not in (None, False),
        load_from=top.text("load_from", None),
    )


def _head(head: Section, adaptive: AdaptiveMargins | None, cwd: Path) -> Head:
    head.one_of("type", ("ArcFaceClsHead",))
    loss = head.section("loss", {})
    loss.one_of("type", ("CrossEntropyLoss",), "CrossEntropyLoss")
    if loss.number("loss_weight", 1.0) != 1.0:
        raise UserError(f"{loss.name}.loss_weight must be 1.0: scale lr in its place")
    if head.get("init_cfg") is not None:
        raise UserError(f"{head.name}.init_cfg must be None: the centres start from random numbers")
    num_classes = head.whole("num_classes", 0, Range(2, COUNTS.high))
    rate = head.number("sample_rate", 1.0, above=0)
    if rate > 1:
        raise UserError(f"{head.name}.sample_rate is {rate}, allowed are numbers up to 1")
    return Head(
        num_classes=num_classes,
        in_channels=head.whole("in_channels", 0, SIZES),
        sub_centres=head.whole("num_subcenters", 1),
        scale=head.number("scale", 64.0, above=0),
        margins=_margins(head.get("margins", 0.5), num_classes, f"{head.name}.margins", cwd),
        easy_margin=head.flag("easy_margin", False),
        adaptive=adaptive,
        sample_rate=rate,
        shard=head.flag("shard", False),
    )


def _margins(value: Any, num_classes: int, name: str, cwd: Path) -> float | tuple[float, ...]:
    """One margin, or one a class from a list or a text file of numbers."""
    if isinstance(value, str) and len(value) < _LONGEST_PATH:
        path = cwd / Path(value).expanduser()
        try:
            value = [float(word) for word in read_text(path, "utf-8-sig").split()]
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else one_line(error)
            raise UserError(
                f"{name}: {path} cannot be read: {why}; expected a number a class"
            ) from None
    single = is_number(value)
    values: Any = [value] if single else value
    if not isinstance(values, list | tuple) or not all(
        is_number(margin) and 0 <= margin < 1.57 for margin in values
    ):
        raise UserError(
            f"{name} is {shown(value)}, expected radians from 0 to 1.57: one, or a list"
        )
    if not single and len(values) != num_classes:
        raise UserError(f"{name} has {len(values)} numbers for {num_classes} classes")
    return float(value) if single else tuple(map(float, values))


def _adaptive(top: Section) -> AdaptiveMargins | None:
    """The margins that custom_hooks ask for; every other hook is refused."""
    found = None
    for hook in top.sections("custom_hooks"):
        kind = hook.one_of("type", (*_HOOKS_OF_NO_EFFECT, _ADAPTIVE))
        hook.get("priority")
        if kind == _ADAPTIVE:
            low = hook.number("margin_min", 0.05, low=0)
            high = hook.number("margin_max", 0.5, low=low)
            found = AdaptiveMargins(low, high, hook.number("power", -0.25))
        hook.refuse_rest()
    return found


def _loader(loader: Section) -> Loader:
    dataset = loader.get("dataset")
    if not isinstance(dataset, dict):
        raise UserError(
            f"{loader.name}.dataset is {shown(dataset)}, expected dict(type='InShop', …)"
        )
    sampler = loader.section("sampler", {})
    sampler.one_of("type", ("DefaultSampler",), "DefaultSampler")
    for key in ("pin_memory", "persistent_workers", "prefetch_factor", "collate_fn", "drop_last"):
        loader.get(key)  # of no effect: see the README
    return Loader(
        name=loader.name,
        batch_size=loader.whole("batch_size", 0),
        workers=loader.whole("num_workers", 0, WORKERS),
        dataset=dataset,
    )


def _optimizer(wrapper: Section, optimizer: Section) -> Optimizer:
    kind = optimizer.one_of("type", _OPTIMIZERS)
    lr = optimizer.number("lr", 0.0, above=0)
    options: dict[str, Any] = {"weight_decay": optimizer.number("weight_decay", 0.0, low=0)}
    if kind == "SGD":
        options["momentum"] = optimizer.number("momentum", 0.0, low=0)
        options["nesterov"] = optimizer.flag("nesterov", False)
        options["dampening"] = optimizer.number("dampening", 0.0)
        if options["nesterov"] and not options["momentum"]:
            raise UserError(f"{optimizer.name}: nesterov needs a momentum above 0")
    else:
        options["eps"] = optimizer.number("eps", 1e-8, above=0)
        options["betas"] = _betas(optimizer)
    if wrapper.whole("accumulative_counts", 1) != 1:
        raise UserError(f"{wrapper.name}.accumulative_counts must be 1 here")
    clip = wrapper.section("clip_grad", {})
    norm = clip.number("max_norm", None, above=0)
    if clip.number("norm_type", 2.0) != 2:
        raise UserError(f"{clip.name}.norm_type must be 2")
    clip.refuse_rest()
    return Optimizer(kind, lr, options, norm, *_paramwise(wrapper.section("paramwise_cfg", {})))


def _betas(optimizer: Section) -> tuple[float, float]:
    value = optimizer.get("betas", (0.9, 0.999))
    is_pair = isinstance(value, list | tuple) and len(value) == 2
    if not is_pair or not all(is_number(beta) and 0 <= beta < 1 for beta in value):
        raise UserError(f"{optimizer.name}.betas is {shown(value)}, expected two numbers in [0, 1)")
    return value[0], value[1]


def _paramwise(cfg: Section) -> tuple[float, float, tuple[tuple[str, float, float], ...]]:
    keys = cfg.section("custom_keys", {})
    custom = []
    for key in cfg.get("custom_keys") or {}:
        entry = keys.section(key)
        custom.append(
            (str(key), entry.number("lr_mult", 1.0, low=0), entry.number("decay_mult", 1.0, low=0))
        )
        entry.refuse_rest()
    norm, bias = (cfg.number(f"{kind}_decay_mult", 1.0, low=0) for kind in ("norm", "bias"))
    cfg.refuse_rest()
    return norm, bias, tuple(custom)


def _amp(wrapper: Section) -> str | None:
    """The mode of AmpOptimWrapper; its loss scale is found as training goes."""
    kind = wrapper.one_of("type", ("OptimWrapper", "AmpOptimWrapper"), "OptimWrapper")
    dtype = wrapper.one_of("dtype", ("float16", "bfloat16"), "float16")
    return {"float16": "fp16", "bfloat16": "bf16"}[dtype] if kind == "AmpOptimWrapper" else None


def _base_batch_size(scaling: Section) -> int | None:
    base = scaling.whole("base_batch_size", None)
    if not scaling.flag("enable", False):
        return None
    if base is None:
        raise UserError("auto_scale_lr.base_batch_size is missing: the total batch that lr is for")
    return base


def _log_interval(logger: Section) -> int:
    logger.one_of("type", ("LoggerHook",), "LoggerHook")
    return logger.whole("interval", 10)


def _checkpoints(hook: Section) -> Checkpoints:
    hook.one_of("type", ("CheckpointHook",), "CheckpointHook")
    hook.one_of("rule", ("greater",), "greater")
    if not hook.flag("by_epoch", True):
        raise UserError(f"{hook.name}.by_epoch must be True: interval counts epochs")
    interval = hook.whole("interval", 1, _OR_NONE)
    keep = hook.whole("max_keep_ckpts", -1, _OR_NONE)
    best = hook.text("save_best", None)
    return Checkpoints(
        interval=max(0, interval),
        keep=keep if keep > 0 else None,
        best="Recall@1" if best == "auto" else best.removeprefix("retrieval/") if best else None,
    )


def _depths(top: Section) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The k of Recall@k and of mAP@k that val_evaluator asks for."""
    found: dict[str, list[int]] = {"RetrievalRecall": [], "RetrievalAveragePrecision": []}
    for entry in top.sections("val_evaluator"):
        kind = entry.one_of("type", tuple(found))
        depths = entry.get("topk", 1)
        depths = depths if isinstance(depths, list | tuple) else [depths]
        if not all(COUNTS.fits(k, int) for k in depths):
            raise UserError(f"{entry.name}.topk is {shown(depths)}, expected whole numbers above 0")
        entry.one_of("mode", ("IR",), "IR")
        for key in ("prefix", "collect_device"):
            entry.get(key)
        entry.refuse_rest()
        found[kind] += depths
    return tuple(found["RetrievalRecall"]), tuple(found["RetrievalAveragePrecision"])


def _misspelt(configuration: dict[str, Any]) -> list[str]:
    """A line for each name that is nearly one that is read; other names serve the file itself."""
    lines = []
    for name in configuration:
        near = difflib.get_close_matches(name, _TOP_LEVEL, n=1, cutoff=0.9)
        if near and name not in _TOP_LEVEL:
            lines.append(f"{name} is not known and has no effect; did you mean {near[0]}?")
    return lines
