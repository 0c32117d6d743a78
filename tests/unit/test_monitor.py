import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shared import processes, run_text
from shared.run_status import View
from shared.tools import monitor
from tests.unit.test_run_status import log, train, write

MONITOR = monitor.ROOT / "shared" / "tools" / "monitor.py"


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A repository with two runs of lavic and one of arcface, which is the newest."""
    write(tmp_path / "lavic/src/out_distilled", state="done", exit_code=0, recipe="lavic", pid=1)
    write(tmp_path / "lavic/demo/runs/stage1", state="failed", exit_code=2, recipe="lavic", pid=1)
    write(tmp_path / "arcface/work_dirs/r50", state="stopped", exit_code=143, recipe="arcface")
    for age, path in enumerate(("arcface", "lavic/demo", "lavic/src"), start=1):
        for status in (tmp_path / path).rglob("status.json"):
            os.utime(status, (time.time() - age * 100,) * 2)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], root: Path, *words: str) -> tuple[int, str]:
    code = monitor.main(list(words), root)
    captured = capsys.readouterr()
    return code, captured.out + captured.err


@pytest.mark.parametrize(
    ("state", "code", "exit_code", "word"),
    [
        ("running", None, 0, "probe: RUNNING"),
        ("done", 0, 0, "probe: DONE"),
        ("stopped", 143, 0, "probe: STOPPED"),
        ("failed", 3, 1, "probe: FAILED (exit 3)"),
    ],
)
def test_every_state_has_its_word_and_exit_code(tmp_path, capsys, state, code, exit_code, word):
    write(tmp_path, state=state, exit_code=code)
    assert run(capsys, tmp_path, str(tmp_path))[0] == exit_code
    assert run(capsys, tmp_path, "--once", str(tmp_path))[1].startswith(word + "\n")


def test_the_block_shows_what_the_files_tell(tmp_path, capsys):
    path = tmp_path / "x.log"
    path.write_text("2026 | WARNING: a picture was passed over\n")
    result = {"name": "loss", "before": 0.7, "after": 0.1, "higher_is_better": False}
    write(tmp_path, log=str(path), result=result)
    log(tmp_path, *(train(at, loss=9.0 - at, lr=5e-5, grad_norm=2.5, skipped=4) for at in range(9)))
    log(tmp_path, train(9, loss=0.5, samples_per_s=3.25, steps_per_s=1.5, reward=0.25))
    log(tmp_path, {"step": 10, "epoch": 0, "split": "val", "time": 99.0, "val_loss": 0.4321})
    text = run(capsys, tmp_path, str(tmp_path))[1]
    for part in (
        *("step 30/120 (25.0 %)  epoch 2  ETA 0:01:", "3.25 samples/s  1.5 steps/s"),
        *(
            "loss     0.5  (",
            "▁",
            "█",
            "training lr 5e-05  grad norm 2.5  skipped 4",
            "reward 0.25",
            "best     val_loss 0.4321 in epoch 1 (step 10)",
        ),
        *("loss 0.7 -> 0.1", "this run 7 MiB", "disk ", " free", str(path)),
        *(f"pid {os.getpid()} on ", "last warnings and errors\n  2026 | WARNING: a picture was"),
    ):
        assert part in text, text


def crowded(base: Path) -> Path:
    """A run about which there is much to say."""
    path = base / ("a long name " * 9) / "x.log"
    path.parent.mkdir(parents=True)
    path.write_text("2026 | WARNING: " + "many words " * 30)
    result = {"name": "answers right " * 9, "before": 0.7, "after": 0.1, "higher_is_better": False}
    run_dir = write(base / ("directory" * 12), log=str(path), result=result, recipe="lavic")
    log(run_dir, *(train(at, loss=9.0 - at, lr=5e-5, grad_norm=2.5) for at in range(9)))
    log(run_dir, {"step": 9, "epoch": 0, "split": "val", **{f"measure_{n}": n for n in range(20)}})
    return run_dir


@pytest.mark.parametrize("words", [["--once"], ["--list"]])
def test_it_fits_80_columns_without_colour_in_a_pipe(tmp_path, capsys, words):
    run_dir = crowded(tmp_path / "lavic" / "src")
    run_dir.rename(run_dir.with_name(f"out_{run_dir.name}"))
    code, text = run(capsys, tmp_path, *words)
    assert code == 0 and "\x1b" not in text
    assert "RUNNING" in text
    assert not [line for line in text.splitlines() if len(line) > 80 and " " in line.strip()]


@pytest.mark.parametrize(
    ("environ", "is_coloured"),
    [({"NO_COLOR": ""}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
)
def test_colours_are_for_terminals_and_no_color_is_heard(tmp_path, environ, is_coloured):
    write(tmp_path)
    ours, theirs = pty.openpty()
    command = [sys.executable, str(MONITOR), str(tmp_path), "--once"]
    changed = {"TERM": "xterm", **{k: v for k, v in os.environ.items() if k != "NO_COLOR"}}
    subprocess.run(command, stdout=theirs, env=changed | environ, check=True)
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert ("\x1b[32mprobe: RUNNING\x1b[0m" in text) == is_coloured
    assert ("\x1b" in text) == is_coloured


def test_json_is_one_object_with_everything(tmp_path, capsys):
    write(tmp_path)
    log(tmp_path, train(1, loss=2.0))
    seen = json.loads(run(capsys, tmp_path, "--json", str(tmp_path))[1])
    assert (seen["state"], seen["loss"], seen["step"], seen["total_steps"]) == (
        "running",
        2.0,
        30,
        120,
    )
    assert seen.keys() == set(View.__dataclass_fields__)


def test_the_newest_run_is_shown_and_a_recipes_newest_by_name(house, capsys):
    assert run(capsys, house)[1].startswith("arcface: STOPPED")
    code, text = run(capsys, house, "--recipe", "lavic")
    assert (code, text.splitlines()[0]) == (1, "lavic: FAILED (exit 2)")


def test_a_live_run_comes_before_a_newer_one_that_has_ended(house, capsys):
    path = write(house / "arcface/work_dirs/live", recipe="arcface") / "status.json"
    os.utime(path, (time.time() - 500,) * 2)
    assert run(capsys, house)[1].startswith("arcface: RUNNING")


def test_the_list_has_every_run_the_newest_first(house, capsys):
    code, text = run(capsys, house, "--list")
    assert code == 0
    head, _, *rows = text.splitlines()
    assert head.split() == ["state", "step", "updated", "directory"]
    assert [row.split()[-1] for row in rows] == [
        *("arcface/work_dirs/r50", "lavic/demo/runs/stage1", "lavic/src/out_distilled")
    ]
    assert "FAILED (exit 2)" in rows[1]
    assert len(run(capsys, house, "--list", "--recipe", "lavic")[1].splitlines()) == 4
    assert len(json.loads(run(capsys, house, "--list", "--json")[1])) == 3


@pytest.mark.parametrize(
    "place",
    [
        *("face_distill/checkpoints", "face_distill/checkpoints.1", "lavic/src/out_finetuned"),
        *("vasevqa/model/output/7B", "vasevqa/model/output/GRPO", "vasevqa/filter/.quality_model"),
        *("vasevqa/filter/filtered_vases/.clipfilter2", "multimodal/outputs"),
        *("arcface/work_dirs/resnet50", "multimodal/demo/runs/outputs", "lavic/demo/runs/a/b"),
    ],
)
def test_every_documented_run_directory_is_found(tmp_path, capsys, place):
    write(tmp_path / place)
    assert place in run(capsys, tmp_path, "--list", "--recipe", place.partition("/")[0])[1]


def test_a_script_that_still_loads_its_models_is_seen_by_its_pid_file(house, capsys):
    logs = house / "lavic" / "logs"
    logs.mkdir()
    (logs / "training_1.log").write_text("2026 | ERROR: none yet\n")
    (logs / "latest.log").symlink_to("training_1.log")
    (house / "lavic/train.py").write_text("import time; time.sleep(600)")
    with subprocess.Popen([sys.executable, str(house / "lavic/train.py")]) as script:
        (logs / "run.pid").write_text(f"{script.pid}\n")
        code, text = run(capsys, house, "--recipe", "lavic")
        refused, why = run(capsys, house, "--recipe", "lavic", "--stop")
        others = []
        for written in (f"{os.getpid()}\n", "2147483647", "rubbish"):  # of no recipe, of nobody
            (logs / "run.pid").write_text(written)
            others.append(run(capsys, house, "--recipe", "lavic")[1])
        script.kill()
    assert (code, text.splitlines()[0]) == (0, "lavic: STARTING")
    assert str(logs / "training_1.log") in text.replace("\n         ", "")
    assert (refused, "has not taken its directory yet" in why) == (2, True)
    assert all("FAILED" in other and "STARTING" not in other for other in others)
    # once it has a status, that tells more
    write(house / "lavic/src/out_distilled", recipe="lavic")
    assert run(capsys, house, "--recipe", "lavic")[1].startswith("lavic: RUNNING")


LAUNCH = """
import sys, time
from pathlib import Path
from shared import launch, launched, outcome
from shared.errors import UserError
launched.ROOT = Path(sys.argv[1])
what, sys.argv = sys.argv[2], [str(launched.ROOT / "lavic" / "train.py")]
def main(argv):
    if what == "fails":
        raise UserError("/nowhere.json cannot be read")
    if what == "elsewhere":
        outcome.announce(launched.ROOT.parent / "elsewhere")
    if what != "is done":
        print("ready", flush=True)
        time.sleep(60)
    return 0
sys.exit(launch.launch(main))
"""


def launched_in(house: Path, what: str) -> subprocess.Popen[str]:
    (house / "lavic" / "about.json").write_text("{}")
    command = [sys.executable, "-c", LAUNCH, str(house), what]
    environ = os.environ | {"PYTHONPATH": str(monitor.ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environ)


def test_a_start_that_failed_before_its_run_is_shown_with_its_reason(house, capsys):
    with launched_in(house, "fails") as process:
        assert process.wait(30) == 2
    code, text = run(capsys, house, "--recipe", "lavic")
    assert (code, text.splitlines()[0]) == (1, "lavic: FAILED (exit 2)")
    assert "reason   /nowhere.json cannot be read" in text
    assert "FAILED (exit 2)" in run(capsys, house, "--list")[1].splitlines()[2]
    with launched_in(house, "is done") as process:  # and began no run: there is no word of it
        assert process.wait(30) == 0
    assert run(capsys, house, "--recipe", "lavic")[1] == text
    write(house / "lavic/src/out_distilled", state="done", exit_code=0, recipe="lavic", pid=1)
    assert run(capsys, house, "--recipe", "lavic")[1].startswith("lavic: DONE")


def test_a_start_is_seen_and_stopped_before_it_has_a_directory(house, capsys):
    with launched_in(house, "loads") as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        code, text = run(capsys, house)
        assert (code, text.splitlines()[0]) == (0, "lavic: STARTING")
        code, text = run(capsys, house, "--stop")
        assert process.wait(10) != 0
    assert code == 0 and "STOPPED: SIGTERM before the first step" in text


def test_a_run_is_found_wherever_it_writes(house, capsys):
    with launched_in(house, "elsewhere") as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        identity = processes.describe(process.pid)
        path = write(house.parent / "elsewhere", recipe="lavic", **identity) / "status.json"
        seen = json.loads(run(capsys, house, "--json")[1])
        assert (seen["state"], seen["run_dir"]) == ("running", str(path.parent))
        assert str(path.parent) in run(capsys, house, "--list", "--recipe", "lavic")[1]
        process.kill()
    path.unlink()
    assert "STALE" in run(capsys, house, "--list", "--recipe", "lavic")[1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipe", "lavik"], "--recipe lavik: unknown; did you mean lavic?"),
        (["--recipe", "multimodal"], "no run of multimodal is to be found"),
        (["--onec"], "unknown argument --onec; did you mean --once?"),
        (["/no/such/place"], "/no/such/place is no directory"),
        (["{house}"], "holds no run: status.json is missing"),
        (["--stop"], "nothing to stop: arcface: STOPPED"),
        (["--once", "--follow"], "exclude each other"),
        (["--every", "0"], "--every 0: must be a number above 0"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(house, capsys, words, said):
    code, text = run(capsys, house, *(word.replace("{house}", str(house)) for word in words))
    assert code == 2
    (line,) = text.splitlines()
    assert said in line


def test_a_run_on_another_host_is_stopped_there(tmp_path, capsys):
    write(tmp_path, host="elsewhere")
    code, text = run(capsys, tmp_path, "--stop", str(tmp_path))
    assert code == 2
    assert f"on elsewhere: stop it there with kill -TERM {os.getpid()}" in text


def test_the_menu_answers_its_six_words(tmp_path, capsys, monkeypatch):
    path = tmp_path / "x.log"
    path.write_text("a line\n2026 | WARNING: look\n")
    write(tmp_path, log=str(path))
    log(tmp_path, train(7, loss=0.25))
    shown = {}
    for choice in ("1", "2", "3", "4", "5", "9"):
        more = "" if choice == "5" else "6\n2\n"  # it ends with 6, and with its input
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{choice}\n{more}"))
        code, shown[choice] = run(capsys, tmp_path, "--menu", str(tmp_path))
        assert code == 0
    assert "a line\n2026 | WARNING: look" in shown["1"]
    assert shown["2"].count("probe: RUNNING") == 1  # nothing after 6
    assert "GPU" in shown["3"]
    assert "2026 | WARNING: look" in shown["4"]
    assert "a line" not in shown["4"]
    assert "step 7  loss 0.25" in shown["5"]
    assert "no such entry: 9" in shown["9"]


def test_gpus_are_read_from_nvidia_smi(tmp_path, capsys, monkeypatch):
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho '0, 43, 10240, 24576'\necho '1, [N/A], 1, 2'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    write(tmp_path / "run")
    text = run(capsys, tmp_path, str(tmp_path / "run"))[1]
    assert "GPU 0: 43 %, 10.0 GiB of 24.0 GiB" in text
    assert "GPU 1" not in text


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path):
    write(tmp_path)
    command = [sys.executable, str(MONITOR), str(tmp_path), "--follow", "--every", "0.05"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    assert b"RUNNING" in process.stdout.readline()
    process.stdout.close()
    assert process.wait(20) == 0
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([], 10, ""),
        ([1.0], 10, "▁"),
        ([0.0, 2.0, 6.0, 8.0], 2, "▁█"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_a_sparkline_is_the_mean_of_each_share(values, width, expected):
    assert run_text.sparkline(values, width) == expected
