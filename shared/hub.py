"""Repositories of the Hugging Face Hub and of ModelScope: which files, how large, with what sums.

    repository = open_hub("owner/name", "main", endpoint=OFFICIAL_ENDPOINT)
    repository.fetch(repository.plan(["config.json"], directory))

Their own clients name the files; the bytes come through shared.download: huggingface_hub's download
(1.33) begins anew after a killed process and checks no checksum, ModelScope's may leave an
incomplete directory with a warning.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import quote, urlsplit

from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import build_hf_headers

from shared.download import NOTES, PART, File, Plan, fetch, plan_of
from shared.errors import UserError, did_you_mean, one_line
from shared.files import write_json, write_text
from shared.progress import amount
from shared.web import Client, DownloadError

log = logging.getLogger(__name__)

OFFICIAL_ENDPOINT, MIRROR = "https://huggingface.co", "https://hf-mirror.com"
MODELSCOPE_ENDPOINT, MODELSCOPE_REVISION = "https://www.modelscope.cn", "master"

Kind = Literal["model", "dataset"]

_OTHER_FORMS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".ot", ".gguf")
_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Repository:
    """A repository at one version, and who fetches its files."""

    repo_id: str
    commit: str
    endpoint: str
    files: dict[str, File]
    client: Client

    def one_copy(self) -> list[str]:
        """The names of all files, but for weights that are there as safetensors too."""
        is_whole = any(name.endswith(".safetensors") for name in self.files)
        left_out = _OTHER_FORMS if is_whole else ()
        return [name for name in self.files if not name.endswith((".gitattributes", *left_out))]

    def plan(self, names: Iterable[str], directory: Path) -> Plan:
        """What of `names` is in `directory`, checked, and what has to be fetched; writes nothing.

        Raises UserError for a name that the repository does not hold or that leads elsewhere.
        """
        return plan_of(map(self._file, dict.fromkeys(names)), directory)

    def fetch(self, plan: Plan) -> None:
        """Fetch what the plan misses; errors as in shared.download."""
        fetch(self.client, plan)

    def read(self, name: str) -> bytes:
        """The content of a small file, verified and not kept. Errors as in `fetch`."""
        with tempfile.TemporaryDirectory() as scratch:
            self.fetch(self.plan([name], Path(scratch)))
            return (Path(scratch) / name).read_bytes()

    def _file(self, name: str) -> File:
        if name not in self.files:
            raise UserError(
                f"{self.repo_id} at {self.commit} holds no {name}"
                f"{did_you_mean(name, self.files) or '; check the repository and the revision'}"
            )
        refuse_unsafe(name)
        return self.files[name]


def open_hub(
    repo_id: str,
    revision: str,
    *,
    endpoint: str = OFFICIAL_ENDPOINT,
    send_token: bool = True,
    kind: Kind = "model",
) -> Repository:
    """The Hub's repository as it is at `revision` (a commit, branch or tag).

    endpoint: the Hub or a mirror of it. send_token: whether huggingface.co is given the user's
    token (HF_TOKEN or login); a mirror never is.
    Raises UserError for what is not there, not allowed or not understood, and when HF_HUB_OFFLINE
    is set; DownloadError when the endpoint cannot be reached.
    """
    endpoint = checked_endpoint(endpoint)
    token = None if send_token and endpoint == OFFICIAL_ENDPOINT else False
    client = _hub_client(endpoint, build_hf_headers(token=token))
    api = HfApi(endpoint=endpoint, token=token)
    info_of = api.model_info if kind == "model" else api.dataset_info
    seconds = client.patience.silence
    with _understood(endpoint, "a Hugging Face Hub", repo_id):
        info: Any = _listing(
            client, endpoint, repo_id, revision,
            lambda: info_of(repo_id, revision=revision, files_metadata=True, timeout=seconds),
        )  # fmt: skip
        commit = info.sha or revision
        # the commit, so that all files are of one version even when a branch moves
        where = {"repo_type": kind, "revision": commit, "endpoint": endpoint}
        files = [
            _hub_file(item, hf_hub_url(repo_id, item.rfilename, **where))
            for item in info.siblings or []
        ]
    if _COMMIT.fullmatch(revision) and commit != revision:
        raise DownloadError(
            f"{host_of(endpoint)} gives commit {commit} in place of {revision}: it is out of step "
            f"with the Hub; {client.otherwise}"
        )
    return Repository(repo_id, commit, endpoint, {file.name: file for file in files}, client)


def open_modelscope(repo_id: str, revision: str, *, endpoint: str) -> Repository:
    """ModelScope's repository as it is at `revision`. No token is sent. Errors as of `open_hub`."""
    from modelscope_hub import HubApi  # half a second, for those who ask ModelScope

    endpoint = checked_endpoint(endpoint)
    _check_name(repo_id)
    client = Client(
        "take the Hugging Face Hub, or by HF_ENDPOINT a mirror of it; names there differ",
        "it is not public; take another repository, or fetch the files by hand",
    )
    # asked first, since ModelScope's client tries for 15 s where nobody answers
    client.persist(lambda: client.open(endpoint, 0, repo_id).close())
    api = HubApi(endpoint=endpoint, token="")
    with _understood(endpoint, "ModelScope", repo_id):
        found: Any = _listing(
            client, endpoint, repo_id, revision,
            lambda: api.list_repo_files(repo_id, "model", revision=revision),
        )  # fmt: skip
        base = f"{endpoint}/api/v1/models/{quote(repo_id)}/repo?Revision={quote(revision, safe='')}"
        files = [
            _modelscope_file(item, f"{base}&FilePath={quote(item.path, safe='')}")
            for item in found
            if not item.is_dir
        ]
    return Repository(repo_id, revision, endpoint, {file.name: file for file in files}, client)


# --- ModelScope in place of the Hub ---------------------------------------------------------------


def is_wanted(source: str, environ: Mapping[str, str]) -> bool:
    """Whether files come from ModelScope: source is auto, hub or modelscope."""
    says_so = environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes")
    return source == "modelscope" or (source == "auto" and says_so)


def modelscope_endpoint(environ: Mapping[str, str]) -> str:
    """ModelScope's address as its own programs are told it."""
    domain = environ.get("MODELSCOPE_DOMAIN")
    named = f"https://{domain}" if domain and "://" not in domain else domain
    return environ.get("MODELSCOPE_ENDPOINT") or named or MODELSCOPE_ENDPOINT


def asked_copy(repo_id: str) -> Path | None:
    """`local_copy` where the user's environment asks for ModelScope, None elsewhere."""
    return local_copy(repo_id, os.environ) if is_wanted("auto", os.environ) else None


def local_copy(repo_id: str, environ: Mapping[str, str]) -> Path:
    """A directory of ModelScope's cache with a whole, verified copy of the model.

    What is missing is fetched. Where nobody answers, a copy that was whole before serves. Errors as
    of `open_modelscope` and `fetch`.
    """
    _check_name(repo_id)
    cache = Path(environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    directory, endpoint = cache / "models" / repo_id, modelscope_endpoint(environ)
    whole = directory / ".whole.json"
    try:
        repository = open_modelscope(repo_id, MODELSCOPE_REVISION, endpoint=endpoint)
    except DownloadError as error:
        if not whole.is_file():
            raise
        log.info("%s is taken from %s: %s", repo_id, directory, one_line(error))
        return directory
    plan = repository.plan(repository.one_copy(), directory)
    if plan.missing:
        size, host = amount(plan.remaining), host_of(endpoint)
        log.info("%s: %s from %s into %s", repo_id, size, host, directory)
    repository.fetch(plan)
    write_json(whole, {"files": len(plan.present) + len(plan.missing)})
    return directory


# --- pretrained weights in the libraries' own caches ----------------------------------------------


class NoWeightsError(UserError):
    """Pretrained weights are not in their cache and cannot be fetched; names source and place."""


def cached_weights(repo_id: str, names: Sequence[str], cache: Path | None = None) -> Path:
    """The first of `names` that the Hub's repository holds, in the Hub's cache.

    cache: in place of HF_HUB_CACHE. What is not there is fetched, and a log line says so before the
    first byte. Raises NoWeightsError when it cannot be had.
    """
    folder = Path(cache or constants.HF_HUB_CACHE)
    for name in names:
        found = try_to_load_from_cache(repo_id, name, cache_dir=folder)
        if isinstance(found, str):
            return Path(found)
    place = folder / f"models--{repo_id.replace('/', '--')}"
    with _needed(f"{constants.ENDPOINT}/{repo_id}", place):
        repository = open_hub(repo_id, "main", endpoint=constants.ENDPOINT)
        name = next((name for name in names if name in repository.files), names[0])
        plan = repository.plan([name], place / "snapshots" / repository.commit)
        _announce(repository.endpoint, plan)
        repository.fetch(plan)
        (place / "refs").mkdir(exist_ok=True)
        write_text(place / "refs" / "main", repository.commit)
    return plan.directory / name


def fetched_weights(url: str, directory: Path) -> Path:
    """The file of `url` in `directory`, as torch.hub keeps it: fetched when it is not there.

    Digits at the end of its name are the beginning of its SHA-256 (resnet50-11ad3fa6.pth). Errors
    as of `cached_weights`.
    """
    path = directory / PurePosixPath(urlsplit(url).path).name
    if path.is_file():
        return path
    digits = re.search(r"-([0-9a-f]{8,64})\.", path.name)
    file = File(path.name, None, f"sha256:{digits[1]}" if digits else "", (url,))
    with _needed(url, path):
        plan = plan_of([file], directory)
        _announce(url, plan)
        fetch(Client("put the file there by hand"), plan)
    return path


def clip_weights(entry: Mapping[str, Any], cache: Path | None = None) -> Path:
    """The file of an entry in open_clip's table of weights, where open_clip keeps it.

    Fetched when it is not there; errors as of `cached_weights`.
    """
    repository, _, file = str(entry.get("hf_hub") or "").rpartition("/")
    if not repository:
        return fetched_weights(str(entry["url"]), cache or Path("~/.cache/clip").expanduser())
    return cached_weights(repository, [file] if file else _CLIP_FILES, cache)


@contextlib.contextmanager
def _needed(source: str, place: Path) -> Iterator[None]:
    """Name source and place of weights that cannot be fetched."""
    try:
        yield
    except UserError as error:
        raise NoWeightsError(
            f"{place} is missing and cannot be fetched from {source}: {one_line(error)}"
        ) from None


def _announce(source: str, plan: Plan) -> None:
    for file in plan.missing:
        size = amount(file.size) if file.size else "size unknown"
        log.info("fetching %s (%s) from %s into %s", file.name, size, source, plan.directory)


# --- answers --------------------------------------------------------------------------------------


def _hub_client(endpoint: str, headers: Mapping[str, str]) -> Client:
    others = [
        f"HF_ENDPOINT={e}" for e in (MIRROR, OFFICIAL_ENDPOINT) if host_of(e) != host_of(endpoint)
    ]
    return Client(
        f"name another source, for example {' or '.join(others)}, or fetch the files by hand",
        "check its name; if it is not public, accept its terms on its page and log in with "
        "`hf auth login` or HF_TOKEN (only huggingface.co is given the token); a token that has "
        "expired has to go",
        headers,
    )


def _listing(
    client: Client, endpoint: str, repo_id: str, revision: str, call: Callable[[], Any]
) -> Any:
    """What `call` says about the repository; errors of both clients as those of `client`."""
    host, what = host_of(endpoint), f"{repo_id} at revision {revision}"

    def answer() -> Any:
        try:
            return call()
        except HfHubHTTPError as error:
            response = error.response
            raise client.refusal(host, response.status_code, response.headers, what) from None
        except Exception as error:
            status = getattr(error, "status_code", None)  # modelscope_hub's
            if not isinstance(status, int):
                raise
            raise client.refusal(host, status, {}, what) from None

    return client.persist(lambda: client.ask(host, answer, what))


@contextlib.contextmanager
def _understood(endpoint: str, server: str, repo_id: str) -> Iterator[None]:
    """Say so when an answer is not what the server's own client expects."""
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"repository {repo_id!r} is no owner/name: {one_line(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DownloadError(
            f"{host_of(endpoint)} did not answer as {server} does ({type(error).__name__}: "
            f"{one_line(error)}): check the endpoint {endpoint}, and whether a login page of the "
            "network stands before it"
        ) from None


def _hub_file(sibling: Any, url: str) -> File:
    """A file of the Hub's listing. Raises ValueError when size or checksum is missing."""
    checksum = f"sha256:{sibling.lfs.sha256}" if sibling.lfs else f"git:{sibling.blob_id}"
    size = sibling.lfs.size if sibling.lfs else sibling.size
    if not isinstance(size, int) or checksum == "git:None":
        raise ValueError(f"no size or checksum for {sibling.rfilename}")
    return File(sibling.rfilename, size, checksum, (url,))


def _modelscope_file(item: Any, url: str) -> File:
    """A file of ModelScope's listing. Raises ValueError when its SHA-256 is missing."""
    digest = str(item.sha256).lower()
    if not item.path or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"no name or SHA-256 for {item.path!r}")
    return File(item.path, item.size, f"sha256:{digest}", (url,))


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
            f"endpoint {endpoint!r} is no web address: expected https://host, for example {MIRROR}"
        )
    return endpoint.strip().rstrip("/")


def _check_name(repo_id: str) -> None:
    parts = repo_id.split("/")
    if len(parts) != 2 or {"", ".", ".."} & set(parts) or not repo_id.isprintable():
        raise UserError(f"repository {repo_id!r} is no owner/name")


def refuse_unsafe(name: Any) -> None:
    """Raise UserError when a name out of a repository is not that of a file below a directory."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    is_plain = parts and str(PurePosixPath(name)) == name and name.isprintable()
    if not is_plain or {"/", "..", NOTES} & set(parts) or "\\" in name or name.endswith(PART):
        raise UserError(
            f"the repository names {name!r} as a file, which leads out of the directory or is no "
            "file name: nothing was fetched; do not use this repository"
        )
