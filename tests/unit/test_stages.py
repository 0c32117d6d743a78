import logging
import signal
import sys
from pathlib import Path

import pytest

from shared.config import parse
from shared.errors import MissingToolError, UserError
from shared.stages import Stage, StageOptions, run_stages
from tests.harness import ROOT, start

ALL = StageOptions()


class Chain:
    """Three stages that note when they run and end with the codes in `codes`."""

    def __init__(self, base: Path) -> None:
        self.state, self.ran = base / "state", list[str]()
        self.codes: dict[str, int] = {}
        self.inputs: dict[str, dict[str, object]] = {}
        self.outputs = {name: (base / f"{name}.out",) for name in "abc"}
        self.optional, self.checks = set[str](), set[str]()

    def stage(self, name: str) -> Stage:
        def run() -> int:
            self.ran.append(name)
            for path in self.outputs[name]:
                path.write_text(name)
            return self.codes.get(name, 0)

        inputs = self.inputs.get(name, {})
        flags = (name in self.optional, name in self.checks)
        return Stage(name, run, inputs, self.outputs[name], *flags)

    def __call__(self, options: StageOptions = ALL) -> tuple[int, str]:
        """The exit code of one call, and the stages that ran in it."""
        self.ran.clear()
        code = run_stages([self.stage(name) for name in "abc"], options, self.state)
        return code, "".join(self.ran)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path)


def table(text: str) -> dict[str, list[str]]:
    """{stage: the rest of its row} of the table in the log."""
    rows = text[text.rindex("stage  ") :].splitlines()[2:]
    return {row.split()[0]: row.split()[1:] for row in rows if row[:1] in "abc"}


def test_the_first_failure_ends_the_chain_and_the_next_call_continues_there(chain, caplog):
    caplog.set_level(logging.INFO)
    chain.codes["b"] = 7
    assert chain() == (7, "ab")
    rows = table(caplog.text)
    assert (rows["a"][0], rows["b"][0], rows["c"]) == ("done", "failed", ["not", "run", "-", "-"])
    assert (rows["a"][-1], rows["b"][-1]) == ("0", "7")
    assert "failed: stage b; the same command continues there (exit 7)" in caplog.text
    chain.codes.clear()
    caplog.clear()
    assert chain() == (0, "bc")
    assert "stage a: already done" in caplog.text
    assert table(caplog.text)["a"][:2] == ["already", "done"]


def test_a_changed_input_runs_its_stage_and_all_after_it_and_says_what_changed(
    chain, caplog, tmp_path
):
    caplog.set_level(logging.INFO)
    weights = tmp_path / "weights"
    weights.write_text("one")
    chain.inputs = {"b": {"lr": 1, "weights": weights}}
    chain()
    assert chain() == (0, "")
    chain.inputs["b"]["lr"] = 2
    assert chain() == (0, "bc")
    assert "stage b: runs again: lr: 1 → 2" in caplog.text
    weights.write_text("other")
    assert chain() == (0, "bc")
    assert "bytes → " in caplog.text
    assert chain() == (0, "")


def test_a_check_runs_every_time_and_leaves_the_others_done(chain):
    chain.checks = {"a"}
    assert chain() == (0, "abc")
    assert chain() == (0, "a")


def test_a_missing_output_and_a_torn_marker_run_their_stage_again(chain, caplog):
    caplog.set_level(logging.INFO)
    chain()
    chain.outputs["c"][0].unlink()
    assert chain() == (0, "c")
    assert "c.out is missing" in caplog.text
    (chain.state / "b.json").write_text('{"inp')
    assert chain() == (0, "bc")


def test_what_a_broken_chain_has_not_done_anew_runs_in_the_next_call(chain):
    chain()
    chain.codes["c"] = 1
    assert chain(StageOptions(only="b")) == (0, "b")
    assert chain() == (1, "c")
    chain.codes["b"] = 4  # what failed has no marker of before
    assert chain(StageOptions(from_stage="b")) == (4, "b")
    chain.codes.clear()
    assert chain() == (0, "bc")


def test_a_stage_that_leaves_no_output_has_failed(chain, tmp_path):
    stage = Stage("a", lambda: 0, outputs=(tmp_path / "nothing",))
    assert run_stages([stage], ALL, chain.state) == 1
    assert not (chain.state / "a.json").exists()


@pytest.mark.parametrize(
    ("line", "ran"), [("--from b", "bc"), ("--only b", "b"), ("--force", "abc"), ("", "")]
)
def test_the_flags_choose_the_stages(chain, line, ran):
    chain()
    assert chain(parse(StageOptions, line.split())) == (0, ran)


@pytest.mark.parametrize("flag", ["--from", "--only"])
def test_an_unknown_stage_is_refused_with_the_nearest(chain, tmp_path, flag):
    stages = [Stage("train", lambda: 0), Stage("evaluate", lambda: 0)]
    with pytest.raises(UserError, match=f"{flag} trian.*did you mean train.*train, evaluate"):
        run_stages(stages, parse(StageOptions, [flag, "trian"]), chain.state)
    assert not chain.state.exists()
    with pytest.raises(UserError, match="exclude each other"):
        run_stages(stages, parse(StageOptions, ["--from", "train", "--only", "train"]), tmp_path)


def test_an_optional_failure_lets_the_later_stages_run_and_keeps_its_code(chain, caplog):
    caplog.set_level(logging.INFO)
    chain.optional, chain.codes = {"a"}, {"a": 3}
    assert chain() == (3, "abc")
    assert table(caplog.text)["a"][0] == "failed"
    assert "stage a; the same command" in caplog.text
    chain.codes = {"a": 3, "c": 4}  # c has its marker: what failed changed nothing
    assert chain() == (3, "a")
    chain.outputs["c"][0].unlink()
    assert chain() == (4, "ac")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("no such thing"), 2, "error: no such thing"),
        (MissingToolError("no tool"), 3, "error: no tool"),
        (ValueError("broken"), 1, "ValueError: broken"),
    ],
)
def test_what_a_stage_raises_becomes_its_code(chain, capsys, error, code, said):
    def run() -> int:
        raise error

    assert run_stages([Stage("a", run)], ALL, chain.state) == code
    assert said in capsys.readouterr().err


def test_a_chain_that_runs_is_not_started_a_second_time(chain):
    def inner() -> int:
        with pytest.raises(UserError, match="in use by a live run"):
            run_stages([Stage("b", lambda: 0)], ALL, chain.state)
        return 0

    assert run_stages([Stage("a", inner)], ALL, chain.state) == 0


def test_a_command_is_one_of_its_inputs(tmp_path, capfd):
    def run(text: str) -> int:
        return run_stages([Stage("a", [sys.executable, "-c", text])], ALL, tmp_path)

    assert run("print('it' 's', 1)") == 0
    assert "its 1" in capfd.readouterr().out
    assert run("print('it' 's', 1)") == 0
    assert "its" not in capfd.readouterr().out
    assert run("import sys; sys.exit(9)") == 9


def test_a_function_may_give_the_words_of_a_program_and_one_that_is_not_there_is_code_3(
    tmp_path, capfd
):
    words = [sys.executable, "-c", "print('ra' 'n'); raise SystemExit(4)"]
    assert run_stages([Stage("a", lambda: words)], ALL, tmp_path) == 4
    assert "ran" in capfd.readouterr().out
    assert run_stages([Stage("a", ["/no/such/program"])], ALL, tmp_path) == 3
    assert "/no/such/program does not start" in capfd.readouterr().err


CHAIN = """
import logging, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from shared.stages import Stage, StageOptions, run_stages
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
def wait():
    print("at work", flush=True)
    time.sleep(0.5)
    return 0
second = {
    "function": lambda: Stage("b", wait),
    "command": lambda: Stage("b", [sys.executable, "-c", sys.argv[4]]),
}[sys.argv[3]]()
stages = [Stage("a", lambda: 0), second, Stage("c", lambda: print("c ran") or 0)]
sys.exit(run_stages(stages, StageOptions(), Path(sys.argv[2])))
"""
SAVES = """
import signal, sys, time
def leave(number, _):
    print("saved", flush=True); sys.exit({code})
signal.signal(signal.SIGTERM, leave); signal.signal(signal.SIGINT, leave)
print("at work", flush=True); time.sleep(60)
"""


@pytest.mark.serial
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_lets_the_command_save_and_ends_the_chain(tmp_path, number, code):
    with start(
        ["-c", CHAIN, ROOT, tmp_path, "command", SAVES.format(code="128 + number")]
    ) as running:
        running.wait_for_text("\nat work")
        running.signal(number, group=True)
        outcome = running.finish()
    assert outcome.code == code
    assert "saved" in outcome.text
    assert "c ran" not in outcome.text
    rows = table(outcome.text)
    assert (rows["a"][0], rows["b"][0], rows["b"][-1]) == ("done", "stopped", str(code))
    assert not (tmp_path / "b.json").exists()


@pytest.mark.serial
@pytest.mark.parametrize("kind", ["command", "function"])
def test_a_stage_that_is_done_in_spite_of_the_stop_counts_as_done(tmp_path, kind):
    with start(["-c", CHAIN, ROOT, tmp_path, kind, SAVES.format(code=0)]) as running:
        running.wait_for_text("\nat work")
        running.signal(signal.SIGTERM)
        outcome = running.finish()
    assert outcome.code == 143
    assert "c ran" not in outcome.text
    assert table(outcome.text)["b"][0] == "done"
    assert (tmp_path / "b.json").exists()
