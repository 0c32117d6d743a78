"""The training of prompt_tuning.py: what it is built from, and its loop."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lavic.src import recommend_data, recommend_results
from lavic.src.adapter_files import ABOUT, RECOMMENDER, VISION
from lavic.src.adapters import WEIGHTS, adapter_parameters, save_adapter
from lavic.src.conversations import Request
from lavic.src.recommend_data import Batch, Talks, read_talks
from lavic.src.recommend_evaluation import Outcome, answer, validation_loss
from lavic.src.recommend_prompts import label_tokens
from lavic.src.recommend_setup import Built, build
from shared import checkpoint, distributed
from shared.distributed import World
from shared.early_stopping import has_stalled
from shared.files import write_json
from shared.precision import Amp
from shared.reporter import Plan
from shared.run import Run
from shared.sampling import steps_per_epoch

if TYPE_CHECKING:
    from lavic.src.prompt_tuning import Config

log = logging.getLogger(__name__)


def train(cfg: Config) -> int:
    """Train the language model's adapter, test before and after; the exit code."""
    world = distributed.setup(cfg.run.device, cfg.run.timeout)
    earlier = recommend_results.read_summary(cfg.run_dir)  # before a finished run is moved aside
    with Run(cfg, world, cfg.run_dir, "lavic") as run:
        talks = read_talks(cfg)
        code = _loop(cfg, world, run, talks, build(cfg, talks, world), earlier)
    distributed.cleanup(world)
    return code


def _plan(cfg: Config, talks: Talks, world: World) -> Plan:
    """How much is trained, which is logged, too."""
    a_step = cfg.samples_a_step * world.size
    log.info(
        "%d requests to learn from | %d a step = %d process(es) x %d x %d",
        len(talks.train), a_step, world.size, cfg.batch_size, cfg.grad_accum,
    )  # fmt: skip
    steps = steps_per_epoch(len(talks.train), cfg.samples_a_step, world.size)
    return Plan(cfg.num_epochs * steps, a_step, data=talks.counts)


@dataclass
class Record:
    """What was found on the way; goes into checkpoints. before: Recall@1 of the untrained model."""

    before: float | None = None
    best_loss: float = math.inf
    best_epoch: int = 0

    def improves(self, loss: float, epoch: int) -> bool:
        """Whether this is the lowest validation loss so far; NaN never is."""
        if not loss < self.best_loss:
            return False
        self.best_loss, self.best_epoch = loss, epoch
        return True

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        vars(self).update(state)


class Adapter:
    """The trained parameters alone, as a part of checkpoints."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = adapter_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """The parameters under the names of adapter files."""
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])


class SameRequests:
    """A part of checkpoints that refuses to continue on other requests than it was trained on."""

    def __init__(self, requests: list[Request]) -> None:
        text = "\n".join(map(repr, requests))
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        self._mark = {"requests": len(requests), "sha256": digest}

    def state_dict(self) -> dict[str, Any]:
        """Their number and what they are."""
        return dict(self._mark)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare. Raises ValueError when they differ."""
        if state != self._mark:
            raise ValueError(
                f"{state['requests']} requests then, {self._mark['requests']} now, or with other "
                "words: put the conversations back as they were, or start anew with --resume never"
            )


def _loop(
    cfg: Config,
    world: World,
    run: Run,
    talks: Talks,
    built: Built,
    earlier: list[dict[str, Any]],
) -> int:
    recommender, record = built.recommender, Record()
    wrapped, adapter = distributed.wrap(recommender, world), Adapter(recommender.model)
    trainable = list(adapter.parameters.values())
    optimizer = torch.optim.AdamW(trainable, lr=cfg.lr, weight_decay=cfg.weight_decay)
    amp = Amp(built.amp_mode, world.device, max_bad_steps=cfg.run.max_bad_steps)
    parts = {"adapter": adapter, "optimizer": optimizer, "amp": amp, "record": record}
    parts |= {"requests": SameRequests(talks.train)}
    position = run.restore(parts, _plan(cfg, talks, world))
    if world.is_main:
        recommend_results.keep_summary(cfg.run_dir, earlier)
    if cfg.evaluate_before and position.step == 0:
        before = _test(cfg, world, run, talks, built, "before training")
        if before is None:
            run.save(parts)
            return run.finish()
        record.before = before.metrics["recall@1"]
    while position.epoch < cfg.num_epochs and not has_stalled(
        record.best_epoch, position.epoch, cfg.patience
    ):
        recommender.train()
        for batches in recommend_data.training_batches(
            cfg, talks, built.encoder, built.pad_id, world, position
        ):
            loss = accumulate(wrapped, batches, amp, world)
            norm = amp.step(optimizer, trainable, clip_norm=cfg.clip_norm)
            position.advance()
            run.log({"train_loss": loss, "grad_norm": norm, "lr": cfg.lr})
            stop = run.should_stop()
            if stop or position.step % cfg.run.save_every == 0:
                run.save(parts)
            if stop:
                return run.finish()
        _validate(cfg, world, run, talks, built, record)
        position.next_epoch()
        run.save(parts)
    return _conclude(cfg, world, run, talks, built, record)


def accumulate(wrapped: nn.Module, batches: list[Batch], amp: Amp, world: World) -> Tensor:
    """Add the gradients of one step; the mean loss of a label token of this rank's share of it.

    Every label token of all batches of all ranks counts the same: sums over tokens, divided by the
    number of tokens everywhere. (DDP averages over the ranks, hence the factor.)
    """
    tokens = torch.tensor(sum(map(label_tokens, batches)), device=world.device)
    factor = world.size / distributed.total(tokens, world)
    whole = torch.zeros((), device=world.device)
    for number, batch in enumerate(batches):
        with _exchanges(wrapped, when=number == len(batches) - 1):
            with amp.autocast():
                loss = wrapped(batch) * factor
            amp.backward(loss)
        whole += loss.detach()
    return whole


def _exchanges(wrapped: nn.Module, *, when: bool) -> AbstractContextManager[Any]:
    """Gradients travel between the ranks once a step, with its last batch."""
    no_sync = getattr(wrapped, "no_sync", None)
    return nullcontext() if when or no_sync is None else no_sync()


def _validate(
    cfg: Config, world: World, run: Run, talks: Talks, built: Built, record: Record
) -> None:
    """Log the validation loss; keep the adapter of the epoch where it is lowest."""
    batches = recommend_data.validation_batches(
        cfg.eval_batch_size, talks.valid, built.encoder, built.pad_id, world
    )
    loss, perplexity = validation_loss(built.recommender, batches, world)
    epoch = run.position.epoch + 1
    run.log({"val_loss": loss, "val_perplexity": perplexity}, split="val")
    log.info(
        "epoch %d/%d | val_loss %.4f | perplexity %.3f", epoch, cfg.num_epochs, loss, perplexity
    )
    if record.improves(loss, epoch):
        run.log({"val_loss": loss}, split="best")
        if world.is_main:
            with checkpoint.beside(cfg.run_dir / RECOMMENDER):
                _save_adapter(cfg, built)
    distributed.barrier(world)


def _save_adapter(cfg: Config, built: Built) -> None:
    """Write trained_lora_adapter/, with all that using it needs beside the base model."""
    directory = cfg.run_dir / RECOMMENDER
    save_adapter(built.recommender.model, built.processor, directory)  # type: ignore[arg-type]
    (directory / VISION).mkdir(exist_ok=True)
    for path in cfg.adapter.iterdir():
        if path.is_file() and path.name.startswith("adapter_"):
            shutil.copyfile(path, directory / VISION / path.name)
    about = {
        "schema": 1,
        "model_name": cfg.model_name,
        "candidate_type": cfg.candidate_type,
        "category": cfg.category,
        "slots": cfg.slots,
        "max_length": cfg.max_length,
    }
    write_json(directory / ABOUT, about)


def _test(
    cfg: Config, world: World, run: Run, talks: Talks, built: Built, when: str
) -> Outcome | None:
    """Have every conversation of the test answered; None when the user wanted to stop."""
    batches = recommend_data.test_batches(
        cfg.eval_batch_size, talks.asked, built.encoder, built.pad_id, world
    )
    outcome = answer(
        built.recommender, talks.test, batches, built.processor.tokenizer, world, run.should_stop
    )
    if outcome is not None:
        run.log({f"test/{n}": value for n, value in outcome.metrics.items()}, split="test")
        log.info("%s: %s", when, outcome.line())
    return outcome


def _conclude(
    cfg: Config, world: World, run: Run, talks: Talks, built: Built, record: Record
) -> int:
    """Test the best epoch's adapter, write the results, close the run."""
    _take_best(cfg, world, built, record)
    outcome = _test(cfg, world, run, talks, built, f"after epoch {record.best_epoch}")
    if outcome is None:
        return run.finish()
    answers = cfg.run_dir / f"test_results_{cfg.candidate_type}.jsonl"
    if world.is_main:
        recommend_results.write_answers(
            answers, cfg.candidate_type, talks.test, outcome.responses, outcome.recommended
        )
        rows = recommend_results.read_summary(cfg.run_dir)
        row = _summary_row(cfg, built, record, outcome, str(answers))
        recommend_results.write_summary(cfg.run_dir, [*rows, row])
    result = {
        "name": "Recall@1",
        "before": record.before,
        "after": outcome.metrics["recall@1"],
        "higher_is_better": True,
    }
    outputs = [cfg.run_dir / RECOMMENDER, answers, cfg.run_dir / recommend_results.SUMMARY]
    return run.finish(result=result, outputs=[str(path) for path in outputs])


def _take_best(cfg: Config, world: World, built: Built, record: Record) -> None:
    """Put the kept adapter's weights into the model, unless the last epoch was the best."""
    from shared import weights

    path = cfg.run_dir / RECOMMENDER / WEIGHTS
    if record.best_epoch and not path.exists():
        log.warning("%s is missing: the adapter of the last epoch is tested", path)
    elif 0 < record.best_epoch < cfg.num_epochs:
        Adapter(built.recommender.model).load_state_dict(weights.read(path))
    distributed.barrier(world)


def _summary_row(
    cfg: Config, built: Built, record: Record, outcome: Outcome, answers: str
) -> dict[str, Any]:
    """This run's line of results_summary.csv."""
    return {
        "model_dir": cfg.model_dir,
        "candidate_type": cfg.candidate_type,
        "lr": cfg.lr,
        "weight_decay": cfg.weight_decay,
        "num_epochs": cfg.num_epochs,
        "output_file": answers,
        "category": cfg.category,
        "recall_before@1": record.before,
        "val_loss": record.best_loss,
        "without_picture": len(built.vectors.without),
        "seed": cfg.run.seed,
        **outcome.metrics,
        **outcome.counts,
    }
