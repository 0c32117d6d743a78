"""Runs of an entry script seen from outside: its files, its exit code, the processes it leaves.

    with start([PROBE, "--nproc", 2, "--run-dir", run_dir]) as running:
        wait_for_step(run_dir, 11, running)
        running.signal(signal.SIGTERM)
        outcome = running.finish()

Every wait has a bound, and leaving the `with` block kills whatever the run has left.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, cast
from unittest import mock

import torch

from shared import checkpoint, outcome, stop
from shared.launch import launch

ROOT = Path(__file__).resolve().parents[1]
PROBE = ROOT / "tests" / "faults" / "probe_recipe.py"
PATIENCE = 120.0  # seconds: a wait that takes longer is a failure

_TOKEN = "TOOLKIT_TEST_TOKEN"  # in the environment of a run and of all its processes
_POLL = 0.02
# what decides about processes, devices or text in the shell that started the tests
_NOT_INHERITED = ("RANK", "WORLD_SIZE", "NPROC_PER_NODE", "CUDA_VISIBLE_DEVICES", "PYTHONUTF8")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code and everything it wrote to stdout and stderr."""

    code: int
    text: str

    @property
    def last_line(self) -> str:
        """The last line that is not blank."""
        return next((line for line in reversed(self.text.splitlines()) if line.strip()), "")


class Running:
    """A process in a session of its own; its output goes to the file `log`."""

    def __init__(self, command: list[str], environ: dict[str, str], **options: Any) -> None:
        self.token = environ[_TOKEN]
        self._seen: set[int] = set()
        self._scratch = Path(tempfile.mkdtemp(prefix="running-"))
        self.log = self._scratch / "log"
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True} | options
        with self.log.open("wb") as log:
            streams = {"stdout": log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, env=environ, **cast(Any, streams | options))

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(f"the run wrote:\n{self.text[-4000:]}")
        self.kill()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @property
    def pid(self) -> int:
        """The process that was started: the launcher, or the only process of the run."""
        return self.process.pid

    @property
    def text(self) -> str:
        """What the run wrote so far."""
        return self.log.read_text(encoding="utf-8", errors="backslashreplace")

    @property
    def processes(self) -> list[int]:
        """The run's live processes; one that is dying, and holds its locks still, is among them."""
        found = processes_of(self.token)
        self._seen = {pid for pid in self._seen if is_alive(pid)} | set(found)
        return sorted(self._seen)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process that was started, or to its process group."""
        _ = self.processes  # a dying process no longer shows whose it was
        (os.killpg if group else os.kill)(self.pid, number)

    def wait_for_text(self, text: str, timeout: float = PATIENCE) -> None:
        """Wait until the run has written `text`."""
        wait_until(lambda: text in self.text, f"the line {text!r}", timeout, self)

    def finish(self, timeout: float = PATIENCE) -> Outcome:
        """Wait for the end; AssertionError when it takes longer than `timeout` seconds."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {timeout} s: {' '.join(map(str, self.process.args))}"  # type: ignore[arg-type]
            ) from None
        return Outcome(code, self.text)

    def leaves_nothing(self, timeout: float = 10.0) -> bool:
        """Whether every process of the run is gone within `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self.processes and time.monotonic() < deadline:
            time.sleep(_POLL)
        return not self.processes

    def kill(self) -> None:
        """End every process of the run at once."""
        while left := [self.pid] * (self.process.poll() is None) + self.processes:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()


def start(
    args: Sequence[object], *, program: Sequence[object] | None = None, **env: str
) -> Running:
    """A run of `python args…`, or of `program args…`; `env` is added to a clean environment."""
    command = [str(word) for word in [*(program or [sys.executable]), *args]]
    return Running(command, environment(**env))


def run_to_end(
    args: Sequence[object], *, program: Sequence[object] | None = None, **env: str
) -> Outcome:
    """How a run ended that is left alone; AssertionError when it leaves a process."""
    with start(args, program=program, **env) as running:
        outcome = running.finish()
        assert running.leaves_nothing()
    return outcome


def shell_script(directory: Path, entry: Path) -> Path:
    """A shell script around an entry script, as recipes have them; it logs to `directory`/logs."""
    path = directory / "script.sh"
    path.write_text(
        f'#!/usr/bin/env bash\nsource "{ROOT}/shared/shell/common.sh"\n'
        f'PYTHON_FOUND="{sys.executable}"\nstart_log "{directory}/logs" script\n'
        f'run_python "{entry}" "$@"\n'
    )
    return path


_PACED = """
import json, pathlib, runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
first, seconds, path = int(sys.argv[1]), float(sys.argv[2]), pathlib.Path(sys.argv[3])
def slowly(*_):
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    time.sleep(seconds if any(row.get("step", 0) >= first for row in rows) else 0)
register_optimizer_step_post_hook(slowly)
del sys.argv[:4]
sys.path[0] = str(pathlib.Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def paced(script: Path, run_dir: Path, step: int, seconds: float = 0.5) -> list[object]:
    """What to start in place of `script` to meet it at `step`: from there on it takes its time.

    run_dir: where its metrics.jsonl tells the step. What it computes stays the same.
    """
    return ["-c", _PACED, step, seconds, run_dir / "metrics.jsonl", script]


def environment(**changes: str) -> dict[str, str]:
    """The environment for a run: this one without what steers runs, with a new token.

    The probe leaves report.html only with PROBE_HURRIES="".
    """
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    ours = {"OMP_NUM_THREADS": "1", "TOOLKIT_NO_WORD": "1", _TOKEN: uuid.uuid4().hex}
    return kept | ours | {"PROBE_HURRIES": "1"} | changes


def run_here(
    main: Callable[[list[str]], int], args: Sequence[object], *, with_page: bool = False
) -> Outcome:
    """`launch(main)` with `args` inside this process, as quick as an entry script can be tried.

    with_page: leave report.html at the end, which takes longer than a small run itself.
    """
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    leave_page = outcome.leave_page if with_page else lambda run_dir: None
    with (
        mock.patch.object(sys, "argv", [str(PROBE), *map(str, args)]),
        mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),
        mock.patch.object(outcome, "leave_page", leave_page),
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        try:
            code = launch(main)
        finally:
            root.handlers[:], root.level = handlers, level
            stop.release()  # a process of its own ends here
    stream.flush()
    return Outcome(code, cast(io.BytesIO, stream.buffer).getvalue().decode())


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def processes_of(token: str) -> list[int]:
    """The live processes that carry `token` in their environment (zombies carry none)."""
    mark, found = f"{_TOKEN}={token}".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return sorted(found)


def children_of(pid: int) -> list[int]:
    """The processes that `pid` has started and that are still its own."""
    with contextlib.suppress(OSError):
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def ranks_of(running: Running) -> dict[int, int]:
    """{rank: pid} of a run with several processes: the launcher's own children, by their RANK."""
    found = {}
    for pid in children_of(running.pid):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(word[5:]): pid for word in words if word.startswith(b"RANK=")}
    return found


def run_ranks(program: str, size: int, *words: object) -> None:
    """`python program RANK words…` once for each rank, side by side; all of them end well."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen([sys.executable, program, str(r), *map(str, words)], env=os.environ | own)
        for r in range(size)
    ]
    try:
        assert [rank.wait(timeout=110) for rank in ranks] == [0] * size
    finally:
        for rank in ranks:
            rank.kill()


def finished(outcome: subprocess.CompletedProcess[str]) -> str:
    """What a command wrote that ended well; AssertionError, with the end of it, otherwise."""
    said = outcome.stdout + outcome.stderr
    assert outcome.returncode == 0, f"{outcome.args[-1]}\n{said[-4000:]}"
    return said


def wait_until(
    condition: Callable[[], Any],
    what: str,
    timeout: float = PATIENCE,
    running: Running | None = None,
) -> None:
    """Poll until `condition()`; AssertionError after `timeout` seconds, or when `running` ended."""
    deadline = time.monotonic() + timeout
    while not condition():
        if running is not None and running.process.poll() is not None and not condition():
            raise AssertionError(f"the run ended ({running.process.returncode}) before {what}")
        if time.monotonic() > deadline:
            raise AssertionError(f"{timeout} s without {what}")
        time.sleep(_POLL)


def wait_for_step(
    run_dir: Path,
    step: int,
    running: Running | None = None,
    timeout: float = PATIENCE,
    key: str = "loss",
) -> None:
    """Wait until metrics.jsonl has reached `step`; `key` as for `losses`."""
    reached = lambda: max(losses(run_dir, key), default=0) >= step  # noqa: E731
    wait_until(reached, f"step {step} in {run_dir}", timeout, running)


def losses(run_dir: Path, key: str = "loss") -> dict[int, float]:
    """{step: training loss, named `key`} of metrics.jsonl; AssertionError for a step twice."""
    rows = [row for row in json_lines(run_dir / "metrics.jsonl") if row.get("split") == "train"]
    found = {row["step"]: row[key] for row in rows}
    assert len(found) == len(rows), f"steps twice in {run_dir}: {[row['step'] for row in rows]}"
    return found


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file that may be being written: a last line without its end is no row yet."""
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content.rpartition(b"\n")[0].splitlines()]


def status_of(run_dir: Path) -> dict[str, Any]:
    """status.json, which is replaced in one step; {} before there is one."""
    try:
        return json.loads((run_dir / "status.json").read_bytes())
    except FileNotFoundError:
        return {}


def free_port() -> int:
    """A TCP port of the loopback that nobody holds, and that no connection is given by chance."""
    while True:
        port = random.SystemRandom().randrange(15_000, 32_000)  # below what the kernel gives out
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def moments(number: int, longest: float, seed: int = 0) -> Iterator[float]:
    """Seeded random waits of up to `longest` seconds."""
    generator = random.Random(seed)
    for _ in range(number):
        yield generator.uniform(0.0, longest)


@dataclass(frozen=True)
class KilledSaves:
    """What saves that were killed left behind. half_written: kills that left a temporary file."""

    kills: int
    loadable: int
    half_written: int


def killed_saves(directory: Path, kills: int, megabytes: int, seed: int) -> KilledSaves:
    """Kill a process that saves one checkpoint after another, `kills` times, at random moments."""
    last, loadable, half_written = directory / "last.pt", 0, 0
    for moment in moments(kills, 0.35, seed):
        last.unlink(missing_ok=True)
        saver = multiprocessing.get_context("fork").Process(
            target=_save_again_and_again, args=(last, megabytes)
        )
        saver.start()
        wait_until(last.exists, "the first checkpoint")
        time.sleep(moment)  # the moment of the kill is the experiment
        saver.kill()
        saver.join()
        temporaries = list(directory.glob("*.tmp.*"))
        half_written += bool(temporaries)
        for path in temporaries:
            path.unlink()
        assert zipfile.ZipFile(last).testzip() is None  # every byte
        state = torch.load(last)
        loadable += state["parts"]["model"].numel() == megabytes * 250_000
    return KilledSaves(kills, loadable, half_written)


def _save_again_and_again(last: Path, megabytes: int) -> None:
    state = {"parts": {"model": torch.randn(megabytes * 250_000)}, "position": {"step": 0}}
    while True:
        state["position"]["step"] += 1
        checkpoint.save(last, state)
