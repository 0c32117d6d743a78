"""Fetch the catalogue's pictures into data/train_images and data/valid_images.

python crawl_images.py                          both, 20 at a time
python crawl_images.py --workers 64             more at a time
python crawl_images.py --train-only             those of item2meta_train.json alone
python crawl_images.py --valid-only             those of item2meta_valid.jsonl alone

Interrupted or killed, the same command continues: what is there and decodes is not fetched again.
Pictures that could not be had are listed in data/crawl_failures.jsonl with the reason.
Exit code 0: every picture is there, or gone for good where it was; 1: another run may get more.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import threading
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import option, parse
from shared.errors import DONE, FAILED, UserError
from shared.launch import launch_alone
from shared.progress import clock
from shared.settings import Connections, Seconds

if TYPE_CHECKING:  # httpx and the reader of pictures come after the input is checked
    from lavic.src.catalogue import Picture
    from lavic.src.vision.fetch import Fetcher
    from lavic.src.vision.picture_store import Failures, Folder
    from shared.web import TransientError

log = logging.getLogger(__name__)

DATA_ROOT = Path(__file__).resolve().parents[1] / "data"
LINE_EVERY = 10.0  # seconds between lines of progress
FIRST_PAUSE = 1.0  # seconds before the second try; doubles each time
LONGEST_PAUSE = 60.0
LONGEST_WAIT = 300.0  # that a server may ask for by Retry-After
LAST_BYTES = 3.0  # seconds that pictures on their way have after a stop signal
OUTAGE = 30.0  # seconds of rest for a host that has answered before, after a row of lost tries


@dataclass(frozen=True)
class Config:
    """Settings of the crawl."""

    workers: Connections = option(20, "pictures fetched at a time")
    per_host: Connections = option(16, "of these, at most so many from one host")
    retries: int = option(4, "further tries after a lost connection or a busy server")
    timeout: Seconds = option(20.0, "seconds without a byte until a connection counts as lost")
    train_only: bool = option(False, "fetch the training pictures alone")
    valid_only: bool = option(False, "fetch the validation pictures alone")
    data_root: Path = option(DATA_ROOT, "where the item files lie and the pictures go")
    train_data: Path | None = option(None, "default: item2meta_train.json in the data root")
    val_data: Path | None = option(None, "default: item2meta_valid.jsonl in the data root")
    dry_run: bool = option(False, "count what is there and what is to fetch, fetch nothing")
    config: Path | None = option(None, "YAML or JSON file of these settings")
    print_config: bool = option(False, "print the settings as JSON, stop")

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.train_only and self.valid_only:
            raise ValueError("train_only and valid_only leave nothing to fetch: type one of them")

    def item_files(self) -> dict[str, Path]:
        """{split: its item file} of what is to be fetched."""
        files = {}
        if not self.valid_only:
            files["train"] = self.train_data or self.data_root / "item2meta_train.json"
        if not self.train_only:
            files["valid"] = self.val_data or self.data_root / "item2meta_valid.jsonl"
        return files


def main(argv: list[str] | None = None) -> int:
    """Check the item files, then fetch; the exit code."""
    cfg = parse(Config, argv, __doc__)
    for split, path in cfg.item_files().items():
        _check_file(split, path)
    from lavic.src.catalogue import read_pictures

    pictures = [p for split, path in cfg.item_files().items() for p in read_pictures(split, path)]
    if cfg.dry_run:
        return _plan(cfg, pictures)
    return crawl(cfg, pictures)


def crawl(cfg: Config, pictures: list[Picture]) -> int:
    """Fetch what is not there whole; the exit code."""
    from lavic.src.vision.picture_store import FAILURES, FOLDERS, Failures, Folder, take_lock

    release = take_lock(cfg.data_root)
    stop.hold()
    try:
        folders = {split: Folder(cfg.data_root / FOLDERS[split]) for split in cfg.item_files()}
        failures = Failures(cfg.data_root / FAILURES, set(folders))
        missing = _missing(pictures, folders, cfg.workers)
        crawler = Crawler(cfg, folders, failures)
        crawler.run(missing)
        for sink in (*folders.values(), failures):
            sink.close()
        return _conclude(cfg, crawler, len(pictures), len(missing))
    finally:
        release()


# --- the crawl ------------------------------------------------------------------------------------


@dataclass
class Host:
    """A host, what is to be had from it, and how it has answered so far."""

    name: str
    waiting: deque[Picture] = field(default_factory=deque)
    not_before: float = 0.0
    has_answered: bool = False
    num_lost: int = 0  # tries in a row that it left without an answer
    given_up: str = ""  # why nothing is asked of it any more


@dataclass
class Tally:
    """What came of the pictures so far; `reasons` of those that failed."""

    fetched: int = 0
    num_bytes: int = 0
    failed: int = 0
    may_come: int = 0  # of the failed: those that another crawl may get
    reasons: Counter[str] = field(default_factory=Counter)


class Crawler:
    """Fetches pictures by a pool of threads for each host, `workers` requests at a time in all."""

    def __init__(self, cfg: Config, folders: dict[str, Folder], failures: Failures) -> None:
        self._cfg, self._folders, self._failures = cfg, folders, failures
        self._slots, self._lock = threading.Semaphore(cfg.workers), threading.Lock()
        self._ending = threading.Event()
        self.tally, self.seconds = Tally(), 0.0
        self.error: BaseException | None = None

    def run(self, missing: list[Picture]) -> None:
        """Fetch the pictures; progress goes to the log. Raises OSError when the disk is full."""
        from lavic.src.vision.fetch import Fetcher, open_client

        hosts: dict[str, Host] = {}
        for picture in missing:
            if picture.problem:
                self._fail(picture, picture.problem, tries=0, is_final=True)
                continue
            name = urlsplit(picture.url).netloc
            hosts.setdefault(name, Host(name)).waiting.append(picture)
        with open_client(self._cfg.workers, self._cfg.timeout) as client:
            fetcher = Fetcher(client, self._cfg.timeout, self._ending.is_set)
            threads = [  # daemons: one that hangs is left behind at a stop
                threading.Thread(target=self._work, args=(fetcher, host), daemon=True)
                for host in hosts.values()
                for _ in range(min(self._cfg.per_host, self._cfg.workers, len(host.waiting)))
            ]
            for thread in threads:
                thread.start()
            self._watch(threads, len(missing))
        if self.error and not stop.number():
            raise self.error

    def _watch(self, threads: list[threading.Thread], total: int) -> None:
        began = line_at = time.monotonic()
        stopped_at = math.inf
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            now = time.monotonic()
            if stop.number() or self.error:
                self._ending.set()
                stopped_at = min(stopped_at, now)
            if now - stopped_at > LAST_BYTES:
                break
            if now - line_at >= LINE_EVERY:
                line_at = now
                log.info(_progress(self.tally, total, now - began))
        self.seconds = time.monotonic() - began

    def _work(self, fetcher: Fetcher, host: Host) -> None:
        """One thread of a host's pool: pictures of it, one after another."""
        try:
            while not self._ending.is_set():
                try:
                    picture = host.waiting.popleft()
                except IndexError:
                    return
                self._have(fetcher, host, picture)
        except BaseException as error:  # a full disk, or a mistake of ours: the crawl ends
            self.error = self.error or error

    def _have(self, fetcher: Fetcher, host: Host, picture: Picture) -> None:
        """Try for one picture until it is there, refused, or given up."""
        from lavic.src.vision.fetch import RefusedError, StoppedError
        from shared.web import TransientError

        for tries in range(1, self._cfg.retries + 2):
            self._ending.wait(max(0.0, host.not_before - time.monotonic()))
            if self._ending.is_set():
                return
            if host.given_up:
                return self._fail(picture, host.given_up, tries - 1, is_final=False)
            try:
                with self._slots:
                    content = fetcher.fetch(picture.url)
            except StoppedError:
                return
            except RefusedError as refusal:
                self._note_answer(host)
                return self._fail(picture, str(refusal), tries, is_final=True)
            except TransientError as error:
                pause = self._after(host, error, tries)
                if host.given_up or tries > self._cfg.retries:
                    return self._fail(picture, host.given_up or error.reason, tries, is_final=False)
                self._ending.wait(pause)
            else:
                self._note_answer(host)
                return self._put(picture, content)

    def _after(self, host: Host, error: TransientError, tries: int) -> float:
        """Seconds until the next try; the host is given a rest, or up, where it asks for that."""
        from lavic.src.vision.fetch import UnreachableError

        pause = min(FIRST_PAUSE * 2 ** (tries - 1), LONGEST_PAUSE)
        pause = pause if error.after is None else error.after
        if isinstance(error, UnreachableError):
            self._lost_one(host, error)
            return pause
        self._note_answer(host)
        if pause > LONGEST_WAIT:
            self._give_up(host, f"{error.reason}, and asks to wait {clock(pause)}")
        elif error.after is not None or error.reason == "answered 429":
            self._rest(host, pause)
        return pause

    def _note_answer(self, host: Host) -> None:
        with self._lock:
            host.has_answered, host.num_lost = True, 0

    def _lost_one(self, host: Host, error: TransientError) -> None:
        """Count a try without an answer; many in a row mean an outage, or that nobody is there."""
        with self._lock:
            host.num_lost += 1
            lost = host.num_lost
        if lost >= (10 if host.has_answered else 2) * self._cfg.per_host:
            self._give_up(host, f"{host.name} cannot be reached ({error.reason})")
        elif host.has_answered and lost % self._cfg.per_host == 0:
            log.warning("%s does not answer: asked again in %.0f s", host.name, OUTAGE)
            self._rest(host, OUTAGE)

    def _rest(self, host: Host, seconds: float) -> None:
        """Ask a host for nothing for so long."""
        with self._lock:
            host.not_before = max(host.not_before, time.monotonic() + seconds)

    def _give_up(self, host: Host, reason: str) -> None:
        with self._lock:
            is_new, host.given_up = not host.given_up, host.given_up or reason
        if is_new and host.waiting:
            log.warning(
                "%s: %d pictures are not fetched now (%s)", host.name, len(host.waiting), reason
            )

    def _put(self, picture: Picture, content: bytes) -> None:
        self._folders[picture.split].put(picture.name, content)
        with self._lock:
            self.tally.fetched += 1
            self.tally.num_bytes += len(content)

    def _fail(self, picture: Picture, reason: str, tries: int, *, is_final: bool) -> None:
        with self._lock:
            self.tally.failed += 1
            self.tally.may_come += not is_final
            self.tally.reasons[reason] += 1
        self._failures.add(picture, reason, tries, is_final=is_final)


# --- what is there, and what came of it -----------------------------------------------------------


def _missing(pictures: list[Picture], folders: dict[str, Folder], workers: int) -> list[Picture]:
    """Those that are not there whole; files not known yet are decoded, by several threads."""
    began = line_at = time.monotonic()

    def is_there(picture: Picture) -> bool:
        if stop.number() or picture.problem:
            return False
        return folders[picture.split].holds(picture.name)

    missing: list[Picture] = []
    with ThreadPoolExecutor(min(workers, os.cpu_count() or 1)) as pool:
        answers = pool.map(is_there, pictures)
        for number, (picture, there) in enumerate(zip(pictures, answers, strict=True), 1):
            missing += [] if there else [picture]
            if time.monotonic() - line_at >= LINE_EVERY:
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


def _conclude(cfg: Config, crawler: Crawler, total: int, missing: int) -> int:
    """Say what came of it; the exit code."""
    from lavic.src.vision.picture_store import FAILURES
    from shared.images import printable

    tally = crawler.tally
    log.info(
        "fetched %d, there before %d, failed %d of %d | %.2f MB in %s | %s",
        tally.fetched, total - missing, tally.failed, total,
        tally.num_bytes / 1e6, clock(crawler.seconds), _rate(tally, crawler.seconds),
    )  # fmt: skip
    for reason, count in tally.reasons.most_common(10):
        log.info("  %6d x %s", count, printable(reason))
    if tally.failed:
        log.info("each with its reason in %s", cfg.data_root / FAILURES)
    if stop.number():
        log.info("%s: stopped; the same command continues", stop.name_of(stop.number()))
        return stop.exit_code_for(stop.number())
    if tally.may_come:
        log.warning("%d of them may come yet: type the same command again", tally.may_come)
    return FAILED if tally.may_come or tally.failed == total else DONE


def _plan(cfg: Config, pictures: list[Picture]) -> int:
    from lavic.src.vision.picture_store import FOLDERS

    for split in cfg.item_files():
        folder, named = cfg.data_root / FOLDERS[split], [p for p in pictures if p.split == split]
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
        there = sum(picture.name in names for picture in named)
        print(f"{split}: {len(named)} pictures, {there} files there; into {folder}")
    return DONE


def _check_file(split: str, path: Path) -> None:
    if path.is_file():
        return
    packed = path.with_name(path.name + ".zip")
    if packed.is_file():
        raise UserError(f"{path} is still packed: unzip {packed} in its directory")
    other = "--valid-only" if split == "train" else "--train-only"
    raise UserError(f"{path} is missing: put it there, or fetch the other pictures by {other}")


if __name__ == "__main__":
    sys.exit(launch_alone(main))
