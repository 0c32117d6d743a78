"""A look at pickled files before torch reads them.

torch's safe unpickler refuses a class that it does not know, and then searches the message for a
pattern in time that grows with the square of the name's length: a damaged or hostile file of a
megabyte would take an hour to be refused.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from contextlib import AbstractContextManager
from typing import IO, Any

import numpy as np
import torch

_LONGEST_NAME = 1000  # characters of a class and its module; real ones stay below 100
# A name without end shows as a stretch without a line end; only then is the pickle looked through.
_SUSPICIOUS = re.compile(rb"[^\n]{10000}")
_PICKLES = 5  # one after another, in files of torch before 1.6


def check_archive(archive: zipfile.ZipFile) -> None:
    """Raise ValueError when the pickle of a torch archive names a class without end."""
    for name in archive.namelist():
        if name.endswith("data.pkl"):
            content = archive.read(name)
            if _SUSPICIOUS.search(content):
                _check_names(content)


def check_stream(stream: IO[bytes]) -> None:
    """The same for a file of torch before 1.6, from where the stream stands."""
    for _ in range(_PICKLES):
        _check_names(stream)


def _check_names(pickled: bytes | IO[bytes]) -> None:
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name in ("GLOBAL", "INST") and len(str(argument)) > _LONGEST_NAME:
                raise ValueError(f"a class whose name has {len(str(argument)):,} characters")
    except ValueError as error:
        if str(error).startswith("a class whose name"):
            raise
        length = len(error.object) if isinstance(error, UnicodeDecodeError) else 0
        if "newline" in str(error) or length > _LONGEST_NAME:
            # the unpickler would take all that is left for the name, or what is no text
            raise ValueError("a class whose name has no end") from None
        # any other fault is torch's to name


class _Nothing:
    """Stands for an object of a training program, whose content is not wanted."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def harmless() -> AbstractContextManager[Any]:
    """In it torch's safe unpickler takes numpy's numbers and arrays, as checkpoints hold them.

    Of mmengine's log, which its checkpoints hold beside the weights, nothing is made.
    """
    number, array = (value.__reduce__()[0] for value in (np.float64(0), np.zeros(1)))
    kinds = [type(np.dtype(code)) for code in "?bBhHiIlLqQefd"]
    names: list[Any] = [np.dtype, np.ndarray, *kinds]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # numpy 1's and 2's
        names += [(number, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    names.append((_Nothing, "mmengine.logging.history_buffer.HistoryBuffer"))
    names.append((_Nothing, "builtins.getattr"))  # by which its methods are named
    return torch.serialization.safe_globals(names)
