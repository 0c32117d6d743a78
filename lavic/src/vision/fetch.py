"""One request for one picture: its bytes, whole and decodable, or the reason why not."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from shared.errors import UserError, one_line
from shared.images import decode_rgb
from shared.web import BUSY, LOST, TransientError, retry_after, why_lost

_MOST_BYTES = 64 << 20
_PATIENCE = 6  # a picture may take so many times the timeout, however steadily it drips
_HEADERS = {"Accept": "image/*,*/*;q=0.1", "Accept-Encoding": "identity"}


class RefusedError(Exception):
    """This picture will not be had from there, however often it is asked for."""


class UnreachableError(TransientError):
    """The host gave no answer at all."""


class StoppedError(Exception):
    """The user wants to leave."""


@dataclass(frozen=True)
class Fetcher:
    """Fetches pictures over one pool of connections; used by several threads."""

    client: httpx.Client
    timeout: float
    is_stopping: Callable[[], bool]

    def fetch(self, url: str) -> bytes:
        """The bytes of the picture at `url`, decoded once to know that it is whole.

        Raises RefusedError for what another try would not mend, TransientError for what it may.
        """
        host = urlsplit(url).netloc
        try:
            with self.client.stream("GET", url) as response:
                _check_answer(response)
                content = self._body(response, host)
        except LOST as error:
            kind = UnreachableError if _gave_no_answer(error) else TransientError
            raise kind(host, why_lost(error)) from None
        except httpx.TooManyRedirects:
            raise RefusedError("redirected in a circle") from None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise RefusedError(f"cannot be asked for: {one_line(error)}") from None
        _check_picture(content, host)
        return content

    def _body(self, response: httpx.Response, host: str) -> bytes:
        deadline, content = time.monotonic() + _PATIENCE * self.timeout, bytearray()
        for chunk in response.iter_bytes():
            content += chunk
            if self.is_stopping():
                raise StoppedError
            if len(content) > _MOST_BYTES:
                raise RefusedError(f"more than {_MOST_BYTES >> 20} MB")
            if time.monotonic() > deadline:
                raise TransientError(host, "too slow")
        return bytes(content)


def open_client(workers: int, timeout: float) -> httpx.Client:
    """A pool of `workers` connections. Raises UserError for proxy settings that cannot be used."""
    limits = httpx.Limits(max_connections=workers, max_keepalive_connections=workers)
    try:
        return httpx.Client(
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=limits,
            follow_redirects=True,
            max_redirects=5,
            headers=_HEADERS,
        )
    except (ValueError, ImportError, httpx.HTTPError) as error:
        raise UserError(f"the proxy settings cannot be used: {one_line(error)}") from None


def _check_answer(response: httpx.Response) -> None:
    status, kind = response.status_code, response.headers.get("Content-Type", "")
    if status in BUSY:
        host = response.url.host
        raise TransientError(host, f"answered {status}", retry_after(response.headers))
    if status != 200:
        raise RefusedError(f"answered {status}")
    kind = kind.partition(";")[0].strip().lower()
    if kind and not kind.startswith("image/") and kind not in _BINARY:
        raise RefusedError(f"answered with {kind}, not a picture")


_BINARY = ("application/octet-stream", "binary/octet-stream")


def _check_picture(content: bytes, host: str) -> None:
    """Raise unless `content` can be trained on: the same reader decodes it."""
    try:
        image = decode_rgb(content)
    except ValueError as error:
        raise TransientError(host, f"no whole picture: {one_line(error)}") from None
    if min(image.shape[1:]) < 2:  # what shops serve where a picture is no more
        raise RefusedError(f"{image.shape[2]} x {image.shape[1]} pixels: a placeholder")


def _gave_no_answer(error: Exception) -> bool:
    return isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
