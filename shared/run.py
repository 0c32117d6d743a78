"""One run: its directory, lock, settings, status, metrics and checkpoints, and the loop's chores.

    with Run(cfg, world, run_dir, "probe") as run:
        ...                                           # load models and data
        run.restore(parts, Plan(total_steps))
        for epoch in run.epochs(cfg.epochs):          # from where the last run was interrupted
            for batch in run.batches(dataset, cfg.batch_size, workers=cfg.workers):
                ...
                run.step({"loss": loss})              # logs, saves when due, leaves on a stop
            for batch in run.watched(held_out, "validation"):
                ...                                   # a stop leaves here, on every rank
        run.finish(result=...)
    return run.exit_code

Every rank calls every verb; only rank 0 writes. A stop leaves the block by an exception that the
block itself takes: the run is then saved and closed.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from shared import (
    checkpoint,
    distributed,
    lock,
    outcome,
    replay,
    run_directory,
    seed,
    status,
    stop,
)
from shared.checkpoint import Parts, Position
from shared.config import HasRunOptions
from shared.distributed import World
from shared.errors import DONE, UserError, hint_for, one_line
from shared.files import read_object
from shared.loader import make_loader
from shared.progress import Share
from shared.reporter import Plan, Reporter
from shared.run_directory import Decision
from shared.status import Status
from shared.stop import Stopped

log = logging.getLogger(__name__)

T = TypeVar("T")


class Run:
    """See the module's docstring.

    Verbs: restore, epochs, batches, step, show, end_epoch, watched, log, beat, save, finish.
    recipe: whose run it is. last: name of the checkpoint that a resume continues from.
    tensorboard: where events go; default: tensorboard/ in the run directory.
    """

    def __init__(self, config: HasRunOptions, world: World, run_dir: Path, recipe: str, *,
                 last: str = "last.pt", tensorboard: Path | None = None) -> None:  # fmt: skip
        self.position, self.exit_code = Position(), DONE
        self._config, self._world, self._dir, self._recipe = config, world, run_dir, recipe
        self._options, self._plan = config.run, Plan(0)
        self._last = run_dir / last
        self._board = None if config.run.replay else tensorboard
        self._stopped_by, self._decision, self._parts = 0, Decision(), Parts()
        self._is_begun = self._listens = self._is_cut = False
        self._found = ""  # what a replay has found
        self._shown: tuple[dict[str, float], list[replay.Sample]] = ({}, [])
        self._unsaved = ""  # why the newest checkpoint is not on the disk
        self._before: dict[str, str] = {}  # files of the run that is to be continued
        self._share = Share()
        self._lock: int | None = None  # these three on rank 0 alone
        self._status: Status | None = None
        self._reporter: Reporter | None = None

    def __enter__(self) -> Run:
        try:
            self._listens = stop.listen()
            if self._world.is_main:
                self._begin()
            self._decision = distributed.broadcast_object(self._decision, self._world)
            outcome.announce(self._dir)
        except BaseException:
            self._let_go()
            raise
        return self

    def restore(self, parts: Parts, plan: Plan) -> Position:
        """Load the state to continue from into `parts`, if there is one; the position to begin at.

        Raises UserError when it does not fit or, named explicitly, cannot be read.
        """
        self._plan, self._parts = plan, parts
        self.position = run_directory.continue_from(
            self._decision, parts, self._world,
            total_steps=plan.total_steps, allow_reshard=self._options.allow_reshard,
        )  # fmt: skip
        if self._status:
            size = checkpoint.expected_size(parts, self._world.size)
            checkpoint.check_space(self._dir, size, self._options.keep)
            board = self._board or self._dir / "tensorboard"
            self._reporter = Reporter(self._dir, board, self._status, plan, self.position)
        stop.hold()
        distributed.barrier(self._world)
        stop.all_hold()
        self._is_begun = True
        return self.position

    def epochs(self, count: int) -> Iterator[int]:
        """The epochs that are left, from 0; each ends with `end_epoch`, where the loop did not."""
        while self.position.epoch < count:
            epoch = self.position.epoch
            yield epoch
            if self.position.epoch == epoch:
                self.end_epoch()

    def end_epoch(self) -> None:
        """The epoch is over, its validation and decisions too: save."""
        self.position.next_epoch()
        self.save()

    def batches(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        workers: int,
        collate: Callable[[list[Any]], Any] | None = None,
        with_rest: bool = False,
    ) -> DataLoader[Any]:
        """This rank's batches of the epoch that are left; the arguments are make_loader's."""
        return make_loader(
            dataset, batch_size, self._world, seed=self._options.seed, workers=workers,
            epoch=self.position.epoch, offset=self.position.batch, collate=collate,
            with_rest=with_rest,
        )  # fmt: skip

    @property
    def replays(self) -> bool:
        """Whether the step at work is the one that --replay shows."""
        return self.position.step + 1 == self._options.replay

    def show(self, model: nn.Module, samples: list[replay.Sample]) -> None:
        """The step that is replayed, between backward and optimizer: its gradients and samples.

        samples: this rank's. A collective.
        """
        scaler = self._parts["amp"].state_dict()["scaler"] if "amp" in self._parts else {}
        norms = replay.gradient_norms(model, scaler.get("scale", 1.0))
        ranks = distributed.gather_objects(samples, self._world)
        self._shown = norms, [sample for rank in ranks for sample in rank]

    def step(
        self, values: Mapping[str, float | Tensor], **splits: Mapping[str, float | Tensor]
    ) -> None:
        """An optimizer step is done: report it, save when that is due, leave when asked to.

        splits: what else was measured at this step, under the names of the records; may be empty.
        """
        is_replayed = self.replays
        self.position.advance()
        self.log(values)
        for split, others in splits.items():
            if others:
                self.log(others, split)
        if is_replayed:
            numbers = distributed.mean_of(values, self._world)
            if self._world.is_main:
                self._found = replay.write_page(
                    self._dir, self.position.step, numbers, *self._shown
                )
        self._is_cut = is_replayed or self.position.step == self._options.stop_after
        leaves = self._is_asked() or self._is_cut
        if leaves or self.position.step % self._options.save_every == 0:
            self.save()
        if leaves:
            self._leave()

    def watched(self, batches: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """`batches` of a part without steps, while the status says how far it is.

        total: how many they are, where they cannot say it.
        A stop, of which the ranks may hear between different batches, ends the loop early on each,
        and is taken where all have ended theirs. No collective belongs into the loop. The state is
        that of the last save: save before, where something was trained since.
        """
        count = len(batches) if total is None else total  # type: ignore[arg-type]
        for number, batch in enumerate(batches):
            if distributed.tell_all(stop.number() != 0, self._world):
                break
            self.beat(what, number, count)
            yield batch
        self.leave_if_asked()

    @contextlib.contextmanager
    def for_all(self) -> Iterator[None]:
        """A part that rank 0 does for all ranks, which come here too.

        Within it rank 0 asks stop.check; Stopped leaves it, and then the block on every rank.
        Raises NotSavedError where the disk refused the last checkpoint, and may lack other files.
        """
        if self._unsaved:
            raise outcome.NotSavedError(self._unsaved)
        with contextlib.suppress(Stopped):
            yield
        self.leave_if_asked()

    def leave_if_asked(self) -> None:
        """Leave the block when a rank was asked to stop; a collective."""
        if self._is_asked():
            self._leave()

    def _leave(self) -> NoReturn:
        step, total = self.position.step, self._plan.total_steps
        raise Stopped(f"stopped at step {step} of {total}, and saved")

    def log(self, values: Mapping[str, float | Tensor], split: str = "train") -> None:
        """Report the step just done; recorded, averaged over the ranks, every `log_every` steps.

        Values stay on the device until then: reading them makes the CPU wait for the GPU. Other
        splits (val, epoch, best) are recorded whenever they are given.
        """
        step = self.position.step
        if (
            split != "train"
            or step % self._options.log_every == 0
            or step == self._plan.total_steps
        ):
            numbers = distributed.mean_of(values, self._world)
            if self._reporter:
                self._reporter.record(self.position, split, numbers)
        elif self._reporter:
            self._reporter.tick(self.position)

    def beat(self, what: str, done: int, total: int) -> None:
        """Say how far a part without steps is, before the first one too: `done` of `total`.

        The status has it as `doing`, every ten seconds the log. The ranks need not call it alike.
        """
        if self._status:
            said = self._share.text(what, done, total)
            if self._status.is_due:
                self._status.write(doing=said)

    def _is_asked(self) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank."""
        self._stopped_by = self._stopped_by or distributed.largest(stop.number(), self._world)
        return self._stopped_by != 0

    def save(self) -> bool:
        """Write a checkpoint of this position; whether it is on the disk, the same on every rank.

        A disk that refuses it is a warning, and NotSavedError when the run is stopping or
        --on-full-disk says stop.
        """
        checkpoint.collect(self._parts)
        if self._options.replay:
            return True
        state = self.state()
        problem = self._write(state) if self._world.is_main else None
        problem = distributed.broadcast_object(problem, self._world)
        self._unsaved = problem or ""
        if problem and (self._stopped_by or self._options.on_full_disk == "stop"):
            raise outcome.NotSavedError(problem)
        if problem:
            log.warning(
                "%s — %s; training continues", problem, hint_for(problem) or "see the message"
            )
        return not problem

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this position, on rank 0; {} on the others. A collective.

        Parts of which every rank holds its own piece are as they were at the last save.
        """
        generators = distributed.gather_objects(seed.get_state(), self._world)
        if not self._world.is_main:
            return {}
        return checkpoint.snapshot(self._parts, self.position, generators)

    def finish(
        self,
        *,
        result: dict[str, Any] | None = None,
        outputs: list[str] | None = None,
        reason: str = "",
    ) -> None:
        """Close the run as done, or as stopped and saved: `exit_code`. The last verb.

        result: {name, before, after, higher_is_better}; if known {unit, n, chance, majority}.
        reason: why it is done, for people.
        Raises NotSavedError when the last checkpoint could not be written.
        """
        if self._unsaved:
            raise outcome.NotSavedError(self._unsaved)
        self._is_asked()  # also of a stop in the last evaluation all shall hear
        step, total = self.position.step, self._plan.total_steps
        code, state, reason = DONE, "done", reason or f"{step} steps"
        if self._stopped_by or self._is_cut:
            state, name = "stopped", f"--stop-after {step}"
            if self._stopped_by:
                name = stop.name_of(self._stopped_by)
                code = stop.exit_code_for(self._stopped_by)
            how = run_directory.how_to_continue(self._options)
            reason = f"{name}: saved at step {step} of {total}; {how}"
        if self._found:
            state, reason = "done", self._found
        if self._reporter:
            ending = {"state": state, "exit_code": code, "reason": reason}
            self._reporter.write_status(
                self.position, **ending, result=result, outputs=outputs or []
            )
        distributed.barrier(self._world)  # nobody leaves before the files are whole
        self.exit_code = code

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> bool:
        try:
            if isinstance(error, Stopped):
                self.finish()
            if self._reporter:
                self._reporter.close()
            if error is None or isinstance(error, Stopped):
                distributed.cleanup(self._world)
                return True
            self._close_after(error)
        except BaseException as late:
            self._close_after(late)
            raise
        finally:
            self._let_go()
        return False

    def _begin(self) -> None:
        """Take the directory, move aside an older run that is not continued, say what begins."""
        self._lock = lock.take(self._dir)
        if self._options.replay:
            begins_at = replay.nearest(self._dir.parent, self._options.replay)
            self._decision = Decision(begins_at, is_named=True)
        else:
            self._decision = run_directory.begin(
                self._dir, self._last.name, self._board, self._config, self._world.size
            )
        is_continued = self._decision.checkpoint is not None
        known = read_object(self._dir / "status.json") if is_continued else {}
        self._before = run_directory.description(self._dir) if is_continued else {}
        self._status = Status(
            self._dir,
            pid=outcome.launcher_pid(),
            recipe=self._recipe,
            world_size=self._world.size,
            log=outcome.log_file(),
            **{name: known.get(name, 0) for name in ("step", "epoch", "total_steps")},
        )
        run_directory.describe(self._dir, self._config, self._world.size)
        self._status.write(reason="models and data are being loaded")

    def _let_go(self) -> None:
        if self._listens:
            stop.release()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _close_after(self, error: BaseException) -> None:
        """Say in the status how the run broke; of several processes only the launcher knows."""
        if isinstance(error, UserError) and not self._is_begun:
            run_directory.put_back(self._dir, self._before)  # refused: the run there is as it was
        if self._plan.total_steps:
            error.add_note(f"at step {self.position.step + 1} of {self._plan.total_steps}")
        failure = outcome.failure_of(error)
        if self._status and self._world.size == 1:
            status.close(self._dir, failure.code, failure.message)

    def _write(self, state: dict[str, Any]) -> str | None:
        """Write the checkpoint; what went wrong, if the disk refused it."""
        try:
            checkpoint.save(self._last, state, self._options.keep)
        except OSError as error:
            return f"the checkpoint of step {self.position.step} was not written: {one_line(error)}"
        return None
