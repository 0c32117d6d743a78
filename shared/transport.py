"""Requests over a bad line: bounded in time, repeated for lost connections and busy servers alone.

The client is huggingface_hub's own, so that proxies and HF_HUB_OFFLINE mean what they mean there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from shared.errors import FAILED, UserError, one_line
from shared.progress import clock

log = logging.getLogger(__name__)

# statuses and errors after which another try may help
BUSY = (408, 425, 429, 500, 502, 503, 504)
LOST = (TimeoutError, httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_MAX_REDIRECTS = 10
_LONGEST_PAUSE = 16.0

HUB_ENDPOINTS = ("https://hf-mirror.com", "https://huggingface.co")  # in the order of advice

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
    first_tries: int = 3  # the same for a host that has never answered
    pause: float = 1.0  # before the second try; doubles each time
    longest_wait: float = 120.0  # that a server may ask for by Retry-After


PATIENCE = Patience()


@dataclass(frozen=True)
class Advice:
    """What people can do about a server that does not give what it should."""

    unreachable: str
    elsewhere: str
    not_found: str
    not_allowed: str


def hub_advice(endpoint: str) -> Advice:
    """What to do when `endpoint`, the Hub or a mirror of it, fails: never to ask it again."""
    failed = httpx.URL(endpoint).host
    others = [f"HF_ENDPOINT={url}" for url in HUB_ENDPOINTS if httpx.URL(url).host != failed]
    return Advice(
        unreachable=f"where it is blocked name another source, for example {' or '.join(others)}, "
        "or fetch the files by hand",
        elsewhere=f"another endpoint ({others[0]})",
        not_found="check the repository and the revision",
        not_allowed="check its name; if it is not public, accept its terms on its page and log in "
        "with `hf auth login` or HF_TOKEN (only huggingface.co is given the token); a token that "
        "has expired has to go",
    )


class Line:
    """Requests with patience; knows which hosts have ever answered."""

    def __init__(self, patience: Patience, headers: dict[str, str], advice: Advice) -> None:
        self.patience, self.advice = patience, advice
        # a compressed answer has no length to check and no offset to continue from
        self._headers = headers | {"Accept-Encoding": "identity"}
        self._first_asked: dict[str, float] = {}
        self._answered: set[str] = set()

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

        Raises TransientError for a lost connection or a busy server, UserError or DownloadError
        for what another try would not mend.
        """
        self._first_asked.setdefault(host, time.monotonic())
        try:
            result = _within(max(self._time_left(host), 0.1), call)
        except OfflineModeIsEnabled:
            raise UserError(
                f"{what} cannot be fetched while HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: "
                "unset it, or put the files there by hand"
            ) from None
        except LOST as error:
            raise TransientError(_host_of(error) or host, why_lost(error)) from None
        except HfHubHTTPError as error:
            self._answered.add(host)
            raise refusal(error.response, what, self.advice) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise DownloadError(
                f"{_host_of(error) or host} cannot be used ({one_line(error)}): check the proxy "
                "settings (HTTPS_PROXY) and the address"
            ) from None
        self._answered.add(host)
        return result

    def open(self, url: str, position: int, what: str) -> httpx.Response:
        """The answer to a request for `url` from byte `position` on, its body not yet read.

        Raises TransientError when another try may help, and DownloadError.
        """
        patience, client = self.patience, get_session()
        headers = self._headers | ({"Range": f"bytes={position}-"} if position else {})
        timeout = httpx.Timeout(patience.silence, connect=patience.connect)
        request = client.build_request("GET", url, headers=headers, timeout=timeout)
        for _ in range(_MAX_REDIRECTS):

            def send(request: httpx.Request = request) -> httpx.Response:
                return client.send(request, stream=True, follow_redirects=False)

            response = self.ask(request.url.host, send, what)
            if response.next_request is None:
                return response
            response.close()
            request = response.next_request  # without the token where it leads to another host
        raise DownloadError(
            f"{request.url.host} redirects {what} in a circle: try {self.advice.elsewhere}"
        )

    def body(self, response: httpx.Response) -> Iterator[bytes]:
        """The bytes of the answer as they arrive. Raises TransientError when they cease."""
        try:
            yield from response.iter_bytes()
        except LOST as error:
            raise TransientError(response.url.host, why_lost(error)) from None

    def _time_left(self, host: str) -> float:
        """Seconds until an answer has to begin: of one request, or in all before the first."""
        if host in self._answered:
            return self.patience.contact
        asked = self._first_asked.get(host, time.monotonic())
        return self.patience.contact - (time.monotonic() - asked)

    def _pause(self, error: TransientError, failures: int) -> None:
        """Wait before the next try, or raise DownloadError when there should be none."""
        patience = self.patience
        pause = min(patience.pause * 2 ** (failures - 1), _LONGEST_PAUSE)
        pause = pause if error.after is None else error.after
        if pause > patience.longest_wait:
            raise DownloadError(
                f"{error}, and asks to wait {clock(pause)}: type the same command then, it "
                "continues where it stopped"
            )
        is_unknown = error.host not in self._answered
        is_last = failures >= (patience.first_tries if is_unknown else patience.tries)
        if is_unknown and (is_last or self._time_left(error.host) <= pause):
            raise DownloadError(
                f"{error.host} cannot be reached ({error.reason}): check the network and "
                f"HTTPS_PROXY; {self.advice.unreachable}"
            )
        if is_last:
            raise DownloadError(
                f"{error}, {failures} times in a row: try later or {self.advice.elsewhere}; the "
                "same command continues where it stopped"
            )
        log.warning("%s; trying again in %.1f s", error, pause)
        time.sleep(pause)


def refusal(response: httpx.Response, what: str, advice: Advice) -> Exception:
    """The error that an answer other than `what` means: to be tried again, or final."""
    status, host = response.status_code, response.url.host
    if status in BUSY:
        return TransientError(host, f"answered {status}", retry_after(response))
    if status == 404:
        return UserError(f"{what} is not at {host} (404): {advice.not_found}")
    if status in (401, 403):
        return UserError(f"{host} does not give {what} ({status}): {advice.not_allowed}")
    return DownloadError(f"{host} answered {status} when asked for {what}: try {advice.elsewhere}")


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


def retry_after(response: httpx.Response) -> float | None:
    """Seconds of the Retry-After header, which holds a number or a date."""
    text = response.headers.get("Retry-After", "")
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
    kind = "no connection" if isinstance(error, httpx.ConnectError) else "connection lost"
    return f"{kind} ({one_line(error)})"


def _host_of(error: Exception) -> str | None:
    """The host that a failed request went to."""
    try:
        return error.request.url.host  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):  # httpx: the request was never set
        return None
