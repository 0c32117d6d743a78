import os
import re
import subprocess
import sys
from pathlib import Path

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


def test_an_answer_that_finds_no_room_fails() -> None:
    done = run("print('an answer')", ">/dev/full", PYTHONUNBUFFERED="")
    assert done.returncode == 1
    assert b"No space left" in done.stderr


def test_a_long_line_arrives_whole_and_descriptors_follow_a_redirection() -> None:
    done = run("print('x' * 1_000_000); os.dup2(2, 1); print('there')")
    assert done.stdout == b"x" * 1_000_000 + b"\n"
    assert done.stderr == b"there\n"
