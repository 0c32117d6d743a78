"""The crawl: threads that take pictures from the schedule, fetch them and put them away."""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lavic.src.crawl_fetch import (
    Fetcher,
    RefusedError,
    StoppedError,
    UnreachableError,
    open_client,
)
from lavic.src.crawl_list import Picture, pictures_of, why_unusable
from lavic.src.crawl_schedule import Schedule, Task
from lavic.src.crawl_store import FAILURES, FOLDERS, Failures, Folder, take_lock
from shared.errors import DONE, FAILED
from shared.images import printable
from shared.progress import clock
from shared.signals import StopRequest, exit_code_for, name_of
from shared.web import TransientError

if TYPE_CHECKING:
    from lavic.src.crawl_images import Config

log = logging.getLogger(__name__)

_LINE_EVERY = 10.0  # seconds between lines of progress
_FIRST_PAUSE = 1.0  # seconds before the second try; doubles each time
_LONGEST_PAUSE = 60.0
_LONGEST_WAIT = 300.0  # that a server may ask for by Retry-After
_LAST_BYTES = 3.0  # seconds that pictures on their way have after a stop signal
_OUTAGE = 30.0  # seconds of rest for a host that has answered before, after a row of lost tries


def crawl(cfg: Config) -> int:
    """Fetch what the item files name and is not there; the exit code."""
    found = {split: pictures_of(split, path) for split, path in cfg.item_files().items()}
    if cfg.dry_run:
        return _plan(cfg, found)
    release, stop = take_lock(cfg.data_root), StopRequest()
    stop.install()
    try:
        folders = {split: Folder(cfg.data_root / FOLDERS[split]) for split in found}
        failures = Failures(cfg.data_root / FAILURES, set(found))
        every = [picture for pictures in found.values() for picture in pictures]
        missing = _missing(every, folders, cfg.workers, stop)
        crawler = Crawler(cfg, folders, failures, stop)
        crawler.run(missing)
        for sink in (*folders.values(), failures):
            sink.close()
        return _conclude(cfg, crawler, len(every), len(every) - len(missing), stop)
    finally:
        stop.remove()
        release()


@dataclass
class Tally:
    """What came of the pictures so far; `reasons` of those that failed."""

    fetched: int = 0
    num_bytes: int = 0
    failed: int = 0
    may_come: int = 0  # of the failed: those that another crawl may get
    reasons: Counter[str] = field(default_factory=Counter)


class Crawler:
    """Fetches pictures by several threads, until all are had or given up, or the user stops it."""

    def __init__(
        self, cfg: Config, folders: dict[str, Folder], failures: Failures, stop: StopRequest
    ) -> None:
        self._cfg, self._folders, self._failures, self._stop = cfg, folders, failures, stop
        self._schedule, self._lock = Schedule(cfg.per_host), threading.Lock()
        self._lost: Counter[str] = Counter()  # tries in a row that a host left without an answer
        self._answered: set[str] = set()
        self.tally, self.seconds = Tally(), 0.0
        self.error: BaseException | None = None

    def run(self, missing: list[Picture]) -> None:
        """Fetch the pictures; progress goes to the log. Raises OSError when the disk is full."""
        for picture in missing:
            reason = why_unusable(picture)
            if reason:
                self._fail(Task(picture), reason, is_final=True)
            else:
                self._schedule.add(Task(picture))
        began = time.monotonic()
        with open_client(self._cfg.workers, self._cfg.timeout) as client:
            fetcher = Fetcher(client, self._cfg.timeout, lambda: bool(self._stop.number))
            threads = [
                threading.Thread(target=self._work, args=(fetcher,), daemon=True)
                for _ in range(self._cfg.workers)
            ]
            for thread in threads:
                thread.start()
            self._watch(threads, began, len(missing))
        self.seconds = time.monotonic() - began
        if self.error and not self._stop.number:
            raise self.error

    def _watch(self, threads: list[threading.Thread], began: float, total: int) -> None:
        line_at, stopped_at = began, math.inf
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            if self._stop.number or self.error:
                self._schedule.stop()
                stopped_at = min(stopped_at, time.monotonic())
            if time.monotonic() - stopped_at > _LAST_BYTES:
                return  # those that hang still are left behind
            if time.monotonic() - line_at >= _LINE_EVERY:
                line_at = time.monotonic()
                log.info(_progress(self.tally, total, line_at - began))

    def _work(self, fetcher: Fetcher) -> None:
        while (task := self._schedule.take()) is not None:
            try:
                self._attempt(fetcher, task)
            except BaseException as error:  # a full disk, or a mistake of ours: the crawl ends
                self.error = self.error or error
                self._schedule.done(task)

    def _attempt(self, fetcher: Fetcher, task: Task) -> None:
        """One try for one picture, and what follows from it."""
        task.tries += 1
        try:
            content = fetcher.fetch(task.picture.url)
        except StoppedError:
            self._schedule.done(task)
        except RefusedError as refusal:
            self._heard_from(task.host)
            self._fail(task, str(refusal), is_final=True)
            self._schedule.done(task)
        except TransientError as error:
            self._retry(task, error)
        else:
            self._heard_from(task.host)
            self._folders[task.picture.split].put(task.picture.name, content)
            with self._lock:
                self.tally.fetched += 1
                self.tally.num_bytes += len(content)
            self._schedule.done(task)

    def _retry(self, task: Task, error: TransientError) -> None:
        """Have the task come again later, or give it or its whole host up."""
        pause = min(_FIRST_PAUSE * 2 ** (task.tries - 1), _LONGEST_PAUSE)
        if error.after is not None:
            pause = error.after
        if isinstance(error, UnreachableError):
            self._lost_one(task.host, error)
        else:
            self._heard_from(task.host)
            if error.after is not None or error.reason == "answered 429":
                self._schedule.rest(task.host, min(pause, _LONGEST_WAIT))
        if pause > _LONGEST_WAIT:
            self._give_up(task.host, f"{error.reason}, and asks to wait {clock(pause)}")
        elif task.tries <= self._cfg.retries:
            self._schedule.again(task, pause)
            return
        self._fail(task, error.reason, is_final=False)
        self._schedule.done(task)

    def _heard_from(self, host: str) -> None:
        with self._lock:
            self._answered.add(host)
            self._lost[host] = 0

    def _lost_one(self, host: str, error: TransientError) -> None:
        """Count a try without an answer; many in a row mean an outage, or that nobody is there."""
        with self._lock:
            self._lost[host] += 1
            lost, is_known = self._lost[host], host in self._answered
        if lost >= (10 if is_known else 2) * self._cfg.per_host:
            self._give_up(host, f"{host} cannot be reached ({error.reason})")
        elif is_known and lost % self._cfg.per_host == 0:
            log.warning("%s does not answer: asked again in %.0f s", host, _OUTAGE)
            self._schedule.rest(host, _OUTAGE)

    def _give_up(self, host: str, reason: str) -> None:
        tasks = self._schedule.give_up(host)
        if tasks:
            log.warning("%s: %d pictures are not fetched now (%s)", host, len(tasks), reason)
        for task in tasks:
            self._fail(task, reason, is_final=False)

    def _fail(self, task: Task, reason: str, *, is_final: bool) -> None:
        with self._lock:
            self.tally.failed += 1
            self.tally.may_come += not is_final
            self.tally.reasons[reason] += 1
        self._failures.add(task.picture, reason, task.tries, is_final=is_final)


def _missing(
    pictures: list[Picture], folders: dict[str, Folder], workers: int, stop: StopRequest
) -> list[Picture]:
    """Those that are not there whole; files not known yet are decoded, by several threads."""
    began = line_at = time.monotonic()

    def is_there(picture: Picture) -> bool:
        if stop.number or why_unusable(picture):
            return False
        return folders[picture.split].holds(picture.name)

    missing = []
    with ThreadPoolExecutor(min(workers, os.cpu_count() or 1)) as pool:
        answers = pool.map(is_there, pictures)
        for number, (picture, there) in enumerate(zip(pictures, answers, strict=True), 1):
            missing += [] if there else [picture]
            if time.monotonic() - line_at >= _LINE_EVERY:
                line_at = time.monotonic()
                rate = number / (line_at - began)
                log.info("looked at %d of %d (%.0f a second)", number, len(pictures), rate)
    there = len(pictures) - len(missing)
    log.info("%d pictures: %d there, %d to fetch", len(pictures), there, len(missing))
    return missing


def _progress(tally: Tally, total: int, seconds: float) -> str:
    over = tally.fetched + tally.failed
    eta = clock((total - over) * seconds / over) if over else "?"
    counts = f"{over}/{total} | fetched {tally.fetched} | failed {tally.failed}"
    return f"{counts} | {_rate(tally, seconds)} | eta {eta}"


def _rate(tally: Tally, seconds: float) -> str:
    seconds = max(seconds, 1e-9)
    return f"{tally.fetched / seconds:.1f} pictures/s | {tally.num_bytes / seconds / 1e6:.2f} MB/s"


def _conclude(cfg: Config, crawler: Crawler, total: int, there: int, stop: StopRequest) -> int:
    """Say what came of it; the exit code."""
    tally = crawler.tally
    log.info(
        "fetched %d, there before %d, failed %d of %d | %.2f MB in %s | %s",
        tally.fetched,
        there,
        tally.failed,
        total,
        tally.num_bytes / 1e6,
        clock(crawler.seconds),
        _rate(tally, crawler.seconds),
    )
    for reason, count in tally.reasons.most_common(10):
        log.info("  %6d x %s", count, printable(reason))
    if tally.failed:
        log.info("each with its reason in %s", cfg.data_root / FAILURES)
    if stop.number:
        log.info("%s: stopped; the same command continues", name_of(stop.number))
        return exit_code_for(stop.number)
    if tally.may_come:
        log.warning("%d of them may come yet: type the same command again", tally.may_come)
    return FAILED if tally.may_come or tally.failed == total else DONE


def _plan(cfg: Config, found: dict[str, list[Picture]]) -> int:
    for split, pictures in found.items():
        folder = cfg.data_root / FOLDERS[split]
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
        there = sum(picture.name in names for picture in pictures)
        sys.stdout.write(f"{split}: {len(pictures)} pictures, {there} files there; into {folder}\n")
    return DONE
