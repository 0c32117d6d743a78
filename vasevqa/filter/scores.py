"""A pass over pictures: its run directory, its scores.jsonl, the pictures that have no row yet.

    with Pass(directory, cfg, world) as run:
        run.open_scores("which model and prompts")
        for batch in run.batches(root, names, prepare, 32, workers=2):
            run.add({**file.item.row, "score": …} for file in batch)
        if run.meet():                        # every rank comes here
            return run.finish()
        table = run.table(root, names)        # rank 0 alone

Rank 0 appends to scores.jsonl, rank N to scores.N.jsonl, and rank 0 merges them, so that the same
command continues a pass that was killed, with any number of processes.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from shared import distributed, images, lock, outcome, run_directory, stop
from shared import status as statuses
from shared.distributed import World
from shared.errors import DONE, UserError, one_line
from shared.files import open_regular, read_bytes, write_text
from shared.loader import make_eval_loader
from shared.progress import Progress
from shared.status import Status
from vasevqa.filter.clip import digest_of
from vasevqa.filter.place import Folders, Item, Row, Table, keys_of, number_of, scored_rows

log = logging.getLogger(__name__)

RECIPE = "vasevqa/filter"
SUFFIXES = images.SUFFIXES | {".tif", ".tiff"}
_EVERY = 10.0  # seconds between lines


# --- pictures -------------------------------------------------------------------------------------


def list_pictures(root: Path) -> list[str]:
    """The pictures below `root`, relative, with /; without those whose names are no UTF-8.

    Raises UserError when there is none.
    """
    names, skipped = [], images.Skipped("pictures")
    for name in images.find_images(root, SUFFIXES):
        try:
            name.encode()
            names.append(name)
        except UnicodeEncodeError:
            skipped.add(name, "its name is not UTF-8: rename it")
    if not names:
        raise UserError(f"{root} holds no picture ({' '.join(sorted(SUFFIXES))})")
    return names


def sample(names: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` of the names by lot; the same ones in whatever order they come."""
    return sorted(sorted(names, key=lambda name: number_of(f"{seed}\0{name}"))[:count])


@dataclass(frozen=True)
class Prepared:
    """A file as a worker hands it over: pixels only when its content is not known yet."""

    item: Item
    digest: bytes = b""
    pixels: Tensor | None = None  # (3, S, S), prepared
    problem: str = ""


class Pictures(Dataset[Prepared]):
    """Files, read, hashed and, where their content is not among the `known`, decoded."""

    def __init__(
        self,
        root: Path,
        items: list[Item],
        prepare: Callable[[Tensor], Tensor],
        known: Container[bytes] = (),
    ) -> None:
        self._root, self._items, self._prepare, self._known = root, items, prepare, known

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Prepared:
        item = self._items[index]
        try:
            content = read_bytes(self._root / item.name)
            digest = digest_of(content)
            if digest in self._known:
                return Prepared(item, digest)
            return Prepared(item, digest, self._prepare(images.decode_rgb(content)))
        except OSError as error:
            return Prepared(item, problem=f"cannot be read: {error.strerror}")
        except ValueError as error:
            return Prepared(item, problem=one_line(error))


# --- the pass -------------------------------------------------------------------------------------


class Pass:
    """See the module's docstring. Rank 0 alone writes lock, status and settings."""

    def __init__(self, directory: Path, config: Any, world: World) -> None:
        self.directory, self._config, self._world = directory, config, world
        self.path = directory / "scores.jsonl"
        self._stopped_by, self._listens = 0, False
        self._lock: int | None = None
        self._status: Status | None = None
        self._progress: Progress | None = None
        self._lines: IO[str] | None = None
        self._began = time.monotonic()
        self._what, self._done, self._total, self._said = "", 0, 0, 0.0

    def __enter__(self) -> Pass:
        """Lock the directory; --resume never moves an earlier run aside. Raises UserError."""
        self._listens = stop.listen()
        problem: Exception | None = None
        if self._world.is_main:
            try:
                self._lock = lock.take(self.directory)
                if self._config.resume == "never" and (
                    aside := statuses.move_aside(self.directory)
                ):
                    log.info("earlier results are now in %s", aside)
            except Exception as error:
                problem = error
        if distributed.any_rank(problem is not None, self._world):
            self._let_go()
            raise problem or SystemExit(2)  # rank 0 has said why
        outcome.announce(self.directory)
        if self._world.is_main:
            self._status = Status(
                self.directory, recipe=RECIPE, pid=outcome.launcher_pid(),
                world_size=self._world.size, total_steps=0,
            )  # fmt: skip
            self._status.write(step=0)
            run_directory.describe(self.directory, self._config, self._world.size)
        return self

    @property
    def seconds(self) -> float:
        """How long the pass has taken so far."""
        return time.monotonic() - self._began

    def open_scores(self, made_by: str) -> None:
        """Continue scores.jsonl where its first line names `made_by`; else begin it anew."""
        if self._world.is_main:
            head = json.dumps({"made_by": made_by}) + "\n"
            if not _begins_with(self.path, head):
                for part in self._parts():
                    part.unlink()
                write_text(self.path, head)
            self._merge()
        stop.hold()
        distributed.barrier(self._world)
        stop.all_hold()

    def batches(
        self,
        root: Path,
        names: Sequence[str],
        prepare: Callable[[Tensor], Tensor],
        batch_size: int,
        *,
        workers: int,
        known: Container[bytes] = (),
    ) -> Iterator[list[Prepared]]:
        """This rank's files among `names` that have no row yet; ends early when asked to stop."""
        pending = self._pending(root, names)
        self._begin("scoring", len(pending))
        if not pending:
            return
        few = len(pending) <= 2 * batch_size  # workers would start for longer than they help
        loader = make_eval_loader(
            Pictures(root, pending, prepare, known), batch_size,
            World(device=self._world.device), workers=0 if few else workers, collate=list,
        )  # fmt: skip
        rank = self._world.rank
        own = self.path.with_name(f"scores.{rank}.jsonl") if rank else self.path
        with own.open("a", encoding="utf-8") as self._lines:
            for batch in loader:
                yield batch
                self._advance(len(batch))
                if self._asked_to_stop:
                    return

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows of the batch at hand; with the system when this returns."""
        assert self._lines is not None
        self._lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._lines.flush()

    def table(self, root: Path, names: Sequence[str], fields: Sequence[str] = ("score",)) -> Table:
        """The rows of `names` as they are now, after every rank came to `meet`."""
        table = Table(self.path, keys_of(root, names), fields)
        if len(table) != len(names):
            log.warning("%d files came, went or changed while they were scored",
                        abs(len(table) - len(names)))  # fmt: skip
        return table

    def place(self, folders: Folders, table: Table) -> bool:
        """Bring the table's files to its folders; False when asked to stop before the end."""
        self._begin("placing", len(table))
        for _ in folders.place(table):
            self._advance()
            if self._asked_to_stop:
                return False
        folders.move_strays(table, self.directory / "aside")
        return True

    def _begin(self, what: str, total: int) -> None:
        """A part of the work with `total` files begins; what: in words, for lines and status."""
        self._close_progress()
        self._what, self._done, self._total, self._said = what, 0, total, time.monotonic()
        if self._world.is_main:
            self._progress = Progress(total, 0, lines=False)

    def _advance(self, count: int = 1) -> None:
        """`count` files more."""
        self._done += count
        if not (self._status and self._progress):
            return
        self._progress.show(self._done, 0, {})
        if self._status.is_due:
            eta = self._progress.eta_s(self._done)
            self._status.write(step=self._done, total_steps=self._total, eta_s=eta,
                               reason=self._what)  # fmt: skip
        if time.monotonic() - self._said >= _EVERY:
            self._said = time.monotonic()
            log.info("%s: %d of %d, %.4g a second", self._what, self._done, self._total,
                     self._progress.speed(self._done))  # fmt: skip

    @property
    def _asked_to_stop(self) -> bool:
        """Whether this process received a stop signal; every rank leaves its own loop for it."""
        return stop.number() != 0

    def meet(self) -> bool:
        """Wait for every rank, merge their rows; whether one of them was asked to stop."""
        self._stopped_by = distributed.largest(stop.number(), self._world)
        if self._world.is_main:
            self._merge()
        distributed.barrier(self._world)
        return self._stopped_by != 0

    def finish(
        self,
        reason: str = "",
        *,
        outputs: Sequence[Path] = (),
        data: dict[str, int] | None = None,
    ) -> int:
        """Close the run as done, or as stopped; its exit code. data: counts, for its report."""
        code, state = DONE, "done"
        if self._stopped_by:
            code, state = stop.exit_code_for(self._stopped_by), "stopped"
            flag = "" if self._config.resume == "auto" else " with --resume auto"
            reason = f"{stop.name_of(self._stopped_by)}: {self._what} stopped at {self._done} of " \
                     f"{self._total}; the same command{flag} continues it"  # fmt: skip
        self._close_progress()
        if self._status:
            self._status.write(
                state=state, exit_code=code, reason=reason, step=self._done, eta_s=None,
                total_steps=self._total, outputs=[str(path) for path in outputs], data=data or {},
            )  # fmt: skip
        distributed.barrier(self._world)
        return code

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._close_progress()
        if error is not None and self._world.size == 1 and self._status:
            failure = outcome.failure_of(error)
            statuses.close(self.directory, failure.code, failure.message)
        self._let_go()

    def _pending(self, root: Path, names: Sequence[str]) -> list[Item]:
        """This rank's files among `names` that no row tells of: a file's name decides the rank."""
        rank, size = self._world.rank, self._world.size
        items = [Item.at(root, name) for name in names if number_of(name) % size == rank]
        keys = np.fromiter((item.key for item in items), np.uint64, len(items))
        done = np.fromiter((key for key, _, _ in scored_rows(self.path)), np.uint64)
        return [items[number] for number in np.flatnonzero(~np.isin(keys, done))]

    def _parts(self) -> list[Path]:
        return sorted(self.directory.glob("scores.*.jsonl"))

    def _merge(self) -> None:
        """Take the other ranks' rows into scores.jsonl; a line cut off by a kill is cut away."""
        for part in [self.path, *self._parts()]:
            _cut_torn_line(part)
            if part != self.path:
                with part.open("rb") as rows, self.path.open("ab") as stream:
                    shutil.copyfileobj(rows, stream)
                part.unlink()

    def _close_progress(self) -> None:
        if self._progress:
            self._progress.close()
            self._progress = None

    def _let_go(self) -> None:
        if self._listens:
            stop.release()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _begins_with(path: Path, head: str) -> bool:
    """Whether the first line of the file is `head`. Raises UserError for what is no file."""
    try:
        with open_regular(path) as stream:
            return stream.readline() == head.encode()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; move it away") from None


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - (1 << 20)))
        tail = stream.read()
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if torn:
            log.info("%s: %d bytes of an unfinished row are cut away", path, torn)
            stream.truncate(end - torn)
