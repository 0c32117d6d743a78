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

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, hf_hub_url
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import build_hf_headers

from shared.errors import UserError, did_you_mean, one_line
from shared.fetch import fetch_all, fetch_one, unusable
from shared.fetched import NOTES, PART, Notes, is_there
from shared.progress import Meter
from shared.transport import PATIENCE, DownloadError, Line, Patience, hub_advice

log = logging.getLogger(__name__)

OFFICIAL_ENDPOINT = "https://huggingface.co"

Kind = Literal["model", "dataset"]

_OTHER_FORMS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf")
_INDEX, _SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
    kind: Kind = "model"
    address: Callable[[str], str] | None = None  # of a file's name, where it is not the Hub's own

    @classmethod
    def open(
        cls,
        repo_id: str,
        revision: str,
        *,
        endpoint: str = OFFICIAL_ENDPOINT,
        send_token: bool = True,
        patience: Patience | None = None,
        kind: Kind = "model",
    ) -> HubRepository:
        """The repository as it is at `revision` (a commit, branch or tag).

        endpoint: the Hub or a mirror of it. kind: of the repository. send_token: whether
        huggingface.co is given the user's token (HF_TOKEN or login); a mirror never is.
        Raises UserError for what is not there, not allowed or not understood, and when
        HF_HUB_OFFLINE is set; DownloadError when the endpoint cannot be reached.
        """
        endpoint = checked_endpoint(endpoint)
        token = None if send_token and endpoint == OFFICIAL_ENDPOINT else False
        headers = build_hf_headers(token=token)
        line = Line(patience or PATIENCE, headers, hub_advice(endpoint))
        try:
            info = _listing(line, HfApi(endpoint=endpoint, token=token), repo_id, revision, kind)
            files = {file.name: file for file in map(_remote_file, info.siblings or [])}
        except HFValidationError as error:
            raise UserError(f"repository {repo_id!r} is no owner/name: {one_line(error)}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DownloadError(
                f"{host_of(endpoint)} did not answer as a Hugging Face Hub does "
                f"({type(error).__name__}: {one_line(error)}): check the endpoint {endpoint}, and "
                "whether a login page of the network stands before it"
            ) from None
        if _COMMIT.fullmatch(revision) and info.sha != revision:
            raise DownloadError(
                f"{host_of(endpoint)} gives commit {info.sha} in place of {revision}: it is out of "
                "step with the Hub; use another endpoint"
            )
        return cls(repo_id, info.sha or revision, endpoint, files, line, kind)

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

    def one_copy(self) -> list[str]:
        """All files, but for weights that are there as safetensors too."""
        is_whole = any(name.endswith(".safetensors") for name in self.files)
        left_out = _OTHER_FORMS if is_whole else ()
        return [name for name in self.files if not name.endswith((".gitattributes", *left_out))]

    def plan(self, names: Iterable[str], directory: Path) -> Plan:
        """What of `names` is in `directory`, checked, and what has to be fetched; writes nothing.

        Raises UserError for a name that the repository does not hold or that leads elsewhere.
        """
        notes = Notes(directory)
        wanted = [self._file(name) for name in dict.fromkeys(names)]
        try:
            present = [file for file in wanted if is_there(file, directory, notes)]
            missing = [file for file in wanted if file not in present]
            return Plan(directory, present, missing, sum(map(notes.part_size, missing)))
        except OSError as error:
            raise unusable(directory, error) from None

    def fetch(self, plan: Plan) -> None:
        """Fetch what the plan misses.

        Raises UserError (no space, another download at work there), DownloadError (the network,
        the server, a wrong checksum) and DownloadInterrupted; what came until then is kept.
        """
        fetch_all(self.line, plan.directory, plan.missing, url_of=self._url, present=plan.present)

    def read(self, name: str) -> bytes:
        """The content of a small file, verified and not kept. Errors as in `fetch`."""
        file = self._file(name)
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            fetch_one(self.line, directory, file, self._url(file), Notes(directory), Meter(0, 0))
            return (directory / name).read_bytes()

    def _file(self, name: str) -> RemoteFile:
        if name not in self.files:
            raise UserError(
                f"{self.repo_id} at {self.commit} holds no {name}"
                f"{did_you_mean(name, self.files) or '; check the repository and the revision'}"
            )
        _refuse_unsafe(name)
        return self.files[name]

    def _url(self, file: RemoteFile) -> str:
        if self.address:
            return self.address(file.name)
        # the commit, so that all files are of one version even when a branch moves
        return hf_hub_url(
            self.repo_id,
            file.name,
            repo_type=self.kind,
            revision=self.commit,
            endpoint=self.endpoint,
        )

    def _shards(self, prefix: str) -> list[str]:
        try:
            weight_map = json.loads(self.read(_INDEX))["weight_map"]
            shards = {shard for name, shard in weight_map.items() if name.startswith(prefix)}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{_INDEX} of {self.repo_id} has no readable weight_map") from None
        if not shards:
            raise UserError(
                f"{self.repo_id} holds no weights whose names start with {prefix!r}: check that it "
                "is the right repository"
            )
        for shard in shards:
            _refuse_unsafe(shard)
        return sorted(shards)


# --- answers --------------------------------------------------------------------------------------


def _listing(
    line: Line, api: HfApi, repo_id: str, revision: str, kind: Kind
) -> ModelInfo | DatasetInfo:
    """What the Hub says about the repository: its commit and its files with their checksums."""

    def call() -> ModelInfo | DatasetInfo:
        seconds = line.patience.silence
        ask = api.model_info if kind == "model" else api.dataset_info
        return ask(repo_id, revision=revision, files_metadata=True, timeout=seconds)

    what = f"{repo_id} at revision {revision}"
    return line.persist(lambda: line.ask(host_of(api.endpoint), call, what))


def host_of(endpoint: str) -> str:
    """The name of the host in an address, for people."""
    return urlsplit(endpoint).hostname or endpoint


def checked_endpoint(endpoint: str) -> str:
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


def _refuse_unsafe(name: Any) -> None:
    """Raise UserError when a name out of a repository is not that of a file below a directory."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    is_plain = parts and str(PurePosixPath(name)) == name and name.isprintable()
    if not is_plain or {"/", "..", NOTES} & set(parts) or "\\" in name or name.endswith(PART):
        raise UserError(
            f"the repository names {name!r} as a file, which leads out of the directory or is no "
            "file name: nothing was fetched; do not use this repository"
        )
