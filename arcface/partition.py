"""In-shop's list_eval_partition.txt: which picture shows which item, and what it is for.

Line 1 is the number of pictures, line 2 the header, every other one `path item_id status`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from shared.errors import UserError, did_you_mean, one_line, shown
from shared.files import read_text

LIST = "Eval/list_eval_partition.txt"  # below the data root
SPLITS = ("train", "query", "gallery")
_SHOWN = 5  # faults spelled out in the error's one line


class Picture(NamedTuple):
    """One line: the path below the pictures' directory, and the item's id."""

    name: str
    item: str


class Fault(NamedTuple):
    """A malformed line: its number, from 1, and what is wrong with it."""

    line: int
    reason: str


class PartitionError(UserError):
    """A list with malformed lines: all of them in `faults`, the first few in the message."""

    def __init__(self, path: Path, faults: list[Fault]) -> None:
        self.faults = faults
        shown = "; ".join(f"line {line}: {reason}" for line, reason in faults[:_SHOWN])
        rest = ""
        if len(faults) > _SHOWN:
            rest = f"; and lines {_runs([fault.line for fault in faults[_SHOWN:]])}"
        super().__init__(f"{path}: {len(faults)} malformed line(s): {shown}{rest}")


@dataclass(frozen=True)
class Partition:
    """The pictures of each split, in the order of the list."""

    path: Path
    train: tuple[Picture, ...]
    query: tuple[Picture, ...]
    gallery: tuple[Picture, ...]

    def split(self, name: str) -> tuple[Picture, ...]:
        """The pictures of `name`. Raises UserError for an unknown split and an empty one."""
        if name not in SPLITS:
            raise UserError(f"split is {shown(name)}, allowed: {', '.join(SPLITS)}")
        pictures: tuple[Picture, ...] = getattr(self, name)
        if not pictures:
            raise UserError(f"{self.path}: no line has the status {name}")
        return pictures

    def labels(self, name: str) -> list[int]:
        """The item of each picture of a split as a number, by first appearance.

        train counts its own items; query and gallery count theirs together, so that equal numbers
        are equal items.
        """
        numbers: dict[str, int] = {}
        for picture in self.train if name == "train" else (*self.gallery, *self.query):
            numbers.setdefault(picture.item, len(numbers))
        return [numbers[picture.item] for picture in self.split(name)]

    def remarks(self) -> list[str]:
        """What a user should know of the list though it can be used, one line each."""
        items = {name: [picture.item for picture in getattr(self, name)] for name in SPLITS}
        lonely = _missing_from(items["query"], items["gallery"])
        seen = sorted(set(items["train"]) & {*items["query"], *items["gallery"]})
        found = []
        if lonely and items["gallery"]:
            found.append(
                f"{self.path}: {len(lonely)} query item(s) have no gallery picture, so their "
                f"queries cannot be answered: {_names(lonely)}"
            )
        if seen:
            found.append(
                f"{self.path}: {len(seen)} item(s) of the test are trained on, which flatters the "
                f"result: {_names(seen)}"
            )
        return found


def read_partition(path: Path) -> Partition:
    """The list in `path`, whatever its line ends and with or without a byte order mark.

    Raises PartitionError that names every malformed line, and UserError for a file that is missing,
    is no text, or has another number of pictures than its first line says.
    """
    lines = _lines(path)
    faults = _check_head(lines)
    splits: dict[str, list[Picture]] = {name: [] for name in SPLITS}
    first_seen: dict[str, int] = {}
    for number, line in enumerate(lines[2:], 3):
        fields = line.split()
        if not fields:
            continue
        reason = _fault(fields, first_seen)
        if reason:
            faults.append(Fault(number, reason))
            continue
        first_seen[fields[0]] = number
        splits[fields[2]].append(Picture(fields[0], fields[1]))
    if faults:
        raise PartitionError(path, faults)
    if int(lines[0]) != len(first_seen):
        raise UserError(
            f"{path}: line 1 says {int(lines[0])} pictures, {len(first_seen)} lines follow: the "
            "file was cut off or changed; fetch it again, or correct the number"
        )
    return Partition(path, *(tuple(splits[name]) for name in SPLITS))


def _lines(path: Path) -> list[str]:
    try:
        text = read_text(path, "utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing: the data root must hold Eval/list_eval_partition.txt and Img/img/ "
            "as In-shop's archives unpack; put it there or give another --data-root"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return text.split("\n")  # str.splitlines would cut at signs that a path may hold


def _check_head(lines: list[str]) -> list[Fault]:
    """What is wrong with the first two lines."""
    faults = []
    if not lines[0].strip().isdecimal():
        faults.append(Fault(1, f"expected the number of pictures, found {_short(lines[0])}"))
    header = lines[1].split() if len(lines) > 1 else []
    if len(header) != 3 or header[2] in SPLITS:
        found = _short(lines[1]) if len(lines) > 1 else "the end of the file"
        faults.append(Fault(2, f"expected image_name item_id evaluation_status, found {found}"))
    return faults


def _fault(fields: list[str], first_seen: dict[str, int]) -> str:
    """What is wrong with a line of these fields, or ''."""
    if len(fields) != 3:
        return f"expected path, item and status, found {len(fields)} words: {_short(fields)}"
    name, _, status = fields
    if status not in SPLITS:
        hint = did_you_mean(status, SPLITS)
        return f"status {_short(status)}, allowed: {', '.join(SPLITS)}{hint}"
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        return f"{_short(name)} is no path below the pictures' directory"
    if name in first_seen:
        return f"{_short(name)} stands in line {first_seen[name]} already"
    return ""


def _missing_from(items: list[str], others: list[str]) -> list[str]:
    """The distinct `items` that are not among `others`, in order."""
    known = set(others)
    return [item for item in dict.fromkeys(items) if item not in known]


def _names(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _runs(numbers: list[int], most: int = 20) -> str:
    """Rising numbers as '7, 9-12'; after `most` runs only how many more."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs[:most])
    rest = sum(b - a + 1 for a, b in runs[most:])
    return shown + (f" and {rest} more" if rest else "")


def _short(text: str | list[str]) -> str:
    joined = text if isinstance(text, str) else " ".join(text)
    return repr(joined.strip()[:60])
