"""One message about the end of a run, posted as plain JSON to an address that may hold a secret.

The address appears in no message of ours: people are told the host alone. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from shared.errors import FAILED, UserError

_PATIENCE = 10.0  # seconds for an answer
_TRIES = 4
_PAUSE = 1.0  # seconds before the second try; doubles each time


class NotifyError(UserError):
    """The message was not taken; exit code 1."""

    exit_code = FAILED


def check(url: str) -> None:
    """Raise UserError unless `url` is a web address."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fits = False
    if not fits or not url.isascii() or not url.isprintable() or " " in url:
        raise UserError(
            "--notify needs a web address, http://… or https://…, typed or in NOTIFY_URL (what was "
            "given is not shown: it may hold a secret)"
        )


def message(view: Any) -> dict[str, Any]:
    """What is posted about a run: `text` for people, the rest for programs."""
    names = ("recipe", "run_dir", "host", "state", "exit_code", "reason", "step", "total_steps")
    fields = {name: getattr(view, name) for name in (*names, "result")}
    why = view.reason or view.note
    text = f"{view.recipe or 'run'} {view.state}" + (f": {why}" if why else "")
    result = view.result if isinstance(view.result, dict) else {}
    if result.get("after") is not None:
        text += f" | {result.get('name')} {result.get('before')} → {result['after']}"
    return {"text": f"{text} ({view.run_dir})", **fields}


def post(url: str, content: dict[str, Any]) -> None:
    """Send it; lost connections and busy servers are tried again for some seconds.

    Raises NotifyError, which names the host alone, when it is not taken.
    """
    host = urlsplit(url).hostname
    body = json.dumps(content, ensure_ascii=True, default=str).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "run-monitor"}
    problem = ""
    for number in range(_TRIES):
        if number:
            time.sleep(_PAUSE * 2 ** (number - 1))
        request = urllib.request.Request(url, body, headers, method="POST")
        try:
            with _opener().open(request, timeout=_PATIENCE):
                return
        except urllib.error.HTTPError as error:
            problem = f"answered {error.code}"
            error.close()
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            problem = f"cannot be reached ({type(reason).__name__})"
        except ValueError:  # its words would quote the address
            problem = "has an address that cannot be used"
            break
    raise NotifyError(f"{host} has not taken the message: it {problem}")


def _opener() -> urllib.request.OpenerDirector:
    """One that follows no redirect: it would lose the message, or hand it to somebody else."""
    return urllib.request.build_opener(_NoRedirect)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None
