"""User mistakes as one line, and plain-language hints for failures that torch words badly.

Standard library only: entry scripts import this before anything slow.
"""

from __future__ import annotations

import difflib
import re
import reprlib
import sys
from collections.abc import Collection, Iterable

if sys.version_info < (3, 11):  # before anything that an older Python would trip over
    sys.stderr.write(
        f"Python 3.11 or newer is needed, this is {sys.version.split()[0]} ({sys.executable}); "
        "./setup.sh makes an environment with one\n"
    )
    sys.exit(3)

DONE, FAILED, USER_ERROR, MISSING_TOOL, INTERRUPTED, STOPPED = 0, 1, 2, 3, 130, 143


class UserError(Exception):
    """A mistake in the user's input: names the thing, the value, what is allowed, what to do next.

    Reaches the terminal as one line, without a traceback, with exit code 2.
    """

    exit_code = USER_ERROR


class MissingToolError(UserError):
    """A program or a manual step that this machine lacks; exit code 3."""

    exit_code = MISSING_TOOL


def missing_package(name: str) -> MissingToolError:
    """The error to raise for a Python package that is not installed."""
    return MissingToolError(
        f"the Python package {name} is not installed in {sys.executable}; run ./setup.sh and use "
        "its .venv, or pip install -r the recipe's requirements.txt"
    )


_LONGEST_LINE = 3000  # characters: a message may quote what a file or a command line held
_LONGEST_VALUE = 80
_QUOTED = reprlib.Repr()  # bounded in depth and breadth: a YAML file of one kilobyte can name more
_QUOTED.maxstring = _QUOTED.maxother = _QUOTED.maxlong = 10 * _LONGEST_VALUE
_QUOTED.maxlevel = 3


def one_line(error: BaseException) -> str:
    """The message of `error` on one line, whatever white space and unprintable signs it held."""
    text = " ".join(str(error).split())
    if not text.isprintable():  # a terminal would obey what it does not show
        text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    if len(text) > _LONGEST_LINE:
        text = text[: _LONGEST_LINE // 2] + " … " + text[-_LONGEST_LINE // 2 :]
    return text or type(error).__name__


def shown(value: object) -> str:
    """`value` as a message quotes it: like repr, in at most 80 characters."""
    try:
        return shortened(_QUOTED.repr(value))
    except ValueError:  # of a whole number that Python does not write out
        return f"a {type(value).__name__} of more than 4,000 digits"


def shortened(text: str) -> str:
    """The beginning of `text` when it has more than 80 characters, and how many it has."""
    if len(text) <= _LONGEST_VALUE:
        return text
    return f"{text[:50]}… ({len(text):,} characters)"


_NUMBER = re.compile(r"\d+")


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """'; did you mean X?' for the allowed name nearest to `name`, or '' when none is near.

    Files whose names differ in numbers alone are others of a series (shards, epochs), not spellings
    of one: then there is no near name either.
    """
    names = list(allowed)
    series = {_NUMBER.sub("0", other) for other in names}
    if "." in name and _NUMBER.sub("0", name) in series:
        return ""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


# What to do, by the flag that it takes ('': none); of several the first that the script has counts.
_SMALLER_BATCH = {
    "--batch-size": "lower --batch-size",
    "--cfg-options": "lower train_dataloader.batch_size by --cfg-options",
}
_FEWER_WORKERS = {
    "--workers": "lower --workers (0: none)",
    "--cfg-options": "lower train_dataloader.num_workers by --cfg-options (0: none)",
}
_MORE_SHARED_MEMORY = {"": "in a container raise --shm-size"}
_SHARED_MEMORY_FULL = (
    "/dev/shm is too small for the loader workers",
    (_FEWER_WORKERS, _MORE_SHARED_MEMORY),
)
# (fragments that must all occur in the lower-cased message, what it means, what to do)
_HINTS: tuple[tuple[tuple[str, ...], str, tuple[dict[str, str], ...]], ...] = (
    (
        ("dataloader worker", "killed by signal"),
        "a loader worker was killed from outside, most often because RAM or /dev/shm ran out",
        (_FEWER_WORKERS, _SMALLER_BATCH, _MORE_SHARED_MEMORY),
    ),
    (
        ("dataloader timed out",),
        "a loader worker gave no batch within --timeout, most often because a disk hangs",
        (_FEWER_WORKERS, {"--timeout": "raise --timeout"}),
    ),
    (("unable to write to file </torch_",), *_SHARED_MEMORY_FULL),
    (("bus error",), *_SHARED_MEMORY_FULL),
    (("shared memory", "shm"), *_SHARED_MEMORY_FULL),
    (
        ("out of memory",),
        "the device is full",
        (
            {"--fit": "type --fit, which takes the same step in less memory"},
            _SMALLER_BATCH,
            {"--amp": "try --amp bf16"},
            {"": "look for other programs on the device"},
        ),
    ),
    (
        ("can't allocate memory",),
        "RAM is full",
        (_SMALLER_BATCH, _FEWER_WORKERS, {"": "look for other programs on the machine"}),
    ),
    (
        ("no space left on device",),
        "the disk is full",
        ({"": "free some space; the last checkpoint is whole"},),
    ),
    (
        ("nvidia driver", "too old"),
        "the NVIDIA driver is older than this torch build needs",
        (
            {"": "update the driver, or install a torch build for your CUDA version"},
            {"--device": "run on the CPU with --device cpu"},
        ),
    ),
)


_MEMORY = (  # CUDA and other devices, torch's CPU allocator, the kernel, cuBLAS
    *("out of memory", "can't allocate memory", "cannot allocate memory"),
    "cublas_status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says that memory ran out, of whatever kind."""
    return any(
        isinstance(found, MemoryError) or any(word in str(found).lower() for word in _MEMORY)
        for found in (error, error.__cause__)
        if found is not None
    )


def hint_for(text: str, flags: Collection[str] = ()) -> str | None:
    """What a failure's message means and what to do next, or None when nothing is known.

    flags: those of the script that failed; advice that takes another one is left out.
    """
    lowered = text.lower()
    for fragments, meaning, ways in _HINTS:
        if all(fragment in lowered for fragment in fragments):
            possible = [[way[flag] for flag in way if not flag or flag in flags] for way in ways]
            return f"{meaning}: {'; '.join(words[0] for words in possible if words)}"
    return None
