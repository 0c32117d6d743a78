"""Stage 1: teach LLaVA-v1.6's vision tower to say what a picture shows, in five vectors.

python knowledge_distillation.py                        data/ of the recipe, every visible GPU
python knowledge_distillation.py --max_samples 5000     the first 5000 samples, to try things out
python knowledge_distillation.py --estimate             the memory it will take; loads no weights
python knowledge_distillation.py --demo                 built-in data, on any machine

Trains LoRA on the vision tower and the projector; the language model stays as it is.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import replay, stop

if __name__ == "__main__":
    stop.listen()

from shared.config import RunOptions, free, option, parse
from shared.errors import UserError
from shared.files import open_lock, read_object, write_text
from shared.launch import launch, world_size
from shared.settings import Count, Positive, Seed, ShareBelowOne, Size, Workers

if TYPE_CHECKING:  # torch comes after the input is checked
    from lavic.src.catalogue import Sample
    from lavic.src.vision.captions import Step
    from lavic.src.vision.training import Best, Sums
    from shared.distributed import World
    from shared.images import Skipped
    from shared.run import Run

log = logging.getLogger(__name__)

SRC = Path(__file__).resolve().parent
DATA = SRC.parent / "data"
CLIP_NORM = 1.0
MOST_LEFT_OUT = 0.5  # share of an epoch's samples


@dataclass(frozen=True)
class Config:
    """Settings of the distillation."""

    model_name: str = option(
        "llava-hf/llava-v1.6-mistral-7b-hf", "model id of the Hub, or a directory"
    )
    train_data: Path = option(DATA / "item2meta_train.json", "products to learn from")
    val_data: Path = option(DATA / "item2meta_valid.jsonl", "products to validate with")
    train_images_dir: Path = free(DATA / "train_images", "pictures of the first")
    val_images_dir: Path = free(DATA / "valid_images", "pictures of the second")
    output_dir: Path = free(SRC / "out_distilled", "adapter and run directory")
    batch_size: Count = option(1, "samples of one forward pass, a process")
    grad_accum: Count = option(1, "forward passes of one optimizer step")
    micro_batch: Count | None = free(
        None, "samples of a forward pass in place of --batch_size: the same step in other pieces"
    )
    num_epochs: Count = option(1, "passes over the samples", scope="length")
    patience: Count | None = option(
        None, "epochs without a lower val_loss before training ends", scope="length"
    )
    lr: Positive = option(5e-5, "learning rate, the same throughout")
    weight_decay: float = option(1e-5, "AdamW's weight decay")
    max_samples: str = option("all", "train on the first N samples, or all")
    sample_seed: Seed | None = option(None, "with --max_samples: N at random, by this seed")
    max_length: Count = option(2048, "tokens; longer descriptions are cut, longer prompts left out")
    slots: Literal["fixed5", "views"] = option(
        "fixed5", "item tokens of a picture: always five, or one a view"
    )
    lora_r: Size = option(8, "rank of the adapter")
    lora_alpha: Count = option(32, "its strength is alpha / r")
    lora_dropout: ShareBelowOne = option(0.1, "dropout before it")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the frozen weights; auto: bfloat16 or float16 on a GPU, float32 on the CPU"
    )
    load_in_4bit: bool = option(False, "frozen language model in NF4, by bitsandbytes")
    gradient_checkpointing: Literal["auto", "on", "off"] = free(
        "auto", "less memory for the tower, more time; auto: on GPUs below 30 GB"
    )
    reuse_prompt: bool = free(
        True, "run what is the same in all prompts once, and no gradients through any"
    )
    validate_before_training: bool = option(False, "validate once before the first step")
    num_workers: Workers = free(4, "loader workers a process", aliases=("--workers",))
    log_dir: Path | None = free(
        None, "TensorBoard; default lightning_logs/version_N beside the output"
    )
    estimate: bool = free(False, "print the memory this will take, stop")
    run: RunOptions = field(default_factory=lambda: RunOptions(seed=42, log_every=10))

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        from lavic.src.catalogue import most

        most(self.max_samples)

    @property
    def run_dir(self) -> Path:
        """Where adapter, checkpoints, status and metrics go."""
        return self.run.run_dir or self.output_dir

    @property
    def adapter_dir(self) -> Path:
        """Where the best adapter goes."""
        from lavic.src.vision.adapter_files import DISTILLED

        return self.run_dir / DISTILLED

    @property
    def samples_per_step(self) -> int:
        """Of one process."""
        return self.batch_size * self.grad_accum

    @property
    def at_once(self) -> int:
        """Samples of one forward pass."""
        return min(self.micro_batch or self.batch_size, self.samples_per_step)


DEMO = {  # what suits some hundred small pictures and a tower of 0.2 million parameters
    "batch_size": 4,
    "num_epochs": 6,
    "lr": 1.5e-3,
    "validate_before_training": True,
    "num_workers": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train; the exit code."""
    cfg = parse(Config, argv, __doc__, DEMO)
    if cfg.run.demo:
        cfg = _with_demo(cfg)
    if cfg.run.replay:
        cfg = replace(cfg, run=replay.settle(cfg, cfg.run_dir))
    if cfg.estimate:
        print(_memory(_fitted(cfg)))
        return 0
    from lavic.src.vision import adapter_files

    adapter_files.check_base(cfg.model_name)
    adapter_files.check_four_bit(cfg.load_in_4bit)
    samples, held_out = _read_samples(cfg)
    cfg = _fitted(cfg) if cfg.run.fit else cfg
    if cfg.run.dry_run:
        print(_plan(cfg, len(samples), len(held_out)))
        return 0
    if cfg.run.prove:
        return _prove(cfg)
    os.close(open_lock(cfg.run_dir))  # better refused now than after the model was loaded
    from shared.memory import explained_out_of_memory

    with explained_out_of_memory(lambda: _memory(cfg)):
        return train(replace(cfg, log_dir=_log_dir(cfg)), samples, held_out)


def train(cfg: Config, samples: list[Sample], held_out: list[Sample]) -> int:
    """The whole training; the exit code."""
    import torch

    from lavic.src.vision import adapters, caption_loss, captions, model
    from lavic.src.vision.training import Best, SameData, Sums, mean_nll, sum_gradients
    from shared import distributed
    from shared.amp import Amp, has_stalled
    from shared.images import Skipped
    from shared.loader import make_eval_loader, steps_per_epoch
    from shared.reporter import Plan
    from shared.run import Run

    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    with Run(cfg, world, cfg.run_dir, "lavic", tensorboard=cfg.log_dir) as run:
        captions.refuse_unusable(samples, "training")
        captions.refuse_unusable(held_out, "validation")
        steps = steps_per_epoch(len(samples), cfg.samples_per_step, world.size, with_rest=True)

        # the model: frozen, with an adapter on vision tower and projector
        llava, processor, item_ids, amp_mode = _build(cfg, world)
        amp = Amp(amp_mode, world.device, max_bad_steps=cfg.run.max_bad_steps)

        # the data: prompt, item tokens and description of each picture; then the loss
        fixed = captions.fixed_tokens(processor.tokenizer)
        collate = captions.Collate(cfg.at_once, model.pad_id(processor.tokenizer), fixed)
        train_set = captions.Captions(samples, processor, cfg.slots, cfg.max_length)
        val_set = captions.Captions(held_out, processor, cfg.slots, cfg.max_length)
        with amp.autocast():
            start = caption_loss.fixed_start(llava, fixed) if cfg.reuse_prompt else None

        def nll_of(batch: captions.Batch) -> torch.Tensor:
            with amp.autocast():
                return caption_loss.caption_nll(llava, batch.to(world.device), item_ids, start)

        def validate() -> float:
            llava.eval()
            rest = make_eval_loader(val_set, cfg.at_once, world, workers=cfg.num_workers,
                                    collate=collate)  # fmt: skip
            held_out = run.watched(rest, "validation: batch")
            return _reported(run, mean_nll(held_out, nll_of, world, skipped)[0])

        trained = list(adapters.adapter_parameters(llava).values())
        optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
        sums, best, skipped = Sums(world), Best(), Skipped("samples")
        parts = {"adapter": adapters.AdapterState(llava), "optimizer": optimizer, "amp": amp,
                 "samples": SameData("samples", (one.text for one in samples)),
                 "tally": sums, "best": best}  # fmt: skip
        counts = {"training samples": len(samples), "validation samples": len(held_out)}
        a_step = cfg.samples_per_step * world.size
        position = run.restore(parts, Plan(cfg.num_epochs * steps, a_step, data=counts))
        if cfg.validate_before_training and position.step == 0:
            run.save()  # a stop in the validation finds a checkpoint
            best.before = validate()

        for epoch in run.epochs(cfg.num_epochs):
            if has_stalled(best.epoch, epoch, cfg.patience):
                break
            model.train_vision(llava)
            for step in run.batches(train_set, cfg.samples_per_step, workers=cfg.num_workers,
                                    collate=collate, with_rest=True):  # fmt: skip
                labels = int(distributed.total(torch.tensor(step.num_labels), world))
                loss, norm = torch.zeros((), device=world.device), 0.0
                for batch in step.batches:
                    part = nll_of(batch) / labels
                    amp.backward(part)
                    loss += part.detach()
                if labels:  # of all processes: the same decision on each
                    sum_gradients(trained, world)
                    if run.replays:
                        run.show(llava, _samples(step, llava, nll_of, processor.tokenizer))
                    norm = amp.step(optimizer, trained, clip_norm=CLIP_NORM)
                _count(step, loss * labels, sums, skipped)
                # the log takes the mean over the processes, of which these are sums
                shown = {"train_loss": loss * world.size, "skipped": sums.left_out * world.size}
                run.step(shown | {"lr": cfg.lr, "grad_norm": norm})
            run.save()  # a stop in the validation loses nothing
            _conclude(cfg, run, *sums.conclude())
            loss = validate()
            _write_figures(cfg, world, loss, epoch + 1)
            if best.update(loss, epoch + 1):
                _keep(cfg, run, world, best, llava, processor)
        run.finish(result=_result(best, len(held_out)), outputs=[str(cfg.adapter_dir)])
    return run.exit_code


def _read_samples(cfg: Config) -> tuple[list[Sample], list[Sample]]:
    """Those to train on and to validate with. Raises UserError when there are none."""
    from lavic.src.catalogue import choose, most, read_samples

    found = read_samples(cfg.train_data, cfg.train_images_dir)
    held_out = read_samples(cfg.val_data, cfg.val_images_dir)
    log.info("training: %s", found.summary(cfg.train_images_dir))
    log.info("validation: %s", held_out.summary(cfg.val_images_dir))
    chosen = choose(found.usable, most(cfg.max_samples), cfg.sample_seed)
    if len(chosen) < len(found.usable):
        how = "the first of the file" if cfg.sample_seed is None else "drawn at random"
        log.info("--max_samples %s: %d are trained on, %s", cfg.max_samples, len(chosen), how)
    return chosen, held_out.usable


def _build(cfg: Config, world: World) -> tuple[Any, Any, list[int], str]:
    """The model with a fresh adapter, its processor, the item tokens' ids; and Amp's mode."""
    from lavic.src.vision import adapters, model
    from shared import seed

    dtype, amp_mode = model.precision(cfg.dtype, cfg.run.amp, world.device)
    seed.seed_all(cfg.run.seed)  # the same adapter on every process
    base, processor = model.load_base(
        cfg.model_name, world.device, dtype, four_bit=cfg.load_in_4bit
    )
    item_ids = model.add_item_tokens(base, processor.tokenizer)
    llava = adapters.add_adapter(
        base, model.VISION_TARGETS, r=cfg.lora_r, alpha=cfg.lora_alpha, dropout=cfg.lora_dropout
    )
    sizes = model.gpu_bytes(world.device)
    if model.recomputes(cfg.gradient_checkpointing, model.TOWER_IS_TIGHT_BELOW, sizes):
        model.checkpoint_activations(model.core_of(llava).vision_tower)
    seed.seed_all(cfg.run.seed, world.rank)  # and dropout of its own
    log.info("weights in %s", dtype)
    return llava, processor, item_ids, amp_mode


def _samples(step: Step, llava: Any, nll_of: Any, tokenizer: Any) -> list[replay.Sample]:
    """Each sample with its loss a token, by the model without dropout."""
    import torch

    from lavic.src.vision import captions

    llava.eval()
    samples = []
    for row in captions.one_by_one(step):
        with torch.no_grad():
            loss = float(nll_of(row)) / max(1, row.num_labels)
        said = tokenizer.decode(row.labels[row.labels != captions.NO_LABEL])
        samples.append(replay.Sample({"nll a token": loss}, said, replay.png(row.views[0])))
    return samples


def _reported(run: Run, loss: float) -> float:
    """The loss of a validation, logged."""
    from lavic.src.vision.training import perplexity

    run.log({"val_loss": loss, "val_perplexity": perplexity(loss)}, split="val")
    log.info("val_loss %.4f | val_perplexity %.4f", loss, perplexity(loss))
    return loss


def _count(step: Step, nll: Any, sums: Sums, skipped: Skipped) -> None:
    """Add a step to the epoch's sums, and name what it left out."""
    sums.add(nll, labels=step.num_labels, used=step.num_used, left_out=len(step.left_out))
    for name, reason in step.left_out:
        skipped.add(name, reason)


def _conclude(cfg: Config, run: Run, mean: float, seen: int, left_out: int) -> None:
    """Log an epoch. Raises UserError when most of its samples were left out."""
    if left_out > MOST_LEFT_OUT * seen:
        raise UserError(
            f"{left_out} of the epoch's {seen} samples could not be used: see the reasons above, "
            "and fetch the pictures again with src/crawl_images.py"
        )
    epoch = run.position.epoch + 1
    log.info("epoch %d/%d | train_loss %.4f | %d left out", epoch, cfg.num_epochs, mean, left_out)


def _write_figures(cfg: Config, world: World, loss: float, epoch: int) -> None:
    """val_metrics_epoch_N.txt with its two lines."""
    from lavic.src.vision.training import perplexity
    from shared.checkpoint import beside

    path = cfg.run_dir / f"val_metrics_epoch_{epoch}.txt"
    if world.is_main:
        with beside(path):
            write_text(path, f"Val Loss: {loss}\nVal PPL: {perplexity(loss)}\n")


def _keep(cfg: Config, run: Run, world: World, best: Best, llava: Any, processor: Any) -> None:
    """Have rank 0 write the best adapter."""
    from lavic.src.vision.adapters import save_adapter
    from shared.checkpoint import beside

    run.log({"val_loss": best.loss, "epoch": best.epoch}, split="best")
    if world.is_main:
        with beside(cfg.adapter_dir):
            save_adapter(llava, processor, cfg.adapter_dir)
            log.info("Best LoRA adapter saved.")
            log.info("it is in %s", cfg.adapter_dir)


def _result(best: Best, num_pictures: int) -> dict[str, Any] | None:
    """For status.json; None where nothing was measured before the training."""
    if best.before is None or not best.epoch:
        return None
    found = {"name": "val_loss", "before": best.before, "after": best.loss}
    return found | {"higher_is_better": False, "unit": "nats a token", "n": num_pictures}


# --- settings, files, processes -------------------------------------------------------------------


def _memory(cfg: Config) -> str:
    """What --estimate says."""
    from lavic.src.vision import memory

    return memory.text(memory_values(cfg), world_size())


def _fitted(cfg: Config) -> Config:
    """`cfg` with the forward passes and the checkpointing that --fit has room for."""
    from lavic.src.vision import memory

    return memory.fitted(cfg, memory.plan, memory_values, world_size())


def memory_values(cfg: Config) -> dict[str, Any]:
    """The settings that decide about memory, by their names."""
    names = ("model_name", "lora_r", "lora_dropout", "dtype", "load_in_4bit",
             "gradient_checkpointing", "reuse_prompt")  # fmt: skip
    passes = -(-cfg.samples_per_step // cfg.at_once)
    own = {"batch_size": cfg.at_once, "grad_accum": passes, "amp": cfg.run.amp}
    return {name: getattr(cfg, name) for name in names} | own


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the built-in data: its paths where none were typed."""
    from lavic.demo_data import demo

    paths = demo.build(SRC.parent / "demo")
    changes = {
        "model_name": str(paths.weights),
        "train_data": paths.train_data,
        "val_data": paths.val_data,
        "train_images_dir": paths.train_images,
        "val_images_dir": paths.valid_images,
        "output_dir": paths.distilled,
    }
    return replace(cfg, **{name: v for name, v in changes.items() if name not in cfg.run.typed})


def _log_dir(cfg: Config) -> Path:
    """Where TensorBoard's events go: on with those of an unfinished run, else the next number."""
    if cfg.log_dir:
        return cfg.log_dir
    if read_object(cfg.run_dir / "status.json").get("state") not in (None, "done"):
        settings = read_object(cfg.run_dir / "config.json").get("settings", {})
        if settings.get("log_dir"):
            return Path(settings["log_dir"])
    beside = cfg.run_dir.parent / "lightning_logs"
    numbers = (path.name.removeprefix("version_") for path in beside.glob("version_*"))
    taken = [int(number.partition(".")[0]) for number in numbers if number[:1].isdigit()]
    return beside / f"version_{max(taken, default=-1) + 1}"


def _prove(cfg: Config) -> int:
    """Hold the ways to take the same step against each other; the exit code."""
    from lavic.src.vision.training import ways
    from shared.prove import prove

    cases = ways(cfg.run, cfg.batch_size, cfg.grad_accum, cfg.dtype, cfg.gradient_checkpointing)
    always = ["--log_dir", "{here}/logs", "--no-validate-before-training"]
    return prove(cfg.run, cfg.run_dir, ("adapter",), cases, always)


def _plan(cfg: Config, num_train: int, num_valid: int) -> str:
    processes = world_size()
    total = processes * cfg.samples_per_step
    return (
        f"{cfg.num_epochs} epoch(s) of {num_train} samples, {num_valid} to validate with; {total} "
        f"samples a step = {processes} process(es) x batch size {cfg.batch_size} x "
        f"{cfg.grad_accum} accumulated; adapter and checkpoints in {cfg.run_dir}"
    )


if __name__ == "__main__":
    sys.exit(launch(main))
