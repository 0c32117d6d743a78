"""Archives as files below a directory, whole or not at all, and never outside it.

    count = unpack([Path("val2017.zip")], Path("data/coco"))

zip (also in several parts), tar in every compression Python knows, and 7z where py7zr is installed
or a program unpacks it. Members that lead out of the directory, links and devices are refused, and
so are archives that would grow beyond all measure. Members come to light in a directory beside
the others and are moved when all are there; a killed process leaves that directory, and the next
call begins anew.
"""

from __future__ import annotations

import errno
import importlib.util
import io
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any, NoReturn

from shared.download import check_space
from shared.errors import MissingToolError, UserError, one_line
from shared.files import check_regular
from shared.progress import Meter

STAGING = ".unpacking"
LARGEST_GROWTH = 100  # times an archive's own size; text of one letter reaches 1,000
_ALWAYS_ALLOWED = 64 << 20  # bytes: small archives of text may grow more
_CHUNK = 1 << 20
_SEVEN_ZIP = (  # programs that unpack 7z: name, and arguments before archive and directory
    ("7zz", ("x", "-y", "-bso0", "-bsp0")),
    ("7z", ("x", "-y", "-bso0", "-bsp0")),
    ("7za", ("x", "-y", "-bso0", "-bsp0")),
    ("bsdtar", ("-x", "-f")),
)

# How the readers of archives fail on a damaged one: OSError too, from places that are not there.
_DAMAGED = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(NotImplementedError, RuntimeError, ValueError, LookupError, OverflowError),
)
_DAMAGED_NUMBERS = (None, errno.EINVAL, errno.ENAMETOOLONG, errno.EILSEQ)
Run = Callable[[Sequence[str]], int]


def unpack(parts: Sequence[Path], directory: Path, run: Run | None = None) -> int:
    """Unpack an archive, or the parts of one zip in order, into `directory`; how many files.

    run: starts a program and returns its exit code, for 7z without py7zr.
    Files that are there under the same names are replaced. Raises UserError for an archive that is
    damaged, encrypted, hostile or too large for the disk, MissingToolError for 7z without a way.
    """
    archive = parts[0]
    directory.mkdir(parents=True, exist_ok=True)
    staging = directory / f"{STAGING}.{archive.name}"
    shutil.rmtree(staging, ignore_errors=True)  # of a process that was killed
    staging.mkdir()
    try:
        for part in parts:
            check_regular(part)
        _unpack_into(parts, staging, run)
        count = _check_tree(staging, archive)
        _move(staging, directory)
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno not in _DAMAGED_NUMBERS:
            raise  # the disk's, not the archive's
        raise UserError(
            f"{archive} cannot be unpacked ({one_line(error)}): delete it and fetch it again"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return count


def _unpack_into(parts: Sequence[Path], staging: Path, run: Run | None) -> None:
    archive = parts[0]
    if len(parts) > 1 or zipfile.is_zipfile(archive):
        _unzip(parts, staging)
    elif _begins_with(archive, b"7z\xbc\xaf\x27\x1c"):
        _unpack_seven_zip(archive, staging, run)
    elif archive.stat().st_size and tarfile.is_tarfile(archive):
        _untar(archive, staging)
    else:
        raise UserError(f"{archive} is no zip, tar or 7z archive: delete it and fetch it again")


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(magic)) == magic


def _unzip(parts: Sequence[Path], staging: Path) -> None:
    with _joined(parts) as stream, zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        for member in members:
            _check_zip_member(member, parts[0])
        total = sum(member.file_size for member in members)
        _check_growth(total, sum(part.stat().st_size for part in parts), parts[0], staging)
        meter = Meter(total, 0)
        meter.name = parts[0].name
        try:
            for member in members:
                _write_member(archive, member, staging / member.filename, meter)
        finally:
            meter.close()


def _write_member(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path, meter: Meter
) -> None:
    if member.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("wb") as stream:
        while chunk := source.read(_CHUNK):
            stream.write(chunk)
            meter.add(len(chunk))


def _check_zip_member(member: zipfile.ZipInfo, archive: Path) -> None:
    mode = member.external_attr >> 16
    kind = stat.S_IFMT(mode)
    if kind and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        _refuse(archive, member.filename, "is a link or a device")
    if member.flag_bits & 1:
        _refuse(archive, member.filename, "is encrypted")
    _check_name(member.filename, archive)


def _untar(path: Path, staging: Path) -> None:
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        for member in members:
            if not (member.isfile() or member.isdir()):
                _refuse(path, member.name, "is a link or a device")
            _check_name(member.name, path)
        _check_growth(sum(m.size for m in members), path.stat().st_size, path, staging)
        archive.extractall(staging, members, filter="data")


def can_unpack_7z() -> bool:
    """Whether py7zr or a program for 7z is there."""
    if importlib.util.find_spec("py7zr"):
        return True
    return any(shutil.which(name) for name, _ in _SEVEN_ZIP)


def _unpack_seven_zip(path: Path, staging: Path, run: Run | None) -> None:
    try:
        import py7zr  # pyright: ignore[reportMissingImports]
    except ImportError:
        _unpack_by_program(path, staging, run)
        return
    try:
        with py7zr.SevenZipFile(path) as archive:
            if archive.needs_password():
                _refuse(path, path.name, "is encrypted")
            for name in archive.getnames():
                _check_name(name, path)
            info = archive.archiveinfo()
            _check_growth(info.uncompressed, path.stat().st_size, path, staging)
            archive.extractall(staging)
    except (py7zr.Bad7zFile, py7zr.exceptions.ArchiveError) as error:
        raise UserError(
            f"{path} cannot be unpacked ({one_line(error)}): delete it and fetch it again"
        ) from None


def _unpack_by_program(path: Path, staging: Path, run: Run | None) -> None:
    for name, arguments in _SEVEN_ZIP:
        program = shutil.which(name)
        if program and run:
            where = ["-C", str(staging)] if name == "bsdtar" else [f"-o{staging}"]
            code = run([program, *arguments, str(path), *where])
            if code:
                raise UserError(
                    f"{path} cannot be unpacked ({name} ended with {code}): delete it and fetch it "
                    "again"
                )
            return
    raise MissingToolError(
        f"{path.name} needs a program for 7z: pip install py7zr, or install 7-Zip (7z) or bsdtar, "
        "then type the same command; what was fetched stays"
    )


def _check_name(name: str, archive: Path) -> None:
    """Refuse a member that would lie outside the directory."""
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        _refuse(archive, name, "leads out of the directory")
    if not name.strip("/. ") or any(ord(char) < 32 for char in name):
        _refuse(archive, name, "is no name of a file")


def _check_growth(total: int, packed: int, archive: Path, directory: Path) -> None:
    if total > max(LARGEST_GROWTH * packed, _ALWAYS_ALLOWED):
        raise UserError(
            f"{archive} would grow from {packed:,} to {total:,} bytes, more than "
            f"{LARGEST_GROWTH} times its size: it was not unpacked; do not use it"
        )
    check_space(directory, total)


def _check_tree(staging: Path, archive: Path) -> int:
    """How many files came out; a second look at what a program has written."""
    count = 0
    for path in staging.rglob("*"):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            _refuse(archive, str(path.relative_to(staging)), "is a link or a device")
        count += stat.S_ISREG(mode)
    return count


def _refuse(archive: Path, name: str, why: str) -> NoReturn:
    raise UserError(
        f"{archive} holds {name!r}, which {why}: nothing was unpacked; do not use this archive"
    )


def _move(source: Path, target: Path) -> None:
    """Move what is in `source` into `target`, directories into those of the same name."""
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _move(entry, place)
        else:
            os.replace(entry, place)  # noqa: PTH105, Path.replace says nothing else


def _joined(parts: Sequence[Path]) -> IO[bytes]:
    """One file of all parts, to be read."""
    if len(parts) == 1:
        return parts[0].open("rb")
    return io.BufferedReader(_Parts(parts), _CHUNK)  # type: ignore[return-value]


class _Parts(io.RawIOBase):
    """Several files read as one, without a copy of them."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self._streams = [part.open("rb") for part in parts]
        self._sizes = [part.stat().st_size for part in parts]
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place in the whole."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: sum(self._sizes)}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the part that holds the place, at most to that part's end."""
        start = 0
        for stream, size in zip(self._streams, self._sizes, strict=True):
            if start <= self._at < start + size:
                stream.seek(self._at - start)
                count = stream.readinto(memoryview(buffer)[: start + size - self._at])
                self._at += count
                return count
            start += size
        return 0

    def close(self) -> None:
        """Close all parts."""
        for stream in self._streams:
            stream.close()
        super().close()
