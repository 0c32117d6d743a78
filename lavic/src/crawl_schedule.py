"""Which picture is fetched next: hosts take turns, none is asked too often or before its time."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import urlsplit

from lavic.src.crawl_list import Picture


@dataclass
class Task:
    """A picture to fetch, and the tries it has had."""

    picture: Picture
    tries: int = 0

    @property
    def host(self) -> str:
        """Who is asked for it."""
        return urlsplit(self.picture.url).netloc


class Schedule:
    """Tasks for several threads. Each task taken ends by `done` or by `again`.

    per_host: how many tasks of one host may be taken at a time.
    """

    def __init__(self, per_host: int, now: Callable[[], float] = time.monotonic) -> None:
        self._per_host, self._now = per_host, now
        self._ready: dict[str, deque[Task]] = {}  # by host; the host whose turn it is comes first
        self._later: list[tuple[float, int, Task]] = []  # a heap by due time
        self._busy: Counter[str] = Counter()
        self._not_before: dict[str, float] = {}
        self._stopped, self._order = False, 0
        self._changed = threading.Condition()

    def add(self, task: Task) -> None:
        """Put a task at the end of its host's queue."""
        with self._changed:
            self._ready.setdefault(task.host, deque()).append(task)
            self._changed.notify()

    def take(self) -> Task | None:
        """The next task, waited for; None when none will come."""
        with self._changed:
            while not self._stopped:
                task = self._next()
                if task is not None:
                    return task
                if not (self._later or any(self._ready.values()) or self._busy.total()):
                    self._changed.notify_all()
                    return None
                self._changed.wait(self._pause())
            return None

    def done(self, task: Task) -> None:
        """The task is over, well or not."""
        with self._changed:
            self._busy[task.host] -= 1
            self._changed.notify_all()

    def again(self, task: Task, delay: float) -> None:
        """Give the task out once more, in `delay` seconds."""
        with self._changed:
            self._busy[task.host] -= 1
            self._order += 1
            heapq.heappush(self._later, (self._now() + delay, self._order, task))
            self._changed.notify_all()

    def rest(self, host: str, seconds: float) -> None:
        """Ask a host for nothing for so long."""
        with self._changed:
            until = self._now() + seconds
            self._not_before[host] = max(self._not_before.get(host, until), until)

    def give_up(self, host: str) -> list[Task]:
        """Take all waiting tasks of a host out; they are the result."""
        with self._changed:
            out = list(self._ready.pop(host, ()))
            out += [task for _, _, task in self._later if task.host == host]
            self._later = [entry for entry in self._later if entry[2].host != host]
            heapq.heapify(self._later)
            self._changed.notify_all()
            return out

    def stop(self) -> None:
        """Give nothing out any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _next(self) -> Task | None:
        now = self._now()
        while self._later and self._later[0][0] <= now:
            task = heapq.heappop(self._later)[2]
            self._ready.setdefault(task.host, deque()).append(task)
        for host, queue in self._ready.items():
            is_free = self._busy[host] < self._per_host and self._not_before.get(host, now) <= now
            if queue and is_free:
                self._busy[host] += 1
                self._ready[host] = self._ready.pop(host)  # to the end: the others' turn
                return queue.popleft()
        return None

    def _pause(self) -> float | None:
        """Seconds until time alone may bring a task; None when only another thread can."""
        times = [entry[0] for entry in self._later[:1]]
        times += [self._not_before.get(host, 0) for host, queue in self._ready.items() if queue]
        ahead = [when - self._now() for when in times if when > self._now()]
        return max(min(ahead), 0.001) if ahead else None
