"""Seeded damage to files, and readers that must bear it.

    READERS["name"] = Reader(make, read)

`make(directory)` writes whole files, `read(directory)` reads them; damaged copies may give any
result, or an error of one line that our own code raised: UserError, or ValueError and DamagedError
where the reader says so. Anything else is a fault of the reader: another error, a hang, memory
beyond reason, a program started, a file deleted. Each case follows from its number alone.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError, one_line

ROOT = Path(__file__).resolve().parents[1]
MEMORY = 2 * 10**9  # bytes of address space that a case may ask for, beside what is there
GROWTH = 400_000  # kB that the whole campaign of a reader may grow by
PATIENCE = 10.0  # seconds a case may take
_QUICK = Path("/dev/shm")  # where waiting for the disk costs nothing
_LONGEST = 4000  # characters of an error's line
# What starts a program or talks to the network; pickle's own look-ups are judged by what they do.
_FORBIDDEN = {"os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"}
_EVIL = b"cposix\nsystem\n(S'touch PWNED'\ntR."  # a pickle that runs a program
_TOKENS = (
    *(b"NaN", b"-Infinity", b"1e999", b"null", b"true", b"[]", b"{}", b'"', b"\\", b"\\ud800"),
    *(b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n\n", b"\t", b" ", b",", b"-1"),
    *(b"9" * 400, b"18446744073709551616", b"-9223372036854775809", b"../../../etc/passwd"),
    *(b"[" * 100_000, b'{"a":' * 20_000, b"(" * 3000, b"!!python/object/apply:os.system [id]"),
    *(b"__import__('os').system('id')", b"*" * 300, b"&a [*a]", b"%s%n", "数据".encode(), _EVIL),
    *(b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80", b"\xff" * 8, b"\x00" * 64),
)


@dataclass(frozen=True)
class Reader:
    """One reader.

    allowed: errors that it promises beside UserError. slowness: what the number of cases is divided
    by. opens: whether it opens the files itself, and not what was written here for it.
    """

    make: Callable[[Path], Any]
    read: Callable[[Path], Any]
    allowed: tuple[type[BaseException], ...] = ()
    slowness: int = 1
    opens: bool = True


@dataclass
class Campaign:
    """What damage did to a reader. faults: what no reader may do, with the case's number."""

    cases: int = 0
    results: int = 0
    refusals: int = 0
    faults: list[str] = field(default_factory=list)


def run(name: str, reader: Reader, cases: int, timeout: float) -> Campaign:
    """Try damaged copies in a process of its own; AssertionError if that dies or hangs.

    cases: how many, divided by the reader's slowness; after them each file in turn is a pipe, and a
    link to a device.
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    at = context.Value("i", 0)
    cases //= reader.slowness
    child = context.Process(target=_try_all, args=(name, reader, cases, theirs, at))
    child.start()
    theirs.close()
    answer = None
    with contextlib.suppress(EOFError):
        answer = ours.recv() if ours.poll(timeout) else None
    if answer is None:
        child.kill()
    child.join()
    assert answer is not None, (
        f"{name}: case {at.value} ended or hung the process (exit code {child.exitcode})"
    )
    return answer


def _prepared(name: str, reader: Reader, cases: int, whole: dict[Path, bytes]) -> Iterator[str]:
    """Name each case as soon as its files are there."""
    for number in range(cases):
        for path, content in damage(whole, random.Random(f"{name} {number}")).items():
            path.write_bytes(content)
        yield f"case {number}"
    for path in whole if reader.opens else ():
        for kind, put in (("pipe", os.mkfifo), ("device", _link_to_zeros)):
            _write_anew(whole)
            path.unlink()
            put(path)
            yield f"{path.name} is a {kind}"


def _link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _write_anew(files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _try_all(name: str, reader: Reader, cases: int, pipe: Any, at: Any) -> None:
    """In the child: every case, under guard."""
    campaign, started = Campaign(), list[str]()
    sys.addaudithook(lambda event, args: started.append(event) if event in _FORBIDDEN else None)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries' own complaints
    with tempfile.TemporaryDirectory(dir=_QUICK if _QUICK.is_dir() else None) as scratch:
        os.chdir(scratch)
        directory = Path(scratch, "files")
        whole = _make(reader, directory)
        _limit_memory()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number, case in enumerate(_prepared(name, reader, cases, whole)):
            at.value = number
            if fault := _try(reader, directory, campaign):
                campaign.faults.append(f"{name}, {case}: {fault}")
            if started or Path("PWNED").exists():
                campaign.faults.append(f"{name}, {case}: started {started or 'PWNED'}")
                started.clear()
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if growth > GROWTH:
            campaign.faults.append(f"{name}: took {growth / 1e6:.1f} GB")
        os.chdir("/")
    pipe.send(campaign)
    pipe.close()
    os._exit(0)  # no destructors of libraries in a forked child


def _make(reader: Reader, directory: Path) -> dict[Path, bytes]:
    """The whole files, after a look that what is not damaged is read."""
    directory.mkdir()
    reader.make(directory)
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    whole = {path: path.read_bytes() for path in files}
    reader.read(directory)
    return whole


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


class Hung(BaseException):
    """A case took too long."""


def _expire(*_: Any) -> None:
    raise Hung


def _try(reader: Reader, directory: Path, campaign: Campaign) -> str | None:
    """Read one damaged copy; what was wrong with how that ended."""
    campaign.cases += 1
    signal.signal(signal.SIGALRM, _expire)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        reader.read(directory)
    except Hung:
        return f"took more than {PATIENCE} s"
    except BaseException as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        campaign.refusals += 1
        return _judge(error, reader.allowed)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    campaign.results += 1
    return None


def _judge(error: BaseException, allowed: tuple[type[BaseException], ...]) -> str | None:
    """None for an error of one line that our code raised, else what is wrong with it."""
    if isinstance(error, UserError) or (isinstance(error, allowed) and _is_ours(error)):
        text = one_line(error)  # as the launcher shows it
        if text.isprintable() and len(text) <= _LONGEST:
            return None
        return f"{type(error).__name__} that is no line for people: {text[:300]!r}"
    return "".join(traceback.format_exception(error)[-6:])


def _is_ours(error: BaseException) -> bool:
    """Whether the line that raised it is of this repository."""
    frames = traceback.extract_tb(error.__traceback__)
    file = Path(frames[-1].filename)
    return file.is_relative_to(ROOT) and ".venv" not in file.parts


# --- damage ---------------------------------------------------------------------------------------


def damage(whole: dict[Path, bytes], chance: random.Random) -> dict[Path, bytes]:
    """The files, one of them damaged, sometimes two."""
    files = dict(whole)
    for path in chance.sample(sorted(files), min(len(files), 1 + (chance.random() < 0.2))):
        if files[path][:2] == b"PK" and chance.random() < 0.6:
            files[path] = _damaged_archive(files[path], chance)
        else:
            files[path] = damaged(files[path], chance)
    return files


def damaged(content: bytes, chance: random.Random) -> bytes:
    """`content` after one to four of the changes below."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        content = chance.choice(_CHANGES)(content, chance)
    return content


def _place(content: bytes, chance: random.Random) -> int:
    """A place in the content; more often near its start, where the headers are."""
    reach = len(content) if chance.random() < 0.6 else min(len(content), 128)
    return chance.randrange(reach + 1)


def _flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 20))):
        if changed:
            changed[min(_place(content, chance), len(changed) - 1)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _overwrite(content: bytes, chance: random.Random) -> bytes:
    start, new = _place(content, chance), chance.randbytes(chance.choice((1, 2, 4, 8, 60)))
    return content[:start] + new + content[start + len(new) :]


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: _place(content, chance)]


def _remove(content: bytes, chance: random.Random) -> bytes:
    start = _place(content, chance)
    return content[:start] + content[start + chance.choice((1, 2, 4, 7, 50, 500)) :]


def _repeat(content: bytes, chance: random.Random) -> bytes:
    start, size = _place(content, chance), chance.choice((1, 4, 30, 300))
    piece = content[start : start + size] * chance.choice((1, 2, 50))
    return content[:start] + piece + content[start:]


def _insert(content: bytes, chance: random.Random) -> bytes:
    start = _place(content, chance)
    return content[:start] + chance.choice(_TOKENS) + content[start:]


def _replace(content: bytes, chance: random.Random) -> bytes:
    start, token = _place(content, chance), chance.choice(_TOKENS)
    return content[:start] + token + content[start + len(token[:64]) :]


def _swap(content: bytes, chance: random.Random) -> bytes:
    """Two parts in each other's place."""
    a, b, c = sorted(_place(content, chance) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _trash(content: bytes, chance: random.Random) -> bytes:
    return chance.choice((b"", chance.randbytes(200), _EVIL, b"<html><body>404</body></html>"))


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    *(_flip, _flip, _overwrite, _overwrite, _cut, _remove, _repeat),
    *(_insert, _insert, _replace, _replace, _swap, _trash),
)


def _damaged_archive(content: bytes, chance: random.Random) -> bytes:
    """A zip archive with one damaged member, and checksums that fit it."""
    written = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(written, "w") as new:
            names = old.namelist()
            chosen = next((n for n in names if n.endswith("data.pkl")), names[0])
            chosen = chosen if chance.random() < 0.7 else chance.choice(names)
            for name in names:
                member = old.read(name)
                new.writestr(name, damaged(member, chance) if name == chosen else member)
    except (zipfile.BadZipFile, IndexError, ValueError):
        return damaged(content, chance)
    return written.getvalue()
