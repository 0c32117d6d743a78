import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shared import launch, logs, outcome, supervisor
from shared.errors import MissingToolError, UserError
from tests.harness import run_here

PROBE = Path(__file__).resolve().parents[1] / "faults" / "probe_recipe.py"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, no variables of a launcher, and pytest's own logging left alone."""
    monkeypatch.setattr(launch, "present_gpus", lambda: 0)
    monkeypatch.setattr(logs, "setup", lambda rank=0: None)
    monkeypatch.setattr(logs, "open_streams", lambda: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "NPROC_PER_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """How many processes a command line starts, on a host of so many GPUs; 0 when it is refused."""
    started: list[int] = []
    monkeypatch.setattr(launch, "_alone", lambda *_: started.append(1) or 0)
    monkeypatch.setattr(launch, "_together", lambda _m, _a, _o, n: started.append(n) or 0)

    def count(line: str, gpus: int = 0, fit: launch.Fit | None = None) -> int:
        monkeypatch.setattr(launch, "present_gpus", lambda: gpus)
        monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
        started.clear()
        code = launch.launch(lambda _: 0, fit)
        assert code == (0 if started else 2)
        return started[0] if started else 0

    return count


# how many processes


@pytest.mark.parametrize(
    ("line", "gpus", "expected"),
    [
        ("", 0, 1),
        ("", 4, 4),
        ("--device cpu", 4, 1),
        ("--device cuda:1", 4, 1),
        ("--nproc 2", 0, 2),
        ("--nproc_per_node=3", 4, 3),
        ("--nproc 2 --device cpu", 1, 2),
        ("--epochs 3 --nproc 2 --unknown x", 0, 2),
        ("--nnodes 2 --node-rank 1 --nproc 2", 0, 2),
    ],
)
def test_processes_come_from_flags_and_gpus(processes, line, gpus, expected):
    assert processes(line, gpus) == expected


@pytest.mark.parametrize(
    ("line", "gpus", "words"),
    [
        ("--nproc 5", 4, ["--nproc 5", "4 GPU(s)", "1 to 4", "--device cpu"]),
        ("--nproc 100000", 0, ["--nproc 100000", "no GPU", "allowed: 1 to"]),
        ("--rdzv-endpoint host:0", 0, ["port of rdzv_endpoint", "1 to 65,535", "got 0"]),
        ("--nnodes 2 --node-rank 2", 0, ["--node-rank 2", "--nnodes 2", "from 0"]),
    ],
)
def test_a_number_that_cannot_be_is_refused_before_anything_starts(
    processes, capsys, line, gpus, words
):
    assert processes(line, gpus) == 0
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(word in message for word in words), message


def test_hidden_gpus_are_not_counted_and_a_mask_that_names_none_is_refused(
    processes, monkeypatch, capsys
):
    for mask, expected in (("0,2", 2), ("", 1), ("7", 0)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
        assert processes("", gpus=4) == expected
    assert "CUDA_VISIBLE_DEVICES=7" in capsys.readouterr().err
    assert processes("--device cpu", gpus=4) == 1


def test_a_variable_and_a_settings_file_count_unless_a_flag_is_typed(
    processes, monkeypatch, tmp_path
):
    (tmp_path / "a.yaml").write_text("nproc: 2\ndevice: cpu\nepochs: 3\n")
    assert processes(f"--config {tmp_path}/a.yaml", gpus=4) == 2
    assert processes(f"--config {tmp_path}/a.yaml --nproc 3", gpus=4) == 3
    monkeypatch.setenv("NPROC_PER_NODE", "3")
    assert processes("", gpus=4) == 3
    assert processes("--nproc 2", gpus=4) == 2


def test_the_recipe_may_use_fewer_gpus_than_there_are_unless_a_number_is_typed(processes):
    assert processes("", gpus=4, fit=lambda argv, visible: visible - 1) == 3
    assert processes("--nproc 4", gpus=4, fit=lambda argv, visible: 1) == 4
    assert processes("", gpus=1, fit=lambda argv, visible: 0) == 1


# several processes: the input is checked once, here


@pytest.fixture
def supervised(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that were handed over to the supervisor."""
    handed: list[list[str]] = []
    monkeypatch.setattr(supervisor, "supervise", lambda argv, *_: handed.append(argv) or 0)
    return handed


def test_the_input_is_checked_dry_before_processes_start(supervised, monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["train.py", "--nproc", "2", "--epochs", "3"])
    assert launch.launch(lambda argv: seen.append(argv) or 0) == 0
    assert seen == [["--nproc", "2", "--epochs", "3", "--dry-run"]]
    assert supervised == [["--nproc", "2", "--epochs", "3"]]


@pytest.mark.parametrize("flag", ["--help", "-h", "--dry_run", "--print-config"])
def test_what_trains_nothing_runs_once_and_starts_no_process(supervised, monkeypatch, flag):
    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["train.py", "--nproc", "2", flag])
    assert launch.launch(lambda argv: seen.append(argv) or 0) == 0
    assert len(seen) == 1
    assert supervised == []


# how a process ended


def left_with(code: object) -> int:
    sys.exit(code)  # type: ignore[arg-type]


@pytest.mark.parametrize("code", [0, 1, 143])
def test_what_main_returns_or_leaves_with_is_the_code(code: int) -> None:
    assert run_here(lambda _: code, []).code == code
    assert run_here(lambda _: left_with(code), []).code == code
    assert run_here(lambda _: left_with(None), []).code == 0


def test_leaving_with_words_fails_and_says_them(caplog: pytest.LogCaptureFixture) -> None:
    assert run_here(lambda _: left_with("the words"), []).code == 1
    assert "the words" in caplog.text


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (UserError("x"), 2, "user"),
        (MissingToolError("x"), 3, "user"),
        (KeyboardInterrupt(), 130, "user"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 3, "user"),
        (ValueError("broken"), 1, "error"),
        (RuntimeError("Timed out waiting 5000ms for recv operation to complete"), 1, "timeout"),
        (RuntimeError("[pair.cc:545] Read error [127.0.0.1]: Connection reset"), 1, "peer_lost"),
        (RuntimeError("ncclRemoteError: remote process exited or there was"), 1, "peer_lost"),
    ],
)
def test_failures_are_told_apart(error: BaseException, code: int, kind: str) -> None:
    failure = outcome.failure_of(error, rank=1)
    assert (failure.rank, failure.code, failure.kind) == (1, code, kind)
    assert bool(failure.traceback) == (kind != "user")
    assert "\n" not in failure.message


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("peft", ["Python package peft is not installed", "setup.sh"]),
        (
            "face_distill.FaceDataset",
            [
                "face_distill/FaceDataset.py is missing in ",
                "git checkout -- face_distill/FaceDataset.py",
            ],
        ),
    ],
)
def test_a_missing_package_or_file_is_named_with_the_way_out(module: str, said: list[str]) -> None:
    error = ModuleNotFoundError(f"No module named '{module}'", name=module)
    message = outcome.failure_of(error).message
    assert all(words in message for words in said)


# which of several failures came first


def leave_word(
    notes: Path, rank: int, kind: str, message: str, at: float, restart: int = 0
) -> None:
    words = {"rank": rank, "code": 2 if kind == "user" else 1, "kind": kind, "message": message}
    (notes / f"failure.{restart}.{rank}.json").write_text(json.dumps(words | {"at": at}))


def test_the_earliest_own_error_is_the_cause_and_lost_peers_are_not(tmp_path: Path) -> None:
    leave_word(tmp_path, 0, "peer_lost", "RuntimeError: Connection closed by peer", at=1.0)
    leave_word(tmp_path, 1, "error", "ValueError: broken", at=3.0)
    leave_word(tmp_path, 2, "error", "ValueError: later", at=4.0)
    first = supervisor.first_failure({0: 1, 1: 1, 2: 1}, tmp_path)
    assert (first.rank, first.message) == (1, "rank 1: ValueError: broken")


def test_a_mistake_of_the_user_keeps_its_code_and_its_words(tmp_path: Path) -> None:
    leave_word(tmp_path, 0, "user", "--data /x is not there", at=1.0)
    first = supervisor.first_failure({0: 2, 1: 2}, tmp_path)
    assert (first.code, first.message) == (2, "--data /x is not there")


def test_failures_of_an_earlier_start_are_forgotten(tmp_path: Path) -> None:
    leave_word(tmp_path, 0, "error", "ValueError: first start", at=1.0, restart=0)
    leave_word(tmp_path, 1, "error", "ValueError: second start", at=9.0, restart=1)
    assert "second start" in supervisor.first_failure({1: 1}, tmp_path).message


# speed of what needs no torch


def test_a_script_for_one_process_runs_once_whoever_asks_for_more(monkeypatch):
    called: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", ["embed.py", "--batch_size", "4"])
    monkeypatch.setitem(os.environ, "NPROC_PER_NODE", "4")
    monkeypatch.setattr(launch, "present_gpus", lambda: 4)
    assert launch.launch_alone(lambda argv: called.append(argv) or 3) == 3
    assert called == [["--batch-size", "4"]]
    monkeypatch.setitem(os.environ, "RANK", "1")
    assert launch.launch_alone(lambda argv: called.append(argv) or 3) == 0
    assert len(called) == 1
