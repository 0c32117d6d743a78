"""Repositories of ModelScope, fetched, continued and checked as those of the Hugging Face Hub.

    repository = modelscope.open_repository("owner/name", "master", endpoint=endpoint)

No package of ModelScope's is needed: two addresses of its interface are, one that lists the files
with sizes and SHA-256, one that gives a file's bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from shared.download import HubRepository, RemoteFile, checked_endpoint, host_of
from shared.errors import UserError, one_line
from shared.files import write_json
from shared.progress import amount
from shared.transport import PATIENCE, Advice, DownloadError, Line, Patience, refusal

log = logging.getLogger(__name__)

OFFICIAL_ENDPOINT = "https://www.modelscope.cn"
REVISION = "master"
ADVICE = Advice(
    unreachable="or take the Hugging Face Hub, by HF_ENDPOINT a mirror of it, in its place",
    elsewhere="the Hugging Face Hub, or a mirror of it",
    not_found="check the repository and the revision; names there differ from the Hub's",
    not_allowed="it is not public; take another repository, or fetch the files by hand",
)
_LARGEST_LISTING = 32_000_000  # bytes


def is_wanted(source: str, environ: Mapping[str, str]) -> bool:
    """Whether files come from ModelScope: source is auto, hub or modelscope."""
    says_so = environ.get("USE_MODELSCOPE_HUB", "").lower() in ("1", "true", "yes")
    return source == "modelscope" or (source == "auto" and says_so)


def asked_copy(repo_id: str) -> Path | None:
    """`local_copy` where the user's environment asks for ModelScope, None elsewhere."""
    return local_copy(repo_id, os.environ) if is_wanted("auto", os.environ) else None


def local_copy(repo_id: str, environ: Mapping[str, str], patience: Patience | None = None) -> Path:
    """A directory of ModelScope's cache with a whole, verified copy of the model.

    What is missing is fetched; of several processes one does it, the others wait. Where nobody
    answers, a copy that was whole before serves. Errors as of `open_repository` and `fetch`.
    """
    _check_name(repo_id)
    cache = Path(environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
    directory = cache / "models" / repo_id
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".fetch.lock").open("a") as lock:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        _complete(repo_id, directory, endpoint_of(environ), patience)
    return directory


def _complete(repo_id: str, directory: Path, endpoint: str, patience: Patience | None) -> None:
    whole = directory / ".whole.json"
    try:
        repository = open_repository(repo_id, REVISION, endpoint=endpoint, patience=patience)
    except DownloadError as error:
        if not whole.is_file():
            raise
        log.info("%s is taken from %s: %s", repo_id, directory, one_line(error))
        return
    plan = repository.plan(repository.one_copy(), directory)
    if plan.missing:
        size = amount(sum(file.size for file in plan.missing))
        log.info("%s: %s from %s into %s", repo_id, size, host_of(endpoint), directory)
    repository.fetch(plan)
    write_json(whole, {"files": len(plan.present) + len(plan.missing)})


def endpoint_of(environ: Mapping[str, str]) -> str:
    """ModelScope's address as its own programs are told it."""
    domain = environ.get("MODELSCOPE_DOMAIN")
    named = f"https://{domain}" if domain and "://" not in domain else domain
    return environ.get("MODELSCOPE_ENDPOINT") or named or OFFICIAL_ENDPOINT


def open_repository(
    repo_id: str, revision: str, *, endpoint: str, patience: Patience | None = None
) -> HubRepository:
    """The repository as it is at `revision`. No token is sent.

    Raises UserError for what is not there or not understood, DownloadError when the endpoint cannot
    be reached or does not answer as ModelScope does.
    """
    endpoint = checked_endpoint(endpoint)
    _check_name(repo_id)
    line = Line(patience or PATIENCE, {}, ADVICE)
    base = f"{endpoint}/api/v1/models/{quote(repo_id)}/repo"
    listing = f"{base}/files?Revision={quote(revision, safe='')}&Recursive=True"
    what = f"{repo_id} at revision {revision}"
    try:
        answer = json.loads(line.persist(lambda: _content(line, listing, what)))
        files = {file.name: file for file in _files(answer)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DownloadError(
            f"{host_of(endpoint)} did not answer as ModelScope does ({type(error).__name__}: "
            f"{one_line(error)}): check the endpoint {endpoint}, and whether a login page of the "
            "network stands before it"
        ) from None

    def address(name: str) -> str:
        return f"{base}?Revision={quote(revision, safe='')}&FilePath={quote(name, safe='')}"

    return HubRepository(repo_id, revision, endpoint, files, line, address=address)


def _check_name(repo_id: str) -> None:
    parts = repo_id.split("/")
    if len(parts) != 2 or {"", ".", ".."} & set(parts) or not repo_id.isprintable():
        raise UserError(f"repository {repo_id!r} is no owner/name")


def _content(line: Line, url: str, what: str) -> bytes:
    """The body of a small answer."""
    with contextlib.closing(line.open(url, 0, what)) as response:
        if response.status_code != 200:
            raise refusal(response, what, ADVICE)
        content = b""
        for chunk in line.body(response):
            content += chunk
            if len(content) > _LARGEST_LISTING:
                raise ValueError("its list of files has no end")
        return content


def _files(answer: Any) -> list[RemoteFile]:
    """The files in ModelScope's list. Raises ValueError and the like for another form."""
    entries = answer["Data"]["Files"]
    if not isinstance(entries, list):
        raise ValueError("no list of files")
    found = []
    for entry in entries:
        if entry.get("Type") == "tree":
            continue
        name, size, digest = entry["Path"], entry["Size"], entry["Sha256"]
        if not isinstance(name, str) or not isinstance(size, int) or not _is_digest(digest):
            raise ValueError(f"no size or SHA-256 for {name}")
        found.append(RemoteFile(name, size, f"sha256:{digest.lower()}"))
    return found


def _is_digest(text: Any) -> bool:
    digits = set("0123456789abcdef")
    return isinstance(text, str) and len(text) == 64 and set(text.lower()) <= digits
