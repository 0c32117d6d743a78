"""One run: its directory, lock, settings, status, metrics and checkpoints.

    with Run(cfg, world, run_dir, "probe") as run:
        …                                             # load models and data
        position = run.restore(parts, Plan(total_steps))
        while position.epoch < cfg.epochs:
            for batch in make_loader(..., epoch=position.epoch, offset=position.batch):
                ...
                position.advance()
                run.log({"loss": loss})
                if run.should_stop():
                    run.save(parts)
                    return run.finish()
            position.next_epoch()
            run.save(parts)
        return run.finish(result=...)

Every rank calls every verb; only rank 0 writes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from shared import checkpoint, distributed, lock, outcome, resume, run_directory, seed, status
from shared.checkpoint import Parts, Position
from shared.config import HasRunOptions
from shared.distributed import World
from shared.errors import DONE, UserError, hint_for, one_line
from shared.files import read_object
from shared.progress import Share
from shared.reporter import Plan, Reporter
from shared.resume import Decision
from shared.signals import StopRequest, exit_code_for, name_of
from shared.status import Status

log = logging.getLogger(__name__)


class Run:
    """See the module's docstring. Verbs: restore, log, beat, should_stop, save, finish.

    recipe: whose run it is. last: name of the checkpoint that a resume continues from.
    tensorboard: where events go; default: tensorboard/ in the run directory.
    """

    def __init__(self, config: HasRunOptions, world: World, run_dir: Path, recipe: str, *,
                 last: str = "last.pt", tensorboard: Path | None = None) -> None:  # fmt: skip
        self.position = Position()
        self._config, self._world, self._dir, self._recipe = config, world, run_dir, recipe
        self._options, self._plan = config.run, Plan(0)
        self._last, self._board = run_dir / last, tensorboard
        self._stop_every = 1 if world.device.type == "cpu" else 20  # the exchange waits for the GPU
        self._stop, self._stopped_by, self._decision = StopRequest(), 0, Decision()
        self._unsaved = ""  # why the newest checkpoint is not on the disk
        self._before: dict[str, str] = {}  # files of the run that is to be continued
        self._share = Share()
        self._lock: int | None = None  # these three on rank 0 alone
        self._status: Status | None = None
        self._reporter: Reporter | None = None

    def __enter__(self) -> Run:
        try:
            self._stop.has_loop = False
            self._stop.install()
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
        self._plan = plan
        self.position = resume.continue_from(
            self._decision, parts, self._world,
            total_steps=plan.total_steps, allow_reshard=self._options.allow_reshard,
        )  # fmt: skip
        if self._status:
            size = checkpoint.expected_size(parts, self._world.size)
            checkpoint.check_space(self._dir, size, self._options.keep)
            board = self._board or self._dir / "tensorboard"
            self._reporter = Reporter(self._dir, board, self._status, plan, self.position)
        self._stop.has_loop = True
        return self.position

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

    def should_stop(self, *, at_once: bool = False) -> bool:
        """Whether any rank was asked to stop; the same answer on every rank, between steps.

        at_once: ask at every call; else several GPUs are asked every 20 steps.
        """
        if self._world.size == 1:
            self._stopped_by = self._stop.number
        elif self._stopped_by == 0 and (at_once or self.position.step % self._stop_every == 0):
            self._stopped_by = distributed.largest(self._stop.number, self._world)
        return self._stopped_by != 0

    def save(self, parts: Parts) -> bool:
        """Write a checkpoint of this position; whether it is on the disk, the same on every rank.

        A disk that refuses it is a warning, and NotSavedError when the run is stopping or
        --on-full-disk says stop.
        """
        checkpoint.collect(parts)
        generators = distributed.gather_objects(seed.get_state(), self._world)
        problem = self._write(parts, generators) if self._world.is_main else None
        problem = distributed.broadcast_object(problem, self._world)
        self._unsaved = problem or ""
        if problem and (self._stopped_by or self._options.on_full_disk == "stop"):
            raise outcome.NotSavedError(problem)
        if problem:
            log.warning(
                "%s — %s; training continues", problem, hint_for(problem) or "see the message"
            )
        return not problem

    def finish(
        self,
        *,
        result: dict[str, Any] | None = None,
        outputs: list[str] | None = None,
        reason: str = "",
    ) -> int:
        """Close the run as done, or as stopped and saved; its exit code. The last verb.

        result: {name, before, after, higher_is_better}; if known {unit, n, chance, majority}.
        reason: why it is done, for people.
        Raises NotSavedError when the last checkpoint could not be written.
        """
        if self._unsaved:
            raise outcome.NotSavedError(self._unsaved)
        step, total = self.position.step, self._plan.total_steps
        code, state, reason = DONE, "done", reason or f"{step} steps"
        if self._stopped_by:
            code, state = exit_code_for(self._stopped_by), "stopped"
            name = name_of(self._stopped_by)
            how = run_directory.how_to_continue(self._options)
            reason = f"{name}: saved at step {step} of {total}; {how}"
        if self._reporter:
            ending = {"state": state, "exit_code": code, "reason": reason}
            self._reporter.write_status(
                self.position, **ending, result=result, outputs=outputs or []
            )
        distributed.barrier(self._world)  # nobody leaves before the files are whole
        return code

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        try:
            if self._reporter:
                self._reporter.close()
            if error is not None:
                self._close_after(error)
        finally:
            self._let_go()

    def _begin(self) -> None:
        """Take the directory, move aside an older run that is not continued, say what begins."""
        self._lock = lock.take(self._dir)
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
        self._stop.remove()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _close_after(self, error: BaseException) -> None:
        """Say in the status how the run broke; of several processes only the launcher knows."""
        if isinstance(error, UserError) and not self._stop.has_loop:
            run_directory.put_back(self._dir, self._before)  # refused: the run there is as it was
        if self._plan.total_steps:
            error.add_note(f"at step {self.position.step + 1} of {self._plan.total_steps}")
        failure = outcome.failure_of(error)
        is_stopped = failure.kind == "stopped"
        if self._status and (self._world.size == 1 or is_stopped):
            state = "stopped" if is_stopped else "failed"
            status.close(self._dir, failure.code, failure.message, state)

    def _write(self, parts: Parts, generators: list[dict[str, Any]]) -> str | None:
        """Write the checkpoint; what went wrong, if the disk refused it."""
        state = checkpoint.snapshot(parts, self.position, generators)
        try:
            checkpoint.save(self._last, state, self._options.keep)
        except OSError as error:
            return f"the checkpoint of step {self.position.step} was not written: {one_line(error)}"
        return None
