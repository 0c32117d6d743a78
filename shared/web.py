"""Requests over a bad line: bounded in time, repeated for lost connections and busy servers alone.

Proxies and certificates are those of the environment, as httpx takes them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TypeVar

import httpx
from huggingface_hub import constants

from shared.errors import FAILED, UserError, one_line
from shared.progress import clock

log = logging.getLogger(__name__)

# statuses and errors after which another try may help
BUSY = (408, 425, 429, 500, 502, 503, 504)
LOST = (
    *(TimeoutError, ConnectionError),
    *(httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError),
)
_LONGEST_PAUSE = 16.0

T = TypeVar("T")


class DownloadError(UserError):
    """A download that failed through no mistake in the command; exit code 1."""

    exit_code = FAILED


class TransientError(Exception):
    """What may be better at the next try. after: the seconds that the server asks for."""

    def __init__(self, host: str, reason: str, after: float | None = None) -> None:
        super().__init__(f"{host}: {reason}")
        self.host, self.reason, self.after = host, reason, after


@dataclass(frozen=True)
class Patience:
    """How long a bad line is put up with; seconds, but for the number of tries."""

    contact: float = 12.0  # until a host's first answer: without a network all ends within 15 s
    connect: float = 5.0  # for one of a host's addresses
    silence: float = 10.0  # without a byte, until a connection counts as lost
    tries: int = 6  # in a row that brought no byte
    pause: float = 1.0  # before the second try; doubles each time
    longest_wait: float = 120.0  # that a server may ask for by Retry-After


PATIENCE = Patience()


@dataclass
class Client:
    """Sends requests with patience.

    otherwise: what to do when the source fails, which names another one. headers: of every request;
    a token among them is not sent on to another host. Remembers which hosts have answered: one that
    never has is given up after `contact` seconds.
    """

    otherwise: str
    not_allowed: str = "it is not public, or no longer"
    headers: Mapping[str, str] = field(default_factory=dict)
    patience: Patience = field(default_factory=lambda: PATIENCE)
    _answered: set[str] = field(default_factory=set, init=False)
    _first_asked: dict[str, float] = field(default_factory=dict, init=False)

    def persist(self, attempt: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """The first result of `attempt`, which is tried again after each TransientError.

        Raises DownloadError after `tries` of them in a row without `progress`, and sooner for a
        host that has never answered.
        """
        best, failures = progress(), 0
        while True:
            try:
                return attempt()
            except TransientError as error:
                failures = failures + 1 if progress() <= best else 1
                best = max(best, progress())
                self._pause(error, failures)

    def ask(self, host: str, call: Callable[[], T], what: str) -> T:
        """The result of `call`, one request to `host` for `what`.

        Raises TransientError for a lost connection, UserError or DownloadError for what another
        try would not mend, and what `call` makes of an answer.
        """
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{what} cannot be fetched while HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: "
                "unset it, or put the files there by hand"
            )
        try:
            result = _within(self._time_left(host), call)
        except LOST as error:
            raise TransientError(_host_of(error) or host, why_lost(error)) from None
        except httpx.TooManyRedirects:
            raise DownloadError(f"{host} redirects {what} in a circle: {self.otherwise}") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DownloadError(
                f"{_host_of(error) or host} cannot be used ({one_line(error)}): check the proxy "
                "settings (HTTPS_PROXY) and the address"
            ) from None
        except (UserError, TransientError):
            self._answered.add(host)
            raise
        self._answered.add(host)
        return result

    def open(self, url: str, position: int, what: str) -> httpx.Response:
        """The answer to a request for `url` from byte `position` on, its body not yet read.

        Raises TransientError when another try may help, UserError and DownloadError.
        """
        headers = {"Range": f"bytes={position}-"} if position else {}
        request = self._http.build_request("GET", url, headers=headers)
        response = self.ask(request.url.host, lambda: self._http.send(request, stream=True), what)
        self._answered.add(response.url.host)  # it may have been redirected
        return response

    def refusal(self, host: str, status: int, headers: Mapping[str, str], what: str) -> Exception:
        """The error that an answer other than `what` means: to be tried again, or final."""
        if status in BUSY:
            return TransientError(host, f"answered {status}", retry_after(headers))
        if status == 404:
            return UserError(f"{what} is not at {host} (404): check its name, or {self.otherwise}")
        if status in (401, 403):
            return UserError(f"{host} does not give {what} ({status}): {self.not_allowed}")
        return DownloadError(f"{host} answered {status} when asked for {what}: {self.otherwise}")

    @cached_property
    def _http(self) -> httpx.Client:
        # a compressed answer has no length to check and no offset to continue from
        headers = {**self.headers, "Accept-Encoding": "identity"}
        timeout = httpx.Timeout(self.patience.silence, connect=self.patience.connect)
        try:
            return httpx.Client(headers=headers, timeout=timeout, follow_redirects=True)
        except (ValueError, ImportError, httpx.HTTPError) as error:
            raise UserError(f"the proxy settings cannot be used: {one_line(error)}") from None

    def _time_left(self, host: str) -> float:
        """Seconds until an answer has to begin: of one request, or in all before the first."""
        began = self._first_asked.setdefault(host, time.monotonic())
        spent = 0.0 if host in self._answered else time.monotonic() - began
        return max(0.1, self.patience.contact - spent)

    def _pause(self, error: TransientError, failures: int) -> None:
        """Wait before the next try, or raise DownloadError when there should be none."""
        pause = min(self.patience.pause * 2 ** (failures - 1), _LONGEST_PAUSE)
        pause = pause if error.after is None else error.after
        if pause > self.patience.longest_wait:
            raise DownloadError(
                f"{error}, and asks to wait {clock(pause)}: type the same command then, it "
                "continues where it stopped"
            )
        is_last = failures >= self.patience.tries
        if error.host not in self._answered and (is_last or self._time_left(error.host) <= pause):
            raise DownloadError(
                f"{error.host} cannot be reached ({error.reason}): check the network and "
                f"HTTPS_PROXY, or {self.otherwise}"
            )
        if is_last:
            raise DownloadError(
                f"{error}, {failures} times in a row: try later, the same command continues where "
                f"it stopped; or {self.otherwise}"
            )
        log.warning("%s; trying again in %.1f s", error, pause)
        time.sleep(pause)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds of the Retry-After header, which holds a number or a date."""
    text = headers.get("Retry-After", "")
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except ValueError:
        return None


def why_lost(error: Exception) -> str:
    """What became of the connection, in a few words."""
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return "no answer in time"
    kind = (
        "no connection"
        if isinstance(error, httpx.ConnectError | ConnectionError)
        else "connection lost"
    )
    return f"{kind} ({one_line(error)})"


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns; TimeoutError after `seconds`.

    A name lookup heeds no timeout, and a connection tries a host's addresses one after another,
    each for its own time: only a thread that can be left behind bounds them.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # handed to the caller
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


def _host_of(error: Exception) -> str | None:
    """The host that a failed request went to."""
    try:
        return error.request.url.host  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # httpx: the request was never set
        return None
