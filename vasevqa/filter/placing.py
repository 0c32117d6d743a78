"""Files to where a decision puts them, by copying or linking; the folders equal the report after.

Sources are read, never moved or changed. What lies in the folders and is in no report is moved
aside, not deleted.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.distributed import World
from vasevqa.filter.job import Job
from vasevqa.filter.ledger import Ledger

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Folders:
    """The folders `names` of `target`, which get files of `source`; link: symbolic links."""

    source: Path
    target: Path
    names: tuple[str, ...]
    link: bool

    def place(self, files: Iterable[tuple[str, str]]) -> Iterator[str]:
        """Bring each (name, folder) from the source to target/folder/name; yields the names.

        A file that an earlier decision put into another of the folders is moved from there.
        """
        for name, folder in files:
            goal = self.target / folder / name
            others = [self.target / other / name for other in self.names if other != folder]
            _bring(self.source / name, goal, others, self.link)
            yield name

    def place_share(self, ledger: Ledger, job: Job, world: World) -> bool:
        """Bring this rank's share of the decided files; whether the run is to stop."""
        job.begin("placing", len(ledger) // world.size)
        for _ in self.place(ledger.share(world.rank, world.size)):
            job.advance()
            if job.asked_to_stop:
                break
        return job.meet()

    def move_strays(self, ledger: Ledger, aside: Path) -> int:
        """Move what lies here and not where the ledger says into `aside`; how many."""
        moved = 0
        for folder in self.names:
            for path in _files_below(self.target / folder):
                name = path.relative_to(self.target / folder).as_posix()
                if ledger.place_of(name) == folder:
                    continue
                goal = _free(aside / folder / name)
                goal.parent.mkdir(parents=True, exist_ok=True)
                path.replace(goal)
                moved += 1
        if moved:
            log.info("%d file(s) that this run did not decide on are now in %s", moved, aside)
        return moved


def _bring(source: Path, goal: Path, others: list[Path], link: bool) -> None:
    if not source.exists():  # a link that leads nowhere, or gone since it was scored
        log.warning("not copied: %s is not there", source)
        return
    link = link or not source.is_file()  # a pipe or a device cannot be copied
    there = [other for other in others if os.path.lexists(other)]
    if there and not os.path.lexists(goal) and _is_same(source, there[0], link):
        goal.parent.mkdir(parents=True, exist_ok=True)
        there[0].replace(goal)
    if not _is_same(source, goal, link):
        goal.parent.mkdir(parents=True, exist_ok=True)
        _put(source, goal, link)


def _is_same(source: Path, goal: Path, link: bool) -> bool:
    """Whether `goal` is what `_put` would make of `source`."""
    if link:
        return goal.is_symlink() and goal.readlink() == source.resolve()
    if goal.is_symlink() or not goal.exists():
        return False
    ours, theirs = source.stat(), goal.stat()
    return (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)


def _put(source: Path, goal: Path, link: bool) -> None:
    temporary = goal.with_name(f"{goal.name}.tmp.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    if link:
        temporary.symlink_to(source.resolve())
    else:
        shutil.copy2(source, temporary)  # with its times: a later pass sees the same file
    temporary.replace(goal)


def _files_below(folder: Path) -> Iterator[Path]:
    for base, _, names in os.walk(folder):
        yield from (Path(base) / name for name in sorted(names))


def _free(path: Path) -> Path:
    number, free = 1, path
    while os.path.lexists(free):
        free = path.with_name(f"{path.name}.{number}")
        number += 1
    return free
