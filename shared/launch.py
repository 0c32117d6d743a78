"""One authority for processes: `sys.exit(launch(main))` at the end of every entry script.

`launch` runs `main` in this process when one is enough, else once in every process of torchrun's
elastic agent (shared/supervisor.py), which runs inside this process. It never execs, and `main`
never launches. Exit codes: 0 done, 1 failed, 2 the user's input, 3 a tool or manual step is
missing, 130 interrupted and saved, 143 stopped and saved. Standard library only.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from shared import launched, logs, outcome, processes, stop
from shared.config import ProcessOptions, dashed, option, parse_known
from shared.device import check_mask, present_gpus, visible_gpus
from shared.errors import (
    DONE,
    FAILED,
    UserError,
    one_line,
)
from shared.files import write_json
from shared.outcome import Failure
from shared.processes import die_with_parent
from shared.settings import COUNTS, PROCESSES, number

log = logging.getLogger(__name__)

Main = Callable[[list[str]], int]
Fit = Callable[[list[str], int], int]

_WITHOUT_TRAINING = ("-h", "--help", "--dry-run", "--print-config", "--estimate", "--prove")


@dataclass(frozen=True)
class _Flags:
    """What the launcher reads of a command line."""

    device: str = option("auto", "")
    config: Path | None = option(None, "")
    processes: ProcessOptions = field(default_factory=ProcessOptions)


_planned_world_size = 1


def launch(main: Main, fit: Fit | None = None) -> int:
    """The exit code of `main(argv)`, run in as many processes as flags, variables and GPUs ask for.

    fit: given argv and the number of visible GPUs, how many of them can be used (asked only when
    the user typed no number).
    """
    stop.listen()
    stop.launched()
    logs.open_streams()
    argv = dashed(sys.argv[1:])
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _work(main, argv)
    logs.setup()
    if any(flag in argv for flag in _WITHOUT_TRAINING) or "TOOLKIT_NO_WORD" in os.environ:
        return _start(main, argv, fit)
    word = launched.begin(Path(sys.argv[0]), outcome.log_file())
    if word:
        os.environ[outcome.WORD] = str(word)
    code = _start(main, argv, fit)
    launched.end(word, code, outcome.last_words)
    return code


def _start(main: Main, argv: list[str], fit: Fit | None) -> int:
    """Run `main` in as many processes as are asked for; the exit code."""
    try:
        flags = parse_known(_Flags, argv)
        count = _count_processes(flags, argv, fit)
    except UserError as error:
        return outcome.report(Failure(0, error.exit_code, "user", one_line(error)), None)
    _settle_for_cpu()
    if count * flags.processes.nnodes == 1 and flags.processes.max_restarts == 0:
        return _alone(main, argv)
    return _together(main, argv, flags.processes, count)


def launch_alone(main: Main) -> int:
    """The exit code of `main(argv)` for a script that needs one process, whoever asks for more.

    Of torchrun's processes the first one runs it; the others have nothing to do.
    """
    stop.listen()
    stop.launched()
    logs.open_streams()
    if os.environ.get("RANK", "0") != "0":
        return DONE
    logs.setup()
    _settle_for_cpu()
    return _alone(main, dashed(sys.argv[1:]))


def world_size() -> int:
    """How many processes this run has or, before they start, will have."""
    return int(os.environ.get("WORLD_SIZE", _planned_world_size))


def _count_processes(flags: _Flags, argv: list[str], fit: Fit | None) -> int:
    """Processes on this host, checked against what is there. Raises UserError."""
    if any(flag in argv for flag in ("-h", "--help")):
        return 1
    present = present_gpus()
    visible = 0 if flags.device == "cpu" else visible_gpus(os.environ, present)
    if flags.device != "cpu":
        check_mask(os.environ, present)
    if flags.processes.node_rank >= flags.processes.nnodes:
        raise UserError(
            f"--node-rank {flags.processes.node_rank} of --nnodes {flags.processes.nnodes}: hosts "
            "are numbered from 0 to nnodes - 1"
        )
    typed = flags.processes.nproc
    variable = os.environ.get("NPROC_PER_NODE")
    if typed is None and variable:
        typed = number("NPROC_PER_NODE", variable, int, COUNTS)
    if typed is not None:
        limit = visible or PROCESSES.high
        if typed > limit:
            have = f"{visible} GPU(s) are visible" if visible else "no GPU is visible"
            raise UserError(f"--nproc {typed}: {have}; allowed: 1 to {limit}, or --device cpu")
        return typed
    if visible < 2 or ":" in flags.device:
        return 1
    return fit(argv, visible) if fit else visible


def _settle_for_cpu() -> None:
    """Defaults for a machine without a GPU; what the user set stays."""
    if present_gpus() == 0:
        # several OpenMP threads a process were measured slower than one: they spin
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # transformers imports deepspeed where it is installed, which else warns on every start
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _alone(main: Main, argv: list[str]) -> int:
    outcome.forget()
    result = _guard(main, argv, rank=0)
    if isinstance(result, Failure):
        return outcome.report(result, outcome.run_dir())
    outcome.close_with_status(result)
    return result


def _together(main: Main, argv: list[str], options: ProcessOptions, count: int) -> int:
    """Check the input once, quickly, here; then hand over to the supervisor."""
    global _planned_world_size
    dry_argv = argv if "--dry-run" in argv else [*argv, "--dry-run"]
    asked = any(flag in argv for flag in _WITHOUT_TRAINING)
    logging.disable(logging.NOTSET if asked else logging.WARNING)  # the run says these itself
    _planned_world_size = count * options.nnodes
    checked = _guard(main, argv if asked else dry_argv, rank=0)
    _planned_world_size = 1
    logging.disable(logging.NOTSET)
    if isinstance(checked, Failure):
        return outcome.report(checked, None)
    if asked or checked != DONE:
        return checked
    from shared.supervisor import supervise

    return supervise(argv, options, count)


def _work(main: Main, argv: list[str]) -> NoReturn:
    """One process of several: `main`, and word of how it ended for the process that started it."""
    rank = int(os.environ["RANK"])
    ours = outcome.NOTES in os.environ
    launcher = os.environ.get(outcome.LAUNCHER_PID)
    die_with_parent(int(launcher) if launcher else None)  # by SIGTERM: save and leave
    logs.setup(rank)
    _settle_for_cpu()
    if ours:
        pid_file = Path(os.environ[outcome.NOTES]) / f"pid.{rank}"
        write_json(pid_file, processes.describe(os.getpid()), durable=False)
    result = _guard(main, argv, rank)
    if not isinstance(result, Failure):
        if not ours and rank == 0:
            outcome.close_with_status(result)
        _leave(result)
    outcome.leave_word(result)
    if not ours and (rank == 0 or result.kind != "user"):
        outcome.report(result, outcome.run_dir())
    _leave(result.code)


def _leave(code: int) -> NoReturn:
    """End a process of several at once.

    No destructor may wait here for processes that are gone, and torch's threads, which the usual
    way out meets half alive, have ended finished runs with "terminate called".
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _guard(main: Main, argv: list[str], rank: int) -> int | Failure:
    """What `main` returns, or how it failed."""
    try:
        return main(argv)
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or DONE
        return Failure(rank, FAILED, "error", str(left.code), at=time.time())
    except BaseException as error:
        return outcome.failure_of(error, rank)
