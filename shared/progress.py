"""Where a run is: a bar on a terminal, plain key=value lines in a file, pipe or log."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol, TypeVar

log = logging.getLogger(__name__)

_EVERY_SECONDS = 10.0

T = TypeVar("T", covariant=True)


class Counted(Protocol[T]):
    """What a loader is: batches, and how many."""

    def __iter__(self) -> Iterator[T]: ...

    def __len__(self) -> int: ...


class Progress:
    """Shows steps, values, speed and time left, measured from `start_step` of this process's start.

    Times come from the monotonic clock: a changed wall clock moves no estimate.
    """

    def __init__(
        self, total_steps: int, start_step: int, samples_per_step: int = 0, *, lines: bool = True
    ) -> None:
        """Without `lines` there is the bar alone."""
        self.total_steps, self._start_step = total_steps, start_step
        self._samples_per_step = samples_per_step
        self._began = self._line_at = time.monotonic()
        self._first, self._lines = True, lines
        self._bar = _open_bar(total_steps, start_step, unit="step")

    def speed(self, step: int) -> float:
        """Steps a second since this process began to train."""
        return (step - self._start_step) / max(time.monotonic() - self._began, 1e-9)

    def eta_s(self, step: int) -> float | None:
        """Seconds to the last step at the speed so far; None before the first step."""
        speed = self.speed(step)
        return max(0.0, (self.total_steps - step) / speed) if step > self._start_step else None

    def show(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Report a step: the bar always, a line at most every ten seconds."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix(values, refresh=False)
            return
        if self._lines and (
            self._first
            or time.monotonic() - self._line_at >= _EVERY_SECONDS
            or step == self.total_steps
        ):
            self._line_at, self._first = time.monotonic(), False
            log.info(self._line(step, epoch, values))

    def close(self) -> None:
        """Leave the bar's last state on the terminal."""
        if self._bar is not None:
            self._bar.close()

    def _line(self, step: int, epoch: int, values: dict[str, float]) -> str:
        eta = self.eta_s(step)
        parts = [f"step={step}/{self.total_steps}", f"epoch={epoch + 1}"]
        parts += [f"{tag}={value:.6g}" for tag, value in values.items()]
        parts.append(f"steps/s={self.speed(step):.3g}")
        if self._samples_per_step:
            parts.append(f"samples/s={self.speed(step) * self._samples_per_step:.4g}")
        if eta is not None:
            parts.append(f"eta={clock(eta)}")
        return " ".join(parts)


class Share:
    """How far a part without steps is (a validation, a test), as text, and in the log."""

    def __init__(self) -> None:
        self._what, self._began, self._line_at = "", 0.0, 0.0

    def text(self, what: str, done: int, total: int) -> str:
        """'test 120/3600, eta 0:27:00'; at most every ten seconds it is logged, too."""
        now = time.monotonic()
        if what != self._what or done == 0:
            self._what, self._began, self._line_at = what, now, now
        speed = done / max(now - self._began, 1e-9)
        said = f"{what} {done}/{total}"
        if 0 < done < total:
            said += f", eta {clock((total - done) / speed)}"
        if now - self._line_at >= _EVERY_SECONDS:
            self._line_at = now
            log.info(said)
        return said


def shown(batches: Counted[T], what: str) -> Iterator[T]:
    """`batches`, while the log says every ten seconds how far they are."""
    share = Share()
    for number, batch in enumerate(batches):
        share.text(what, number, len(batches))
        yield batch


def span(seconds: float) -> str:
    """A time in its largest unit: 45 → '45 s', 4000 → '1 h'."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def clock(seconds: float) -> str:
    """3725 → '1:02:05'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class Meter:
    """How far a fetch is: a bar on a terminal, in a log a line every ten seconds."""

    def __init__(self, total: int, done: int) -> None:
        self.name = ""
        self._total, self._done, self._start = total, done, done
        self._began = self._line_at = time.monotonic()
        self._bar = None
        if total > done:
            self._bar = _open_bar(total, done, unit="B", unit_scale=True)

    def __str__(self) -> str:
        return f"{amount(self._done)} of {amount(self._total)}"

    def add(self, count: int) -> None:
        """So many bytes more."""
        self._done += count
        if self._bar is not None:
            self._bar.set_description(self.name, refresh=False)
            self._bar.update(count)
        elif self._total and time.monotonic() - self._line_at >= _EVERY_SECONDS:
            self._line_at = time.monotonic()
            speed = (self._done - self._start) / (self._line_at - self._began)
            left = clock((self._total - self._done) / max(speed, 1.0))
            log.info("%s: %s, %s/s, %s left", self.name, self, amount(speed), left)

    def close(self) -> None:
        """Leave the bar's last state on the terminal."""
        if self._bar is not None:
            self._bar.close()


def amount(size: float) -> str:
    """9985123456 → '9.99 GB'."""
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _open_bar(total: int, start: int, **units: Any) -> Any:
    if not (sys.stderr and sys.stderr.isatty() and sys.stdout and sys.stdout.isatty()):
        return None
    from tqdm import tqdm

    return tqdm(total=total, initial=start, dynamic_ncols=True, **units)
