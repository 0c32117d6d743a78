import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
START = """
import logging, os, sys
from shared import logs
logs.open_streams()
logs.setup(int(os.environ.get("RANK", "0")))
log = logging.getLogger("test")
"""
ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def run(code: str, redirect: str = "", **environ: str) -> subprocess.CompletedProcess[bytes]:
    """`code`, after the streams and the log are set up, in a shell with `redirect`."""
    command = f'exec "$0" -c "$1" {redirect}'
    return subprocess.run(
        ["bash", "-c", command, sys.executable, START + code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environ,
        capture_output=True,
        timeout=20,
    )


def test_lines_have_a_time_and_warnings_their_level_and_libraries_do_not_chat() -> None:
    chat = "[logging.getLogger(n).info(n) for n in ('httpx', 'urllib3', 'PIL')]; "
    done = run(chat + "log.info('one %d', 1); log.warning('two'); log.debug('no')")
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"{stamp} \| one 1\n{stamp} \| WARNING: two\n", done.stdout.decode())
    assert done.stderr == b""


def test_other_ranks_are_quiet_but_for_warnings_with_their_number() -> None:
    done = run("log.info('one'); log.warning('two')", RANK="3")
    (line,) = done.stdout.decode().splitlines()
    assert all(word in line for word in ("rank 3", "WARNING", "two"))


def test_an_ascii_locale_writes_utf_8() -> None:
    words = [ascii(word) for word in ("训练", "数据 é", "错误")]
    code = "log.info({}); print({}); print({}, file=sys.stderr)".format(*words)
    done = run(code + r"; log.info('%s', os.fsdecode(b'\xff.jpg'))", **ASCII)
    assert done.returncode == 0
    assert rb"\udcff.jpg" in done.stdout
    assert "训练" in done.stdout.decode("utf-8")
    assert "数据 é" in done.stdout.decode("utf-8")
    assert done.stderr.decode("utf-8") == "错误\n"


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_with_closed_streams_the_program_goes_on_and_its_files_stay_clean(
    tmp_path: Path, closed: str
) -> None:
    path = tmp_path / "data"
    code = f"""
with open({str(path)!r}, "w") as file:
    log.info("a line"); print("printed"); print("told", file=sys.stderr); logs.say("said")
    os.write(1, b"raw"); os.write(2, b"raw")
    file.write("own")
"""
    done = run(code, closed)
    assert done.returncode == 0
    assert path.read_text() == "own"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_the_log_ends_no_training_and_changes_no_exit_code(unbuffered) -> None:
    code = "log.info('a line'); log.warning('b'); logs.say('c'); sys.exit(7)"
    done = run(code, ">/dev/full 2>/dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 7


def test_an_answer_that_finds_no_room_fails() -> None:
    done = run("print('an answer')", ">/dev/full", PYTHONUNBUFFERED="")
    assert done.returncode == 1
    assert b"No space left" in done.stderr


def test_a_long_line_arrives_whole_and_descriptors_follow_a_redirection() -> None:
    done = run("print('x' * 1_000_000); os.dup2(2, 1); print('there')")
    assert done.stdout == b"x" * 1_000_000 + b"\n"
    assert done.stderr == b"there\n"


def test_a_reader_that_has_left_ends_no_training_and_changes_no_exit_code(tmp_path: Path) -> None:
    path = tmp_path / "code"
    script = START + (
        "import signal\nsys.stdin.read()\n"  # until the reader of stdout is gone
        "log.info('a line'); log.info('b'); print('c'); print('d', flush=True)\n"
        f"open({str(path)!r}, 'w').write('reached')\n"
        "sys.exit(7)"
    )
    command = [sys.executable, "-c", script]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environ, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin
    assert process.stdout
    process.stdout.close()
    process.stdin.close()
    assert process.stderr
    assert process.wait(20) == 7
    assert path.read_text() == "reached"
    assert process.stderr.read() == b""
