"""Files of a Hugging Face repository in a directory: those asked for, each whole or not there.

    repository = HubRepository.open("owner/name", revision, endpoint=endpoint)
    names = ["config.json", *repository.weight_files("vision_model.")]
    repository.fetch(repository.plan(names, directory))

huggingface_hub lists and names the files. Their bytes are fetched here: its own download (1.33)
begins anew after a killed process, checks no checksum, and its Xet transfer goes past a mirror.
A file on its way is NAME.part and is continued by the next call; `.download.json` beside the files
remembers what was verified, so that 10 GB are not read again by every call.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import httpx
from huggingface_hub import HfApi, ModelInfo, hf_hub_url
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers

from shared.errors import INTERRUPTED, UserError, did_you_mean, one_line
from shared.files import read_json, write_json
from shared.progress import clock
from shared.transport import PATIENCE, DownloadError, Line, Patience, TransientError, refusal

log = logging.getLogger(__name__)

OFFICIAL_ENDPOINT = "https://huggingface.co"
NOTES = ".download.json"
PART = ".part"

_INDEX, _SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LINE_EVERY = 10.0  # seconds between lines of progress in a log


class DownloadInterrupted(UserError):  # noqa: N818, it is no error
    """Ctrl-C: what was fetched stays; exit code 130."""

    exit_code = INTERRUPTED


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository. checksum: `sha256:…` of a large file, `git:…` of a small one."""

    name: str
    size: int
    checksum: str


@dataclass(frozen=True)
class Plan:
    """What a directory holds and what it lacks. continued: bytes of `missing` in .part files."""

    directory: Path
    present: list[RemoteFile]
    missing: list[RemoteFile]
    continued: int

    @property
    def remaining(self) -> int:
        """Bytes still to fetch."""
        return sum(file.size for file in self.missing) - self.continued


@dataclass(frozen=True)
class HubRepository:
    """A model repository at one commit; `open` asks the Hub for it."""

    repo_id: str
    commit: str
    endpoint: str
    files: dict[str, RemoteFile]
    line: Line

    @classmethod
    def open(
        cls,
        repo_id: str,
        revision: str,
        *,
        endpoint: str = OFFICIAL_ENDPOINT,
        send_token: bool = True,
        patience: Patience | None = None,
    ) -> HubRepository:
        """The repository as it is at `revision` (a commit, branch or tag).

        endpoint: the Hub or a mirror of it. send_token: whether huggingface.co is given the user's
        token (HF_TOKEN or login); a mirror never is.
        Raises UserError for what is not there, not allowed or not understood, and when
        HF_HUB_OFFLINE is set; DownloadError when the endpoint cannot be reached.
        """
        endpoint = _checked_endpoint(endpoint)
        token = None if send_token and endpoint == OFFICIAL_ENDPOINT else False
        line = Line(patience or PATIENCE, build_hf_headers(token=token))
        try:
            info = _listing(line, HfApi(endpoint=endpoint, token=token), repo_id, revision)
            files = {file.name: file for file in map(_remote_file, info.siblings or [])}
        except HFValidationError as error:
            raise UserError(f"repository {repo_id!r} is no owner/name: {one_line(error)}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DownloadError(
                f"{_host(endpoint)} did not answer as a Hugging Face Hub does "
                f"({type(error).__name__}: {one_line(error)}): check the endpoint {endpoint}, and "
                "whether a login page of the network stands before it"
            ) from None
        if _COMMIT.fullmatch(revision) and info.sha != revision:
            raise DownloadError(
                f"{_host(endpoint)} gives commit {info.sha} in place of {revision}: it is out of "
                "step with the Hub; use another endpoint"
            )
        return cls(repo_id, info.sha or revision, endpoint, files, line)

    def weight_files(self, prefix: str) -> list[str]:
        """The safetensors files with the weights whose names start with `prefix`.

        Of a sharded checkpoint: its index, and the shards that the index names for them.
        Raises UserError when there are none, or when the index is not to be trusted.
        """
        if _INDEX in self.files:
            return [_INDEX, *self._shards(prefix)]
        if _SINGLE_FILE in self.files:
            return [_SINGLE_FILE]
        pickled = sorted(name for name in self.files if name.endswith((".bin", ".pt", ".pth")))
        has = f"only {pickled[0]}, which is pickled" if pickled else "no weights at all"
        raise UserError(
            f"{self.repo_id} at {self.commit} has {has}: give a repository or revision with "
            f"{_SINGLE_FILE} or {_INDEX}"
        )

    def plan(self, names: Iterable[str], directory: Path) -> Plan:
        """What of `names` is in `directory`, checked, and what has to be fetched; writes nothing.

        Raises UserError for a name that the repository does not hold or that leads elsewhere.
        """
        notes = _Notes(directory)
        wanted = [self._file(name) for name in dict.fromkeys(names)]
        try:
            present = [file for file in wanted if _is_there(file, directory, notes)]
            missing = [file for file in wanted if file not in present]
            return Plan(directory, present, missing, sum(map(notes.part_size, missing)))
        except OSError as error:
            raise _unusable(directory, error) from None

    def fetch(self, plan: Plan) -> None:
        """Fetch what the plan misses.

        Raises UserError (no space, another download at work there), DownloadError (the network,
        the server, a wrong checksum) and DownloadInterrupted; what came until then is kept.
        """
        meter = _Meter(plan.remaining + plan.continued, plan.continued)
        with _owned(plan.directory):
            _check_space(plan.directory, plan.remaining)
            notes = _Notes(plan.directory)
            try:
                for file in plan.present:
                    notes.remember(file)
                for file in plan.missing:
                    self._fetch(file, plan.directory, notes, meter)
                notes.save()
            except KeyboardInterrupt:
                raise DownloadInterrupted(
                    f"interrupted with {meter}; the same command continues there"
                ) from None
            except OSError as error:
                raise _unusable(plan.directory, error) from None
            finally:
                meter.close()

    def read(self, name: str) -> bytes:
        """The content of a small file, verified and not kept. Errors as in `fetch`."""
        file = self._file(name)
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            self._fetch(file, directory, _Notes(directory), _Meter(0, 0))
            return (directory / name).read_bytes()

    def _file(self, name: str) -> RemoteFile:
        if name not in self.files:
            raise UserError(
                f"{self.repo_id} at {self.commit} holds no {name}"
                f"{did_you_mean(name, self.files) or '; check the repository and the revision'}"
            )
        _refuse_unsafe(name)
        return self.files[name]

    def _shards(self, prefix: str) -> list[str]:
        try:
            weight_map = json.loads(self.read(_INDEX))["weight_map"]
            shards = {shard for name, shard in weight_map.items() if name.startswith(prefix)}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{_INDEX} of {self.repo_id} has no readable weight_map") from None
        if not shards:
            raise UserError(
                f"{self.repo_id} holds no weights whose names start with {prefix!r}: check that it "
                "is the right repository"
            )
        for shard in shards:
            _refuse_unsafe(shard)
        return sorted(shards)

    def _fetch(self, file: RemoteFile, directory: Path, notes: _Notes, meter: _Meter) -> None:
        """Fetch, verify and put in place one file."""
        path = directory / file.name
        part = _part_of(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        notes.begin_part(file)
        meter.name = file.name
        self.line.persist(lambda: self._receive(file, part, meter), lambda: _size(part))
        part.touch()  # of an empty file nothing is received
        if checksum_of(part, file.checksum) != file.checksum:
            part.unlink()
            raise DownloadError(
                f"{file.name} came from {_host(self.endpoint)} with a wrong checksum and was "
                "removed: the same command fetches it again; if that repeats, use another endpoint"
            )
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
        notes.remember(file)
        notes.save()

    def _receive(self, file: RemoteFile, part: Path, meter: _Meter) -> None:
        """Add to `part` what one connection brings."""
        position = _size(part)
        if position == file.size:
            return
        # the commit, so that all files are of one version even when a branch moves
        url = hf_hub_url(self.repo_id, file.name, revision=self.commit, endpoint=self.endpoint)
        with contextlib.closing(self.line.open(url, position, file.name)) as response:
            known = _check_answer(response, file, position)
            with part.open("ab") as stream:
                for chunk in self.line.body(response):
                    new, known = chunk[known:], max(0, known - len(chunk))
                    if position + len(new) > file.size:
                        raise _wrong_length(response, file, f"more than {file.size:,}")
                    stream.write(new)
                    position += len(new)
                    meter.add(len(new))
        if position < file.size:
            raise TransientError(response.url.host, "connection closed early")


# --- answers --------------------------------------------------------------------------------------


def _listing(line: Line, api: HfApi, repo_id: str, revision: str) -> ModelInfo:
    """What the Hub says about the repository: its commit and its files with their checksums."""

    def call() -> ModelInfo:
        seconds = line.patience.silence
        return api.model_info(repo_id, revision=revision, files_metadata=True, timeout=seconds)

    what = f"{repo_id} at revision {revision}"
    return line.persist(lambda: line.ask(_host(api.endpoint), call, what))


def _check_answer(response: httpx.Response, file: RemoteFile, position: int) -> int:
    """How many bytes of the body are in the .part file already; raises for a wrong answer."""
    if response.status_code not in (200, 206):
        raise refusal(response, file.name)
    if "text/html" in response.headers.get("Content-Type", "") and "html" not in file.name:
        raise DownloadError(
            f"{response.url.host} sent a web page in place of {file.name}: a login page of the "
            "network or a block stands before it; open the address in a browser, or use another "
            "endpoint"
        )
    if response.status_code == 206:
        expected = f"bytes {position}-{file.size - 1}/{file.size}"
        given = response.headers.get("Content-Range", "nothing")
        if given != expected:
            raise _wrong_length(response, file, given)
        return 0
    length = response.headers.get("Content-Length")
    is_plain = "Content-Encoding" not in response.headers
    if is_plain and length is not None and length != str(file.size):
        raise _wrong_length(response, file, length)
    return position  # a server that ignored the Range sends everything again


def _wrong_length(response: httpx.Response, file: RemoteFile, given: str) -> DownloadError:
    return DownloadError(
        f"{response.url.host} sends {given} bytes for {file.name}, which has {file.size:,}: it "
        "holds another version or a damaged copy; use another endpoint"
    )


def _host(endpoint: str) -> str:
    return urlsplit(endpoint).hostname or endpoint


def _checked_endpoint(endpoint: str) -> str:
    """`endpoint` without a slash at its end. Raises UserError when it is no web address."""
    try:
        parts = urlsplit(endpoint.strip().rstrip("/"))
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UserError(
            f"endpoint {endpoint!r} is no web address: expected https://host, for example "
            "https://hf-mirror.com"
        )
    return endpoint.strip().rstrip("/")


# --- files ----------------------------------------------------------------------------------------


def _remote_file(sibling: Any) -> RemoteFile:
    """A file of the Hub's listing. Raises ValueError when size or checksum is missing."""
    checksum = f"sha256:{sibling.lfs.sha256}" if sibling.lfs else f"git:{sibling.blob_id}"
    size = sibling.lfs.size if sibling.lfs else sibling.size
    if not isinstance(size, int) or checksum == "git:None":
        raise ValueError(f"no size or checksum for {sibling.rfilename}")
    return RemoteFile(sibling.rfilename, size, checksum)


def checksum_of(path: Path, like: str) -> str:
    """The checksum of a file, of the kind of `like`: `sha256:…`, or `git:…` for a git blob."""
    if like.startswith("sha256:"):
        kind, digest = "sha256", hashlib.sha256()
    else:
        header = b"blob %d\0" % path.stat().st_size
        kind, digest = "git", hashlib.sha1(header, usedforsecurity=False)
    with path.open("rb") as stream:
        return f"{kind}:{hashlib.file_digest(stream, lambda: digest).hexdigest()}"


def _is_there(file: RemoteFile, directory: Path, notes: _Notes) -> bool:
    """Whether the file is in the directory, as the repository has it."""
    path = directory / file.name
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    if notes.knows(file):
        return True
    log.info("checking %s (%s)", path, _amount(file.size))
    if checksum_of(path, file.checksum) != file.checksum:
        log.warning("%s has another content than the repository; it is fetched again", path)
        return False
    notes.remember(file)
    return True


def _refuse_unsafe(name: Any) -> None:
    """Raise UserError when a name out of a repository is not that of a file below a directory."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    is_plain = parts and str(PurePosixPath(name)) == name and name.isprintable()
    if not is_plain or {"/", "..", NOTES} & set(parts) or "\\" in name or name.endswith(PART):
        raise UserError(
            f"the repository names {name!r} as a file, which leads out of the directory or is no "
            "file name: nothing was fetched; do not use this repository"
        )


class _Notes:
    """What an earlier call has verified, and which file each .part belongs to."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        stored = read_json(directory / NOTES)
        stored = stored if isinstance(stored, dict) else {}
        self._files, self._parts = (
            dict(stored[key]) if isinstance(stored.get(key), dict) else {}
            for key in ("files", "parts")
        )

    def save(self) -> None:
        if self._files or self._parts:
            write_json(self._directory / NOTES, {"files": self._files, "parts": self._parts})

    def knows(self, file: RemoteFile) -> bool:
        return self._files.get(file.name) == self._entry(file)

    def remember(self, file: RemoteFile) -> None:
        self._files[file.name] = self._entry(file)
        self._parts.pop(file.name, None)

    def part_size(self, file: RemoteFile) -> int:
        """Bytes of the file that an earlier call has left; 0 when they are of another version."""
        size = _size(_part_of(self._directory / file.name))
        return size if self._parts.get(file.name) == file.checksum and size <= file.size else 0

    def begin_part(self, file: RemoteFile) -> None:
        """Say whose bytes the .part will hold, before the first; drops those of another version."""
        if not self.part_size(file):
            _part_of(self._directory / file.name).unlink(missing_ok=True)
        if self._parts.get(file.name) != file.checksum:
            self._parts[file.name] = file.checksum
            self.save()

    def _entry(self, file: RemoteFile) -> list[Any]:
        status = (self._directory / file.name).stat()
        return [file.checksum, status.st_size, status.st_mtime_ns]


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + PART)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextlib.contextmanager
def _owned(directory: Path) -> Iterator[None]:
    """Make `directory`, and let no other download write there until the block is left."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{directory} cannot be used: {one_line(error)}; give another") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UserError(
            f"another download is at work in {directory}: wait for it, or stop it first"
        ) from None
    except OSError:
        pass  # a network file system without locks
    try:
        yield
    finally:
        os.close(handle)


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"the disk of {directory} has {_amount(free)} free and {_amount(needed)} are to be "
            f"fetched, {needed - free:,} bytes too many: free some space or give another directory"
        )


def _unusable(directory: Path, error: OSError) -> DownloadError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(
            f"the disk of {directory} is full: free some space; the same command continues"
        )
    return DownloadError(f"{directory} cannot be used: {one_line(error)}")


def _amount(size: float) -> str:
    """9985123456 → '9.99 GB'."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


class _Meter:
    """How far a fetch is: a bar on a terminal, in a log a line every ten seconds."""

    def __init__(self, total: int, done: int) -> None:
        self.name = ""
        self._total, self._done, self._start = total, done, done
        self._began = self._line_at = time.monotonic()
        self._bar = None
        if total > done and sys.stderr.isatty() and sys.stdout.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, unit="B", unit_scale=True, dynamic_ncols=True
            )

    def __str__(self) -> str:
        return f"{_amount(self._done)} of {_amount(self._total)}"

    def add(self, count: int) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.set_description(self.name, refresh=False)
            self._bar.update(count)
        elif self._total and time.monotonic() - self._line_at >= _LINE_EVERY:
            self._line_at = time.monotonic()
            speed = (self._done - self._start) / (self._line_at - self._began)
            left = clock((self._total - self._done) / max(speed, 1.0))
            log.info("%s: %s, %s/s, %s left", self.name, self, _amount(speed), left)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
