"""One run of a filter: its directory, lock, status and signals; processes that meet between steps.

    with Job(directory, cfg, world) as job:
        for batch in work:
            ...
            job.advance(len(batch))
            if job.asked_to_stop: break
        if job.meet():                        # every rank comes here
            return job.finish()
        return job.finish("120 of 160 accepted", data={"accepted": 120, "rejected": 40})

What has been done lies in the passes' own files, so the same command goes on from there.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from shared import distributed, lock, outcome, run_directory, stop
from shared import status as statuses
from shared.distributed import World
from shared.errors import DONE
from shared.progress import Progress
from shared.status import Status

log = logging.getLogger(__name__)

RECIPE = "vasevqa/filter"
_EVERY = 10.0  # seconds between lines


class Job:
    """See the module's docstring. Only rank 0 writes."""

    def __init__(self, directory: Path, config: Any, world: World) -> None:
        self._dir, self._config, self._world = directory, config, world
        self._stopped_by, self._listens = 0, False
        self._lock: int | None = None
        self._status: Status | None = None
        self._progress: Progress | None = None
        self._what, self._done, self._total, self._said = "", 0, 0, 0.0

    def __enter__(self) -> Job:
        self._listens = stop.listen()
        stop.hold()
        stop.all_hold()
        problem: Exception | None = None
        if self._world.is_main:
            try:
                self._lock = lock.take(self._dir)
                if self._config.resume == "never" and (aside := statuses.move_aside(self._dir)):
                    log.info("earlier results are now in %s", aside)
            except Exception as error:
                problem = error
        if distributed.any_rank(problem is not None, self._world):
            self._let_go()
            raise problem or SystemExit(2)  # rank 0 has said why
        outcome.announce(self._dir)
        if self._world.is_main:
            self._status = Status(
                self._dir,
                recipe=RECIPE,
                pid=outcome.launcher_pid(),
                world_size=self._world.size,
                total_steps=0,
            )
            self._status.write(step=0)
            run_directory.describe(self._dir, self._config, self._world.size)
        return self

    def begin(self, what: str, total: int) -> None:
        """A part of the work with `total` files begins; what: in words, for lines and status."""
        self._close_progress()
        self._what, self._done, self._total, self._said = what, 0, total, time.monotonic()
        if self._world.is_main:
            self._progress = Progress(total, 0, lines=False)

    def advance(self, count: int = 1) -> None:
        """`count` files more."""
        self._done += count
        if not (self._status and self._progress):
            return
        self._progress.show(self._done, 0, {})
        if self._status.is_due:
            eta = self._progress.eta_s(self._done)
            self._status.write(step=self._done, total_steps=self._total, eta_s=eta,
                               reason=self._what)  # fmt: skip
        if time.monotonic() - self._said >= _EVERY:
            self._said = time.monotonic()
            log.info("%s: %d of %d, %.4g a second", self._what, self._done, self._total,
                     self._progress.speed(self._done))  # fmt: skip

    @property
    def asked_to_stop(self) -> bool:
        """Whether this process heard a stop signal; every rank leaves its own loop for it."""
        return stop.number() != 0

    def meet(self) -> bool:
        """Wait for every rank; whether one of them was asked to stop."""
        self._stopped_by = distributed.largest(stop.number(), self._world)
        return self._stopped_by != 0

    def finish(
        self,
        reason: str = "",
        *,
        result: dict[str, Any] | None = None,
        outputs: list[str] | None = None,
        best: dict[str, Any] | None = None,
        data: dict[str, int] | None = None,
    ) -> int:
        """Close the run as done, or as stopped; its exit code. data: counts, for its report."""
        code, state = DONE, "done"
        if self._stopped_by:
            code, state = stop.exit_code_for(self._stopped_by), "stopped"
            flag = "" if self._config.resume == "auto" else " with --resume auto"
            reason = f"{stop.name_of(self._stopped_by)}: {self._what} stopped at {self._done} of " \
                     f"{self._total}; the same command{flag} continues it"  # fmt: skip
        self._close_progress()
        if self._status:
            self._status.write(
                state=state, exit_code=code, reason=reason, step=self._done,
                total_steps=self._total, eta_s=None, result=result, outputs=outputs or [],
                best=best or {}, data=data or {},
            )  # fmt: skip
        distributed.barrier(self._world)
        return code

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._close_progress()
        if error is not None and self._world.size == 1 and self._status:
            failure = outcome.failure_of(error)
            statuses.close(self._dir, failure.code, failure.message)
        self._let_go()

    def _close_progress(self) -> None:
        if self._progress:
            self._progress.close()
            self._progress = None

    def _let_go(self) -> None:
        if self._listens:
            stop.release()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
