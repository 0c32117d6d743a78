"""Getting a data set: what is there, what it takes, its files and archives, one after another."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from multimodal.sources import Archive, DataSet, Source
from shared.download import fetch, part_of, plan_of, size_of
from shared.errors import UserError
from shared.progress import amount
from shared.unpack import Run, unpack
from shared.web import Client, DownloadError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How to get data sets.

    run: starts a program (for 7z). key: for addresses that ask for one. otherwise: what to do when
    the source fails.
    """

    skip_existing: bool = False
    verify: bool = False
    delete_archives: bool = False
    run: Run | None = None
    key: str | None = None
    otherwise: str = "fetch the file by hand and put it there"


@dataclass(frozen=True)
class Need:
    """What getting a data set takes: bytes to fetch, and bytes on the disk in all."""

    fetch: int
    disk: int


def need_of(data_set: DataSet, root: Path) -> Need:
    """What is still to be fetched and written for the data set."""
    needs = [_need_of_files(data_set, root)]
    needs += [_need_of_archive(archive, root) for archive in data_set.archives]
    return Need(sum(need.fetch for need in needs), sum(need.disk for need in needs))


def _need_of_files(data_set: DataSet, root: Path) -> Need:
    missing = [s for s in data_set.files if not (root / s.folder / s.file.name).is_file()]
    clips = max(0, data_set.clips - _count(root / "audio", deep=True))
    total = sum(_left(source, root) for source in missing) + clips * data_set.clip_bytes
    return Need(total, total)


def _need_of_archive(archive: Archive, root: Path) -> Need:
    if is_unpacked(archive, root):
        return Need(0, 0)
    share = archive.unpacked // len(archive.parts)  # where nobody publishes a size
    parts = sum(_left(part, root, share) for part in archive.parts)
    return Need(parts, parts + archive.unpacked)


def check_space(need: Need, name: str, root: Path) -> None:
    """Raise UserError when the disk of `root` has less than `name` takes."""
    directory = next(path for path in (root, *root.parents) if path.is_dir())
    free = shutil.disk_usage(directory).free
    if need.disk > free:
        raise UserError(
            f"{name}: {amount(need.disk)} are needed in {root} for archives and what they hold "
            f"and {amount(free)} are free: free some space, or name another disk by --data-root"
        )


def check_each(needs: Mapping[str, Need], root: Path) -> None:
    """Warn of the data sets for which the disk has no room; UserError when it has for none."""
    refused: list[UserError] = []
    for name, need in needs.items():
        try:
            check_space(need, name, root)
        except UserError as error:
            log.warning("%s", error)
            refused.append(error)
    if len(refused) == len(needs):
        raise refused[0]


def get(data_set: DataSet, root: Path, options: Options) -> None:
    """Fetch the files and archives of a data set and unpack these, as far as the disk allows.

    Raises UserError, DownloadError, MissingToolError; what came until then is kept.
    """
    client = Client(options.otherwise)
    check_space(_need_of_files(data_set, root), data_set.name, root)
    _fetch(client, data_set.files, root, options)
    without_room: UserError | None = None
    for archive in data_set.archives:
        if is_unpacked(archive, root) and not (options.verify and _are_there(archive, root)):
            log.info("%s: %s is there", data_set.name, ", ".join(archive.holds))
            continue
        try:
            check_space(_need_of_archive(archive, root), archive.parts[0].file.name, root)
        except UserError as error:
            log.warning("%s; it is left out", error)
            without_room = error
            continue
        _get_archive(client, data_set, archive, root, options)
    if without_room:
        raise without_room


def _get_archive(
    client: Client, data_set: DataSet, archive: Archive, root: Path, options: Options
) -> None:
    _fetch(client, archive.parts, root, options)
    if not is_unpacked(archive, root):
        _unpack(data_set, archive, root, options)
    if options.delete_archives:
        _delete(archive, root)


def lacking(data_set: DataSet, root: Path) -> str:
    """What keeps the data set from being trained on; '' when enough is there.

    Of sounds that come one by one half of those listed will do: some are gone for good.
    """
    files = [s.file.name for s in data_set.files if not (root / s.folder / s.file.name).is_file()]
    files = [name for name in files if "karpathy" not in name]  # val2017 does in their place
    folders = [path for a in data_set.archives for path in a.holds if not is_unpacked(a, root)]
    missing = files or folders
    if missing:
        return f"{', '.join(missing[:3])} missing"
    clips = _count(root / "audio", deep=True)
    return f"{clips:,} of {data_set.clips:,} clips" if clips < data_set.clips / 2 else ""


def is_unpacked(archive: Archive, root: Path) -> bool:
    """Whether what the archive holds is there, counted."""
    return all(_count(root / path) >= count for path, count in archive.holds.items())


def _are_there(archive: Archive, root: Path) -> bool:
    return all((root / part.folder / part.file.name).is_file() for part in archive.parts)


def _fetch(client: Client, sources: Sequence[Source], root: Path, options: Options) -> None:
    """Fetch what is missing, each file from the first of its addresses that gives it."""
    for source in sources:
        directory = root / source.folder
        if options.skip_existing and source.file.checksum and _has_size(source, directory):
            continue
        urls = tuple(url.replace("{key}", options.key or "") for url in source.file.urls)
        file = replace(source.file, urls=urls)
        plan = plan_of([file], directory, read_again=options.verify)
        if plan.missing:
            log.info("%s: fetching", directory / file.name)
        fetch(client, plan)


def _has_size(source: Source, directory: Path) -> bool:
    path = directory / source.file.name
    return path.is_file() and source.file.size in (None, path.stat().st_size)


def _unpack(data_set: DataSet, archive: Archive, root: Path, options: Options) -> None:
    paths = [root / part.folder / part.file.name for part in archive.parts]
    log.info("%s: unpacking %s", data_set.name, paths[0].name)
    count = unpack(paths, root, options.run)
    if not is_unpacked(archive, root):
        found = {path: _count(root / path) for path in archive.holds}
        raise DownloadError(
            f"{paths[0]} held {count} files, but not what it should: found {found}, expected "
            f"{archive.holds}; --verify checks the archive again"
        )


def _delete(archive: Archive, root: Path) -> None:
    for part in archive.parts:
        path = root / part.folder / part.file.name
        if path.is_file():
            log.info("deleting %s (--delete-archives)", path)
            path.unlink()


def _left(source: Source, root: Path, guess: int = 1_000_000) -> int:
    """Bytes of a file that are still to be fetched; `guess` of one whose size nobody publishes."""
    path = root / source.folder / source.file.name
    if _has_size(source, path.parent):
        return 0
    size = guess if source.file.size is None else source.file.size
    return max(0, size - size_of(part_of(path)))


def _count(path: Path, *, deep: bool = False) -> int:
    """Files and folders in a folder, 1 for a file, 0 where there is nothing."""
    if path.is_file():
        return 1
    if not path.is_dir():
        return 0
    if deep:
        return sum(len(files) for _, _, files in os.walk(path))
    with os.scandir(path) as entries:
        return sum(1 for entry in entries if not entry.name.startswith("."))


def pointed_at(data_set: DataSet, base: str) -> DataSet:
    """The data set with every address at `base`/<file name>: a mirror of one's own."""

    def moved(source: Source) -> Source:
        url = f"{base.rstrip('/')}/{source.file.name}"
        return replace(source, file=replace(source.file, urls=(url,)))

    archives = tuple(
        replace(archive, parts=tuple(map(moved, archive.parts))) for archive in data_set.archives
    )
    return replace(data_set, files=tuple(map(moved, data_set.files)), archives=archives)
