"""torchrun's elastic agent inside the launching process, and what its outcome means for the user.

The agent starts the processes, tears them down and starts them again; here are the signals, the
search for the failure that came first, and the exit code. It must run on the main thread: the
workers' death signal follows the thread that forked them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from shared import outcome, processes, stop
from shared.config import ProcessOptions
from shared.errors import DONE, FAILED, INTERRUPTED, STOPPED, UserError, one_line
from shared.files import read_json, read_object
from shared.outcome import Failure

log = logging.getLogger(__name__)


def supervise(argv: list[str], options: ProcessOptions, count: int) -> int:
    """Run this script in `count` processes on this host; the exit code of the whole run."""
    # slow to import; a signal that comes meanwhile ends this process, as before it
    from torch.distributed.elastic.multiprocessing.api import SignalException

    with tempfile.TemporaryDirectory(prefix="launch-") as notes:
        os.environ[outcome.NOTES] = notes
        os.environ[outcome.LAUNCHER_PID] = str(os.getpid())
        # without it, restarted processes meet the addresses of the dead ones (pytorch#135712)
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        stops = Stops(Path(notes), SignalException)
        try:
            agent_options = _agent_options(options, count, notes)
            stops.install()
            return _conclude(_run_agent(agent_options, argv), stops, Path(notes))
        except UserError as error:
            return outcome.report(Failure(0, error.exit_code, "user", one_line(error)), None)
        finally:
            stops.kill_workers()


class Stops:
    """The launcher's signals: the first lets the workers save and leave, the second kills them.

    Where no worker has anything to save, the first one ends all of them at once.
    """

    def __init__(self, notes: Path, leave: Callable[[str, signal.Signals], BaseException]) -> None:
        """leave: makes the exception by which the elastic agent stops its workers."""
        self.first: signal.Signals | None = None
        self._at = 0.0
        self._notes, self._leave = notes, leave

    def install(self) -> None:
        """Take these signals from now on; one that is ignored stays so."""
        for number in stop.SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup SIGHUP stays ignored
                signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.first is None:
            self.first, self._at = signal.Signals(number), time.monotonic()
            if not (self._notes / stop.HELD).exists():
                self._end_now()
            log.info("%s: saving and stopping; once more to end at once", self.first.name)
            raise self._leave(f"received {self.first.name}", self.first)
        if time.monotonic() - self._at > stop.SAME_REQUEST:
            log.warning("second signal: ending at once")
            self.kill_workers()

    def _end_now(self) -> NoReturn:
        """No worker has anything to save."""
        assert self.first is not None
        self.kill_workers()
        run_dir = read_json(self._notes / "run_dir.json")
        if isinstance(run_dir, str):
            outcome.announce(Path(run_dir))
        shutil.rmtree(self._notes, ignore_errors=True)
        stop.end_now(stop.exit_code_for(self.first), self.first.name)

    def kill_workers(self) -> None:
        """SIGKILL to every worker's process group that still lives."""
        for path in self._notes.glob("pid.*"):
            noted = read_object(path)
            if processes.is_same(noted):  # one that has ended may have left its number to another
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(noted["pid"], signal.SIGKILL)


def _agent_options(options: ProcessOptions, count: int, notes: str) -> list[str]:
    """Torchrun's flags for the agent."""
    flags = [
        f"--nproc-per-node={count}",
        f"--nnodes={options.nnodes}",
        f"--max-restarts={options.max_restarts}",
        f"--shutdown-timeout={options.shutdown_timeout}",
        "--signals-to-handle=SIGQUIT",  # the others are handled here
        "--monitor-interval=0.1",
        f"--log-dir={notes}",
    ]
    return flags + _meeting_point(options)


def _meeting_point(options: ProcessOptions) -> list[str]:
    """Where the hosts find each other; on one host a free port that no one else can have taken."""
    if options.rdzv_endpoint or options.nnodes == 1:
        return [
            f"--rdzv-endpoint={options.rdzv_endpoint or 'localhost:0'}",
            f"--rdzv-backend={options.rdzv_backend or 'c10d'}",
            f"--rdzv-id={options.rdzv_id or uuid.uuid4()}",
        ]
    if not options.master_addr:
        raise UserError(
            f"--nnodes {options.nnodes} needs a meeting point: --master-addr HOST of host 0 "
            "(and --master-port), or --rdzv-endpoint HOST:PORT"
        )
    return [
        f"--node-rank={options.node_rank}",
        f"--master-addr={options.master_addr}",
        f"--master-port={options.master_port or 29500}",
    ]


def _run_agent(agent_options: list[str], argv: list[str]) -> dict[int, int]:
    """Run to the end; the exit codes of the processes that failed, by rank ({} when none did)."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    for name in list(logging.root.manager.loggerDict):
        if name.startswith(
            ("torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launcher")
        ):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # we say what happened, once
    script = str(Path(sys.argv[0]).absolute())
    # our flags stay away from torchrun's parser: it takes some for abbreviations of its own
    config, interpreter, arguments = config_from_args(parse_args([*agent_options, script]))
    try:
        elastic_launch(config, interpreter)(*arguments, *argv)
    except SignalException:
        return {}
    except ChildFailedError as failed:
        return {rank: failure.exitcode for rank, failure in failed.failures.items()}
    return {}


def _conclude(exit_codes: dict[int, int], stops: Stops, notes: Path) -> int:
    """Turn the outcome into the closing line, the final status and the exit code."""
    written = read_json(notes / "run_dir.json")
    run_dir = Path(written) if isinstance(written, str) else None
    stopped = stops.first is not None or (
        bool(exit_codes) and all(code in (STOPPED, INTERRUPTED) for code in exit_codes.values())
    )
    if not exit_codes or stopped:
        return _close_well(run_dir, stops, max(exit_codes.values(), default=DONE))
    return outcome.report(first_failure(exit_codes, notes), run_dir)


def _close_well(run_dir: Path | None, stops: Stops, left_with: int) -> int:
    """The end of a run that nobody broke: done, or stopped and saved, or stopped too early to.

    left_with: the workers' exit code, which counts where host 0 alone can see the status.
    """
    status = read_json(run_dir / "status.json") if run_dir else None
    name = stops.first.name if stops.first else "a signal"
    if not isinstance(status, dict):
        if stops.first is None or run_dir:
            said = "as host 0 says" if run_dir else "every process has ended"
            outcome.closing_line(left_with, said)
            return left_with
        code = INTERRUPTED if stops.first is signal.SIGINT else STOPPED
        outcome.closing_line(code, f"{name} before a run began, or in a script that keeps none")
        return code
    if status.get("state") == "running":
        reason = (
            f"killed after {name} before the checkpoint was written; the last periodic one is whole"
        )
        return outcome.report(Failure(0, FAILED, "error", reason), run_dir)
    code = int(status.get("exit_code") or DONE)
    outcome.leave_page(run_dir)
    outcome.closing_line(code, str(status.get("reason")))
    return code


def first_failure(exit_codes: dict[int, int], notes: Path) -> Failure:
    """The failure that the others follow from: a killed process, else the earliest own error."""
    latest = max(
        (path.name.split(".")[1] for path in notes.glob("failure.*.json")), default="0", key=int
    )
    told = [Failure(**read_json(path)) for path in notes.glob(f"failure.{latest}.*.json")]
    own = [failure for failure in told if failure.kind in ("user", "error")]
    killed = {rank: -code for rank, code in exit_codes.items() if code < 0}
    if killed and not own:
        return _killed(killed)
    if own:
        first = min(own, key=lambda failure: failure.at)
        named = first.message if first.kind == "user" else f"rank {first.rank}: {first.message}"
        return replace(first, message=named)
    timeouts = [failure for failure in told if failure.kind == "timeout"]
    if timeouts:
        return _hung(timeouts, notes)
    if told:
        return min(told, key=lambda failure: failure.at)
    rank, code = min(exit_codes.items())
    return Failure(
        rank, code if code > 0 else FAILED, "error", f"rank {rank} left with code {code}"
    )


def _killed(killed: dict[int, int]) -> Failure:
    # SIGTERM is the agent's, to those that were still loading when another was killed
    rank, number = min(killed.items(), key=lambda item: (item[1] == signal.SIGTERM, item[0]))
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    why = " (by the kernel when RAM ran out, or by someone)" if number == signal.SIGKILL else ""
    return Failure(rank, FAILED, "error", f"rank {rank} was killed by {name}{why}")


def _hung(timeouts: list[Failure], notes: Path) -> Failure:
    """The rank that did not answer: the one, or one of those, that did not itself time out."""
    waited = sorted(failure.rank for failure in timeouts)
    ranks = sorted(int(path.name.partition(".")[2]) for path in notes.glob("pid.*"))
    silent = [rank for rank in ranks if rank not in waited] or ["another host"]
    first = min(timeouts, key=lambda failure: failure.at)
    names = ", ".join(str(rank) for rank in silent)
    message = f"rank {names} did not answer within --timeout (rank {first.rank}: {first.message})"
    return Failure(first.rank, FAILED, "timeout", message, first.traceback)
