"""The data sets of a run: where their pictures lie, every row checked, a copy where one is needed.

A relative picture is looked for below ROOT_IMAGE_DIR, the directory where the command was typed,
model/ (where the documented commands are typed) and the file's own folder, in this order: the first
of them that holds the file's first picture is the root of all its pictures.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.files import write_text
from vasevqa.model import rows
from vasevqa.model.paths import without_sample
from vasevqa.model.plan import Plan
from vasevqa.model.rows import Row, RowError

log = logging.getLogger(__name__)

_NAMED = 5  # mistakes of one file that are named; the rest are counted


@dataclass
class TrainingFile:
    """One data set: its rows, the root of its pictures, and what is wrong with it."""

    path: Path
    is_grpo: bool
    rows: list[Row] = field(default_factory=list)
    root: Path = Path()
    bad: dict[int, str] = field(default_factory=dict)  # row number → what is wrong with it
    left_out: int = 0

    @property
    def problems(self) -> list[str]:
        """What is wrong with its rows, a line each; from the sixth on they are counted."""
        lines = [f"{self.path}, row {number}: {why}" for number, why in sorted(self.bad.items())]
        more = len(lines) - _NAMED
        counted = [f"{self.path}: {more} more rows have such mistakes"] if more > 0 else []
        return lines[:_NAMED] + counted

    @property
    def pictures(self) -> list[Path]:
        """The files of the pictures of all rows that are not bad, each once."""
        sound = (row for row in self.rows if row.number not in self.bad)
        return list(dict.fromkeys(path for row in sound for path in self.pictures_of(row)))

    def pictures_of(self, row: Row) -> list[Path]:
        """The files of a row's pictures."""
        return [self.root / image.strip() for image in filter(rows.is_file, row.images)]

    def mark(self, reasons: Mapping[Path, str]) -> None:
        """Note the rows whose pictures cannot be used: {picture: why}."""
        for row in self.rows:
            for path in filter(reasons.__contains__, self.pictures_of(row)):
                self.bad.setdefault(row.number, f"the picture {path} {reasons[path]}")

    def leave_out(self) -> None:
        """Train without the bad rows."""
        self.rows = [row for row in self.rows if row.number not in self.bad]
        self.left_out, self.bad = len(self.bad), {}


def open_file(path: Path, roots: Sequence[Path], *, is_grpo: bool) -> TrainingFile:
    """Read and check one data set; what is wrong with rows and pictures stands in `.problems`.

    Raises UserError when the file itself is missing or cannot be read.
    """
    if not path.is_file():
        raise UserError(
            f"the data set {path} is missing: put it there, or type --dataset FILE (.json or "
            ".jsonl); the README shows a row"
        )
    found = TrainingFile(path, is_grpo)
    for number, source in enumerate(rows.read(path), 1):
        try:
            row = rows.parse(source, number)
            rows.check(row, is_grpo=is_grpo)
            found.rows.append(row)
        except RowError as error:
            found.bad[number] = str(error)
    places = [*roots, path.parent]
    found.root = _root(found, places)
    found.mark(_missing(found, places))
    for row in found.rows:
        for name in filter(rows.is_file, row.sounds_and_films):
            if not any((place / name).is_file() for place in places):
                found.bad.setdefault(row.number, f"{name} is missing: write its path")
    return found


def given_to_swift(plan: Plan, files: Sequence[TrainingFile]) -> tuple[Plan, Path | None]:
    """`plan` with a copy for each file that swift cannot take as it is, and the pictures' root."""
    root = common_root(files)
    copies: dict[Path, Path] = {}
    for file in files:
        if why := needs_copy(file, root):
            copies[file.path] = write_copy(file, plan.output_dir / "data")
            log.info("%s is read as %s: %s", file.path, copies[file.path], why)
    flags = dict(plan.flags)
    for name in {"dataset", "val_dataset"} & flags.keys():
        flags[name] = [_in_place_of(value, copies) for value in flags[name]]
    return replace(plan, flags=flags), root


def _in_place_of(value: str, copies: dict[Path, Path]) -> str:
    path = without_sample(value)
    return f"{copies.get(Path(path), path)}{value[len(path) :]}"


def common_root(files: Sequence[TrainingFile]) -> Path | None:
    """The one root of all files' relative pictures, or None when they differ."""
    roots = {file.root for file in files if any(_relative(file))}
    return roots.pop() if len(roots) == 1 else None


def needs_copy(file: TrainingFile, root: Path | None) -> str | None:
    """Why swift cannot be given the file as it is, or None.

    root: what ROOT_IMAGE_DIR will be, if anything.
    """
    if file.left_out:
        return f"{file.left_out} rows are left out"
    with file.path.open("rb") as stream:
        if stream.read(3) == rows.BYTE_ORDER_MARK:
            return "it begins with a byte-order mark"
    if root is None and any(_relative(file)):
        return "its pictures lie below another folder than those of the other files"
    if file.is_grpo and any(not row.source.get("solution") for row in file.rows):
        return "rows without solution get the answer that is there as one"
    return None


def write_copy(file: TrainingFile, directory: Path) -> Path:
    """The file as JSON lines below `directory`, pictures with their whole paths.

    For GRPO every row has a solution: swift removes the assistant's turn before rewards see it.
    """
    lines = [json.dumps(_ready(file, row), ensure_ascii=False) for row in file.rows]
    text = "".join(line + "\n" for line in lines)
    digest = hashlib.sha256(f"{file.path}\n{text}".encode()).hexdigest()[:8]
    target = directory / f"{file.path.stem}-{digest}.jsonl"  # swift caches by path
    directory.mkdir(parents=True, exist_ok=True)
    write_text(target, text, durable=False)
    return target


def _ready(file: TrainingFile, row: Row) -> dict[str, Any]:
    images = [str(file.root / image) if rows.is_file(image) else image for image in row.listed]
    ready = {**row.source, "images": images} if images else dict(row.source)
    ready.pop("image", None)
    for name in rows.TURNS:
        if name in ready:
            ready[name] = [_with_whole_paths(file.root, turn) for turn in ready[name]]
    return ready | ({"solution": row.reference} if file.is_grpo else {})


def _with_whole_paths(root: Path, turn: dict[str, Any]) -> dict[str, Any]:
    """A message whose parts name pictures by their whole paths."""
    changed = dict(turn)
    for name in ("value", "content"):
        if isinstance(turn.get(name), list):
            changed[name] = [_with_whole_path(root, part) for part in turn[name]]
    return changed


def _with_whole_path(root: Path, part: dict[str, Any]) -> dict[str, Any]:
    image = rows.image_of(part)
    return {"type": "image", "image": str(root / image)} if image and rows.is_file(image) else part


def _relative(file: TrainingFile) -> Iterator[str]:
    for row in file.rows:
        for image in filter(rows.is_file, row.images):
            if not Path(image).is_absolute():
                yield image


def _root(file: TrainingFile, roots: Sequence[Path]) -> Path:
    first = next(_relative(file), None)
    if first is None:
        return roots[0]
    return next((root for root in roots if (root / first.strip()).is_file()), roots[0])


def _missing(file: TrainingFile, roots: Sequence[Path]) -> dict[Path, str]:
    tried = ", ".join(dict.fromkeys(map(str, roots)))
    how = "write its path from one of these"
    reasons = {}
    for path in file.pictures:
        if not path.is_file():
            why = "is no file" if path.exists() else f"is missing (looked below {tried})"
            reasons[path] = f"{why}; {how}"
        elif path.stat().st_size == 0:
            reasons[path] = "is empty; copy it again or drop the row"
    return reasons
