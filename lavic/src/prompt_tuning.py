"""Stage 2: tune the language model to recommend from a conversation and ten candidates' pictures.

python prompt_tuning.py --model_dir ./out_distilled/vision_lora_adapter_best
python prompt_tuning.py --model_dir … --category amazon_home
torchrun --nproc_per_node=4 prompt_tuning.py --model_dir …    four GPUs, said explicitly
python prompt_tuning.py --demo                                after ./run_training.sh --demo

Writes trained_lora_adapter/, test_results_<candidates>.jsonl and results_summary.csv.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import replay, stop

if __name__ == "__main__":
    stop.listen()

from shared.config import RunOptions, free, option, parse
from shared.errors import UserError
from shared.files import open_lock, write_json
from shared.launch import launch, world_size
from shared.settings import Count, Positive, ShareBelowOne, Workers

if TYPE_CHECKING:  # torch comes after the input is checked
    from lavic.src.recommend.data import Talks
    from lavic.src.recommend.model import Built
    from lavic.src.recommend.results import Outcome
    from lavic.src.vision.training import Best
    from shared.distributed import World
    from shared.run import Run

log = logging.getLogger(__name__)

SRC = Path(__file__).resolve().parent
DATA = SRC.parent / "data"


@dataclass(frozen=True)
class Config:
    """Settings of the prompt tuning."""

    model_dir: Path | None = option(None, "stage 1's adapter directory; has to be given")
    candidate_type: Literal["candidates_st", "candidates_gpt_large"] = option(
        "candidates_st", "which list of ten candidates"
    )
    category: Literal["all_beauty", "amazon_fashion", "amazon_home"] = option(
        "all_beauty", "whose conversations"
    )
    finetune_output_dir: Path = free(SRC / "out_finetuned", "where everything goes")
    max_length: Count = option(2048, "tokens of a prompt with its answer")
    batch_size: Count = option(1, "conversations a process and forward pass")
    num_workers: Workers = free(4, "loader workers a process", aliases=("--workers",))
    lr: Positive = option(5e-5, "AdamW's learning rate")
    weight_decay: float = option(1e-5, "AdamW's weight decay")
    num_epochs: Count = option(1, "passes over the training conversations", scope="length")
    patience: Count | None = option(
        None, "epochs without a lower val_loss before training ends", scope="length"
    )
    item_meta_path: Path = free(DATA / "item2meta_train.json", "the products' titles")
    image_dir: Path = free(DATA / "train_images", "pictures {id}_0.jpg")
    data_root: Path = free(DATA, "holds <category>/{train,valid,test}.jsonl")
    model_name: str | None = option(
        None, "base model, Hub id or directory; default: the one the adapter was trained on"
    )
    slots: Literal["fixed5", "views"] = option(
        "fixed5", "item tokens a picture: five, as published, or one a view"
    )
    grad_accum: Count = option(1, "forward passes a step")
    micro_batch: Count | None = free(
        None, "conversations of a forward pass, in place of --batch_size: the same step"
    )
    lora_dropout: ShareBelowOne = option(0.1, "dropout before the adapter")
    clip_norm: Positive = option(1.0, "largest norm of the gradients")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the frozen weights; auto: half on a GPU, float32 on the CPU"
    )
    load_in_4bit: bool = option(False, "frozen language model in NF4, by bitsandbytes (QLoRA)")
    gradient_checkpointing: Literal["auto", "on", "off"] = free(
        "auto", "less memory for more time; auto: on GPUs below 48 GB"
    )
    eval_batch_size: Count = free(4, "conversations a process in evaluation")
    evaluate_before: bool = free(True, "test the untrained model first")
    max_samples: str = option("all", "conversations of each file to use, from its first; or all")
    cache: Path = free(SRC / "vector_cache", "keeps the pictures' vectors")
    estimate: bool = free(False, "print the memory this will take, stop")
    run: RunOptions = field(default_factory=lambda: RunOptions(seed=42, log_every=10))

    def __post_init__(self) -> None:
        """Refuse what no run can use."""
        from lavic.src.catalogue import most

        most(self.max_samples)

    @property
    def run_dir(self) -> Path:
        """Where adapter, results, checkpoints and status go."""
        return self.run.run_dir or self.finetune_output_dir

    @property
    def adapter(self) -> Path:
        """Stage 1's adapter directory."""
        assert self.model_dir
        return self.model_dir

    @property
    def samples_per_step(self) -> int:
        """Conversations of one process in an optimizer step."""
        return self.batch_size * self.grad_accum

    @property
    def at_once(self) -> int:
        """Conversations of one forward pass in training."""
        return min(self.micro_batch or self.batch_size, self.samples_per_step)

    def conversations(self, split: str) -> Path:
        """The file of train, valid or test."""
        return self.data_root / self.category / f"{split}.jsonl"


DEMO = {  # what suits 240 conversations and a model of 0.4 million parameters; typed flags win
    "batch_size": 4,
    "num_epochs": 4,
    "lr": 2e-3,
    "max_length": 512,
    "eval_batch_size": 10,
    "num_workers": 0,
}


def main(argv: list[str] | None = None) -> int:
    """Check the input, then train and test; the exit code."""
    cfg = parse(Config, argv, __doc__, DEMO)
    if cfg.run.demo:
        cfg = _with_demo(cfg)
    if cfg.estimate:
        print(_memory(_fitted(cfg)))
        return 0
    _check_files(cfg)
    from lavic.src.vision.adapter_files import base_of, check_four_bit

    check_four_bit(cfg.load_in_4bit)
    cfg = replace(cfg, model_name=base_of(cfg.adapter, cfg.model_name))
    if cfg.run.replay:
        cfg = replace(cfg, run=replay.settle(cfg, cfg.run_dir))
    cfg = _fitted(cfg) if cfg.run.fit else cfg
    if cfg.run.dry_run:
        print(_plan(cfg))
        return 0
    if cfg.run.prove:
        return _prove(cfg)
    os.close(open_lock(cfg.run_dir))  # better refused now than after the model was loaded
    from shared.memory import explained_out_of_memory

    with explained_out_of_memory(lambda: _memory(cfg)):
        return train(cfg)


def train(cfg: Config) -> int:
    """The whole training, with a test before and after it; the exit code."""
    import torch

    from lavic.src.recommend import evaluation, prompts, results
    from lavic.src.vision.adapters import AdapterState, adapter_parameters
    from lavic.src.vision.model import pad_id
    from lavic.src.vision.training import Best, SameData, perplexity, sum_gradients
    from shared import distributed
    from shared.amp import Amp, has_stalled
    from shared.loader import make_eval_loader, steps_per_epoch
    from shared.reporter import Plan
    from shared.run import Run

    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    earlier = results.read_summary(cfg.run_dir)  # before a finished run is moved aside
    with Run(cfg, world, cfg.run_dir, "lavic") as run:
        # the data: requests with their answers; those of the test as users ask
        talks = _read_talks(cfg)
        steps = steps_per_epoch(len(talks.train), cfg.samples_per_step, world.size, with_rest=True)

        # the model: frozen, a fresh adapter on the language model, stage 1's vectors as pictures
        (recommender, encoder, processor, vectors), amp_mode = _build(cfg, run, talks, world)
        amp = Amp(amp_mode, world.device, max_bad_steps=cfg.run.max_bad_steps)
        pad = pad_id(processor.tokenizer)
        train_set, val_set = (prompts.Prompts(some, encoder) for some in (talks.train, talks.valid))
        test_set = prompts.Prompts(talks.asked, encoder)
        trained = list(adapter_parameters(recommender).values())
        optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
        adapter, best = AdapterState(recommender.model), Best()
        parts = {"adapter": adapter, "optimizer": optimizer, "amp": amp, "record": best,
                 "requests": SameData("requests", map(repr, talks.train))}  # fmt: skip
        plan = Plan(cfg.num_epochs * steps, cfg.samples_per_step * world.size, data=talks.counts)
        position = run.restore(parts, plan)
        if world.is_main:
            results.keep_summary(cfg.run_dir, earlier)

        def test(when: str) -> Outcome:
            collate = partial(prompts.collate_generation, pad_id=pad)
            batches = make_eval_loader(test_set, cfg.eval_batch_size, world, collate=collate)
            found = evaluation.answer(recommender, talks.test, run.watched(batches, "test: batch"),
                                      processor.tokenizer, world)  # fmt: skip
            _report_test(run, found, when)
            return found

        if cfg.evaluate_before and position.step == 0:
            run.save()  # a stop in the test finds a checkpoint
            best.before = test("before training").metrics["recall@1"]

        for epoch in run.epochs(cfg.num_epochs):
            if has_stalled(best.epoch, epoch, cfg.patience):
                break
            recommender.train()
            collate = partial(prompts.collate_step, size=cfg.at_once, pad_id=pad)
            for step in run.batches(train_set, cfg.samples_per_step, workers=cfg.num_workers,
                                    collate=collate, with_rest=True):  # fmt: skip
                labels = int(distributed.total(torch.tensor(prompts.label_tokens(*step)), world))
                loss = torch.zeros((), device=world.device)
                for batch in step:
                    with amp.autocast():
                        part = recommender(batch) / labels
                    amp.backward(part)
                    loss += part.detach()
                sum_gradients(trained, world)
                if run.replays:
                    run.show(recommender.model, _samples(step, recommender, processor.tokenizer))
                norm = amp.step(optimizer, trained, clip_norm=cfg.clip_norm)
                # the log takes the mean over the processes, of which the loss is a sum
                run.step({"train_loss": loss * world.size, "grad_norm": norm, "lr": cfg.lr})

            run.save()  # a stop in the validation loses nothing
            collate = partial(prompts.collate_training, pad_id=pad)
            batches = make_eval_loader(val_set, cfg.eval_batch_size, world, collate=collate)
            held_out = run.watched(batches, "validation: batch")
            loss = evaluation.validation_loss(recommender, held_out, world)
            _report_epoch(cfg, run, loss, perplexity(loss))
            if best.update(loss, epoch + 1):
                _keep(cfg, run, world, loss, recommender.model, processor)

        _take_best(cfg, adapter, best)
        after = test(f"after epoch {best.epoch}")
        run.finish(**_ending(cfg, world, best, after, talks, len(vectors.without)))
    return run.exit_code


# --- data and model -------------------------------------------------------------------------------


def _read_talks(cfg: Config) -> Talks:
    """The conversations of all three files. Raises UserError for a bad line."""
    from lavic.src.catalogue import most
    from lavic.src.recommend.data import read_talks

    files = {split: cfg.conversations(split) for split in ("train", "valid", "test")}
    limit = most(cfg.max_samples)
    return read_talks(files, cfg.candidate_type, cfg.item_meta_path, limit=limit, seed=cfg.run.seed)


def _build(cfg: Config, run: Run, talks: Talks, world: World) -> tuple[Built, str]:
    """The recommender with a fresh adapter, the same on every rank; and the mode for Amp."""
    from lavic.src.recommend import model
    from lavic.src.vision import adapters
    from lavic.src.vision.model import (
        checkpoint_activations,
        core_of,
        gpu_bytes,
        precision,
        recomputes,
    )
    from shared import seed

    assert cfg.model_name
    dtype, amp_mode = precision(cfg.dtype, cfg.run.amp, world.device)
    built = model.build(
        cfg.model_name, cfg.adapter, cfg.image_dir, cfg.cache, talks, world,
        workers=cfg.num_workers, dtype=dtype, max_length=cfg.max_length, slots=cfg.slots,
        four_bit=cfg.load_in_4bit, beat=run.beat,
    )  # fmt: skip
    recommender = built.recommender
    seed.seed_all(cfg.run.seed)  # the same adapter on every process
    recommender.model = adapters.add_adapter(
        recommender.model, model.LANGUAGE_TARGETS, dropout=cfg.lora_dropout
    )
    seed.seed_all(cfg.run.seed, world.rank)  # and dropout of its own
    sizes = gpu_bytes(world.device)
    if recomputes(cfg.gradient_checkpointing, model.ROOM_FOR_ALL_FROM, sizes):
        checkpoint_activations(core_of(recommender.model).language_model)
    trained = sum(p.numel() for p in recommender.parameters() if p.requires_grad)
    log.info("%s in %s, vectors of %d pictures", cfg.model_name, dtype, len(built.vectors.views))
    log.info("%d requests to learn from, %.2f M parameters train", len(talks.train), trained / 1e6)
    return built, amp_mode


# --- what is written ------------------------------------------------------------------------------


def _samples(step: list[Any], recommender: Any, tokenizer: Any) -> list[replay.Sample]:
    """Each forward pass of the step, its answers and its loss a token, without dropout."""
    import torch

    from lavic.src.recommend.prompts import IGNORED, label_tokens

    recommender.eval()
    samples = []
    for batch in step:
        with torch.no_grad():
            loss = float(recommender(batch)) / label_tokens(batch)
        said = " | ".join(tokenizer.decode(row[row != IGNORED]) for row in batch["labels"])
        samples.append(replay.Sample({"nll a token": loss}, said))
    return samples


def _report_test(run: Run, found: Outcome, when: str) -> None:
    """Log the figures of a test."""
    run.log({f"test/{n}": value for n, value in found.metrics.items()}, split="test")
    log.info("%s: %s", when, found.line())


def _report_epoch(cfg: Config, run: Run, loss: float, perplexity: float) -> None:
    """Log an epoch's validation."""
    run.log({"val_loss": loss, "val_perplexity": perplexity}, split="val")
    text, epoch = "epoch %d/%d | val_loss %.4f | perplexity %.3f", run.position.epoch + 1
    log.info(text, epoch, cfg.num_epochs, loss, perplexity)


def _keep(cfg: Config, run: Run, world: World, loss: float, llava: Any, processor: Any) -> None:
    """Have rank 0 write trained_lora_adapter/, with all that using it needs beside the base."""
    from lavic.src.vision.adapter_files import ABOUT, RECOMMENDER, VISION
    from lavic.src.vision.adapters import save_adapter
    from shared.checkpoint import beside

    run.log({"val_loss": loss}, split="best")
    directory = cfg.run_dir / RECOMMENDER
    if not world.is_main:
        return
    with beside(directory):
        save_adapter(llava, processor, directory)
        (directory / VISION).mkdir(exist_ok=True)
        for path in cfg.adapter.iterdir():
            if path.is_file() and path.name.startswith("adapter_"):
                shutil.copyfile(path, directory / VISION / path.name)
        names = ("model_name", "candidate_type", "category", "slots", "max_length")
        about = {name: getattr(cfg, name) for name in names}
        write_json(directory / ABOUT, {"schema": 1, **about})


def _take_best(cfg: Config, state: Any, best: Best) -> None:
    """Put the kept adapter's weights into the model, unless the last epoch was the best."""
    from lavic.src.vision.adapter_files import RECOMMENDER
    from lavic.src.vision.adapters import WEIGHTS
    from shared import weights

    path = cfg.run_dir / RECOMMENDER / WEIGHTS
    if best.epoch and not path.exists():
        log.warning("%s is missing: the adapter of the last epoch is tested", path)
    elif 0 < best.epoch < cfg.num_epochs:
        state.load_state_dict(weights.read(path))


def _ending(
    cfg: Config, world: World, best: Best, after: Outcome, talks: Talks, num_without_picture: int
) -> dict[str, Any]:
    """Write answers and summary; what the run ends with."""
    from lavic.src.recommend import results
    from lavic.src.vision.adapter_files import RECOMMENDER

    answers = cfg.run_dir / f"test_results_{cfg.candidate_type}.jsonl"
    if world.is_main:
        results.write_answers(answers, cfg.candidate_type, after)
        names = ("model_dir", "candidate_type", "lr", "weight_decay", "num_epochs", "category")
        row: dict[str, Any] = {name: getattr(cfg, name) for name in names}
        row |= {
            "output_file": str(answers),
            "recall_before@1": best.before,
            "val_loss": best.loss,
            "without_picture": num_without_picture,
            "seed": cfg.run.seed,
        }
        row |= after.metrics | after.counts
        results.write_summary(cfg.run_dir, [*results.read_summary(cfg.run_dir), row])
    outputs = [cfg.run_dir / RECOMMENDER, answers, cfg.run_dir / results.SUMMARY]
    result = {"name": "Recall@1", "before": best.before, "after": after.metrics["recall@1"]}
    result |= {"unit": "of the true items", "n": after.counts["gt_items"]}
    result |= results.references(talks.test, [request.answer or "" for request in talks.train])
    return {
        "result": result | {"higher_is_better": True},
        "outputs": [str(path) for path in outputs],
    }


# --- settings, files, processes -------------------------------------------------------------------


def _memory(cfg: Config) -> str:
    """What --estimate says."""
    from lavic.src.recommend import memory

    return memory.text(memory_values(cfg), world_size())


def _fitted(cfg: Config) -> Config:
    """`cfg` with the forward passes and the checkpointing that --fit has room for."""
    from lavic.src.recommend import memory
    from lavic.src.vision import memory as of_vision

    return of_vision.fitted(cfg, memory.plan, memory_values, world_size())


def memory_values(cfg: Config) -> dict[str, Any]:
    """The settings that decide about memory, by their names."""
    names = ("model_name", "model_dir", "max_length", "clip_norm", "dtype", "load_in_4bit",
             "gradient_checkpointing")  # fmt: skip
    passes = -(-cfg.samples_per_step // cfg.at_once)
    own = {"batch_size": cfg.at_once, "grad_accum": passes, "amp": cfg.run.amp}
    return {name: getattr(cfg, name) for name in names} | own


def _with_demo(cfg: Config) -> Config:
    """`cfg` on the built-in data: its paths where none were typed."""
    from lavic.demo_data import demo
    from lavic.src.vision.adapter_files import DISTILLED, SETTINGS

    paths = demo.build(SRC.parent / "demo")
    adapter = paths.distilled / DISTILLED
    if "model_dir" not in cfg.run.typed and not (adapter / SETTINGS).is_file():
        raise UserError("the demo's stage 1 has not been trained: type ./run_training.sh --demo")
    changes = {
        "model_dir": adapter,
        "data_root": paths.data,
        "item_meta_path": paths.train_data,
        "image_dir": paths.train_images,
        "finetune_output_dir": paths.finetuned,
        "cache": paths.root / "runs" / "vector_cache",
    }
    return replace(cfg, **{n: value for n, value in changes.items() if n not in cfg.run.typed})


def _check_files(cfg: Config) -> None:
    """Refuse missing inputs in one line each, before anything slow is imported."""
    if cfg.model_dir is None:
        raise UserError(
            "--model_dir is missing: give stage 1's adapter, for example "
            "--model_dir ./out_distilled/vision_lora_adapter_best"
        )
    from lavic.src.vision.adapter_files import SETTINGS, stage_of

    if not (cfg.model_dir / SETTINGS).is_file():
        raise UserError(
            f"{cfg.model_dir} is no adapter ({SETTINGS}): train stage 1 first with "
            "./run_training.sh, or give the right directory"
        )
    if stage_of(cfg.model_dir) != 1:
        raise UserError(f"{cfg.model_dir} is no adapter of stage 1: it leaves the vision tower out")
    for split in ("train", "valid", "test"):
        path = cfg.conversations(split)
        if not path.is_file():
            raise UserError(
                f"{path} is missing: put the conversations of {cfg.category} there, or type "
                "--data-root"
            )
    if not cfg.item_meta_path.is_file():
        raise UserError(f"{cfg.item_meta_path} is missing: type --item-meta-path")
    if not cfg.image_dir.is_dir():
        raise UserError(
            f"{cfg.image_dir} is missing: fetch the pictures with python crawl_images.py, or type "
            "--image-dir"
        )


def _prove(cfg: Config) -> int:
    """Hold the ways to take the same step against each other; the exit code."""
    from lavic.src.vision.training import ways
    from shared.prove import prove

    cases = ways(cfg.run, cfg.batch_size, cfg.grad_accum, cfg.dtype, cfg.gradient_checkpointing)
    return prove(cfg.run, cfg.run_dir, ("adapter",), cases, ["--no-evaluate-before"])


def _plan(cfg: Config) -> str:
    processes = world_size()
    return (
        f"{cfg.num_epochs} epochs over {cfg.conversations('train')} with {cfg.candidate_type}, "
        f"{processes * cfg.samples_per_step} conversations a step = {processes} process(es) x "
        f"{cfg.batch_size} x {cfg.grad_accum}; vision adapter {cfg.adapter} on {cfg.model_name}; "
        f"results in {cfg.run_dir}"
    )


if __name__ == "__main__":
    sys.exit(launch(main))
