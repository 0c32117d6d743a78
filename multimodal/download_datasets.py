"""Fetch the data sets COCO, Clotho, AudioCaps, VoxCeleb, and the word embeddings of texts.

python download_datasets.py --datasets coco                     one of them
python download_datasets.py --datasets coco clotho audiocaps    several
python download_datasets.py --datasets all                      all four
python download_datasets.py --datasets coco --dry-run           what it takes: bytes and disk
python download_datasets.py --datasets all --skip-existing      pass over files of the right size
python download_datasets.py --datasets audiocaps --audiocaps-source local:DIR
VOXCELEB_KEY=… python download_datasets.py --datasets voxceleb  with the key that they gave you

After an interruption the same command continues. Every file is checked against its checksum where
there is one. One data set's failure does not stop the others; the exit code tells.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # repository root, for shared
sys.path.sort(key=lambda path: path == str(Path(__file__).resolve().parent))  # datasets.py last

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import option, parse
from shared.errors import (
    DONE,
    INTERRUPTED,
    MissingToolError,
    UserError,
    did_you_mean,
    one_line,
    shortened,
)
from shared.files import read_object, write_json
from shared.launch import launch_alone
from shared.settings import Connections

if TYPE_CHECKING:
    from multimodal.pairs.clips import YouTube
    from multimodal.pairs.sources import Archive, DataSet, Source
    from shared.download import File
    from shared.web import Client

RECIPE = Path(__file__).resolve().parent
DATA_ROOT = RECIPE / "data"
SUMMARY = "downloads.json"  # below the data root: what became of each data set
_LONGEST_CALL = 180.0  # seconds for a program's one clip

VOXCELEB_BY_HAND = """VoxCeleb is given to those who ask for it. Two ways:
  1. Ask for a key at https://cn01.mmai.io/keyreq/voxceleb and type
     VOXCELEB_KEY=your-key python download_datasets.py --datasets voxceleb
  2. Put the files there yourself, as VoxCeleb1's archives hold them:
     {root}/wav/id10001/<video>/00001.wav
     {root}/faces/id10001/<video>/*.jpg   frames, for pairs of faces and voices (optional)
     m4a of VoxCeleb2: ffmpeg -i IN.m4a -ac 1 -vn -acodec pcm_s16le -ar 16000 OUT.wav"""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """Settings of the download."""

    datasets: tuple[str, ...] = option(
        ("coco", "clotho", "audiocaps"), "coco clotho audiocaps voxceleb coco2014, or all"
    )
    data_root: Path = option(DATA_ROOT, "where the data sets go, each in its own directory")
    skip_existing: bool = option(False, "pass over files of the right size, checksum or not")
    verify: bool = option(False, "compute the checksums of all archives that are there again")
    delete_archives: bool = option(False, "delete an archive when it is unpacked")
    words: bool = option(True, "fetch open_clip's word embeddings too, for sets with captions")
    audiocaps_source: str = option(
        "youtube", "AudioCaps' sounds: youtube, hf:OWNER/NAME or local:DIRECTORY"
    )
    cookies: Path | None = option(None, "cookies.txt of a browser that YouTube knows")
    max_workers: Connections = option(4, "clips fetched from YouTube at once")
    mirror: str | None = option(None, "address of a directory with all files, in place of theirs")
    demo: bool = option(False, "make the built-in demo data, in multimodal/demo; fetch nothing")
    config: Path | None = option(None, "YAML or JSON file of these settings")
    dry_run: bool = option(False, "say what is there and what it takes, fetch nothing")
    print_config: bool = option(False, "print the settings as JSON, stop")


@dataclass(frozen=True)
class Outcome:
    """What became of a data set."""

    name: str
    code: int
    text: str


def main(argv: list[str] | None = None) -> int:
    """Fetch the data sets one after another; the exit code of the first that failed."""
    cfg = parse(Config, argv, __doc__)
    chosen = _chosen(cfg.datasets)
    _check_source(cfg)
    if cfg.demo:
        return _make_demo(cfg)
    from multimodal.pairs.sources import DATA_SETS

    data_sets = [DATA_SETS[name] for name in chosen]
    if cfg.mirror:
        data_sets = [pointed_at(item, cfg.mirror) for item in data_sets]
    data_sets = [from_source(item, cfg.audiocaps_source, cfg.data_root) for item in data_sets]
    needs = {item.name: need_of(item, _root(cfg, item)) for item in data_sets}
    if cfg.words and any("text" in item.modalities for item in data_sets):
        needs = {"words": need_of_words(cfg.data_root)} | needs
    for name, need in needs.items():
        print(f"{name:<10} {need.fetch:>15,} bytes to fetch {need.disk:>16,} bytes of disk")
    if cfg.dry_run:
        return DONE
    outcomes = [_try(lambda: _get_words(cfg), "words")] if "words" in needs else []
    outcomes += [_try(lambda item=item: _get(cfg, item), item.name) for item in data_sets]
    return _conclude(outcomes, cfg.data_root)


def _chosen(names: tuple[str, ...]) -> tuple[str, ...]:
    from multimodal.pairs.sources import DATA_SETS, NAMES

    for name in names:
        if name not in (*DATA_SETS, "all"):
            near = did_you_mean(name, (*DATA_SETS, "all"))
            raise UserError(f"--datasets {name}: allowed are {', '.join(DATA_SETS)} and all{near}")
    return tuple(
        dict.fromkeys(one for name in names for one in (NAMES if name == "all" else [name]))
    )


def _check_source(cfg: Config) -> None:
    from multimodal.pairs.sources import check_audiocaps

    check_audiocaps(cfg.audiocaps_source)
    if cfg.mirror and not cfg.mirror.startswith(("http://", "https://")):
        raise UserError(
            f"--mirror {shortened(cfg.mirror)}: expected an address that begins with http:// or "
            "https://; archives that you have on a disk are used when they are in "
            f"{cfg.data_root / '<data set>' / 'downloads'}"
        )
    if cfg.cookies and not cfg.cookies.is_file():
        raise UserError(f"--cookies {cfg.cookies}: no such file")


def _make_demo(cfg: Config) -> int:
    from multimodal.demo_data import demo

    if cfg.dry_run:
        print(f"demo data would be made in {RECIPE / 'demo'}")
        return DONE
    print(f"{demo.build(RECIPE / 'demo').data_root} holds coco, clotho, audiocaps, voxceleb")
    return DONE


def _root(cfg: Config, data_set: DataSet) -> Path:
    """A data set's directory; the two years of COCO share theirs."""
    return cfg.data_root / data_set.name.removesuffix("2014")


def _key() -> str:
    return os.environ.get("VOXCELEB_KEY") or ""


def _get_words(cfg: Config) -> str:
    """Get the file that training's word embeddings start from; where it is."""
    from multimodal.pairs.sources import fetched_words, own_weights

    own = own_weights("auto", cfg.data_root)
    return str(own or fetched_words(cfg.data_root, cfg.mirror))


def _get(cfg: Config, data_set: DataSet) -> str:
    """Get one data set; what there is to say of it."""
    root = _root(cfg, data_set)
    if data_set.needs_key and not _key() and not cfg.mirror:
        return _by_hand(data_set, root)
    _get_files(cfg, data_set, root)
    if data_set.clips:
        return _get_clips(cfg, root)
    return _look_at_lists(root) if root.name == "coco" else "complete"


def _get_files(cfg: Config, data_set: DataSet, root: Path) -> None:
    """Fetch the files and archives of a data set and unpack these, as far as the disk allows.

    Raises UserError, DownloadError, MissingToolError; what came until then is kept.
    """
    from shared.web import Client

    by_hand = "fetch the file by hand and put it there"
    client = Client(f"leave --mirror out, or {by_hand}" if cfg.mirror else by_hand)
    check_space(need_of_files(data_set, root), data_set.name, root)
    _fetch(cfg, client, data_set.files, root)
    without_room: UserError | None = None
    for archive in data_set.archives:
        again = cfg.verify and all(part.path(root).is_file() for part in archive.parts)
        if is_unpacked(archive, root) and not again:
            log.info("%s: %s is there", data_set.name, ", ".join(archive.holds))
            continue
        try:
            need = need_of_archive(archive, root)
            check_space(need, archive.parts[0].name, root)
        except UserError as error:
            log.warning("%s; it is left out", error)
            without_room = error
            continue
        _fetch(cfg, client, archive.parts, root)
        _unpack(data_set, archive, root)
        if cfg.delete_archives:
            _delete(archive, root)
    if without_room:
        raise without_room


def _fetch(cfg: Config, client: Client, files: Sequence[Source], root: Path) -> None:
    """Fetch what is missing, each file from the first of its addresses that gives it."""
    from shared.download import fetch, plan_of

    for source in files:
        if cfg.skip_existing and source.checksum and _has_size(source, root):
            continue
        plan = plan_of([_file(source)], root / source.folder, read_again=cfg.verify)
        if plan.missing:
            log.info("%s: fetching", source.path(root))
        fetch(client, plan)


def _file(source: Source) -> File:
    """What to fetch; the key goes into addresses that ask for one."""
    from shared.download import File

    urls = tuple(url.replace("{key}", _key()) for url in source.urls)
    return File(source.name, source.size, source.checksum, urls, source.header)


def _unpack(data_set: DataSet, archive: Archive, root: Path) -> None:
    """Unpack an archive that is not. Raises DownloadError for one that holds something else."""
    from shared.unpack import unpack
    from shared.web import DownloadError

    if is_unpacked(archive, root):
        return
    paths = [part.path(root) for part in archive.parts]
    log.info("%s: unpacking %s", data_set.name, paths[0].name)
    count = unpack(paths, root, _run)
    if not is_unpacked(archive, root):
        found = {path: _count(root / path) for path in archive.holds}
        raise DownloadError(
            f"{paths[0]} held {count} files, but not what it should: found {found}, expected "
            f"{archive.holds}; --verify checks the archive again"
        )


def _delete(archive: Archive, root: Path) -> None:
    for path in (part.path(root) for part in archive.parts):
        if path.is_file():
            log.info("deleting %s (--delete-archives)", path)
            path.unlink()


def _look_at_lists(root: Path) -> str:
    """What to say of COCO when it is there: nobody publishes a checksum of Karpathy's lists."""
    from multimodal.pairs import coco
    from multimodal.pairs.sources import KARPATHY_PICTURES

    lists = coco.karpathy(root) or {}
    counts = {split: len(found) for split, found in lists.items()}
    if set(counts.values()) == {KARPATHY_PICTURES}:
        return "complete"
    return f"complete, but Karpathy's lists name {counts} pictures, not {KARPATHY_PICTURES} each"


def _by_hand(data_set: DataSet, root: Path) -> str:
    if any(is_unpacked(archive, root) for archive in data_set.archives):
        return "there, put by hand"
    print(VOXCELEB_BY_HAND.replace("{root}", str(root)))
    raise MissingToolError("VOXCELEB_KEY is not set: see the two ways above")


def _get_clips(cfg: Config, root: Path) -> str:
    """Get AudioCaps' sounds from where --audiocaps-source says; how many are there."""
    from multimodal.pairs import clips

    kind, _, rest = cfg.audiocaps_source.partition(":")
    try:
        if not clips.missing(root):
            pass
        elif kind == "local":
            directory = Path(rest).expanduser().absolute()
            clips.from_directory(root, directory, cfg.audiocaps_source)
        elif kind == "hf":
            endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
            clips.from_hub(root, rest, endpoint, _run)
        else:
            _youtube(cfg).fetch(root)
    finally:
        log.info("audiocaps: %s", clips.summary(root))
    return clips.summary(root)


def _youtube(cfg: Config) -> YouTube:
    from multimodal.pairs import clips

    tools = {name: shutil.which(name) for name in ("yt-dlp", "ffmpeg")}
    lacking = [name for name, path in tools.items() if path is None]
    if lacking:
        raise MissingToolError(
            f"AudioCaps from YouTube needs {' and '.join(lacking)}: pip install yt-dlp, install "
            "ffmpeg, or give --audiocaps-source hf:OWNER/NAME or local:DIRECTORY"
        )
    return clips.YouTube(_ask, tools["yt-dlp"] or "", cfg.cookies, cfg.max_workers)


def _run(command: Sequence[str]) -> int:
    return subprocess.run(command, check=False, stdin=subprocess.DEVNULL).returncode


def _ask(command: Sequence[str]) -> tuple[int, str, str]:
    """Exit code and output of a program; 124 when it took too long."""
    try:
        ended = subprocess.run(
            command, check=False, capture_output=True, stdin=subprocess.DEVNULL,
            timeout=_LONGEST_CALL, encoding="utf-8", errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, "", f"no end after {_LONGEST_CALL:.0f} s"
    return ended.returncode, ended.stdout, ended.stderr


def _try(work: Callable[[], str], name: str) -> Outcome:
    """Do the work; a failure is noted, so that the next data set gets its turn."""
    try:
        return Outcome(name, DONE, work())
    except UserError as error:
        if error.exit_code == INTERRUPTED:
            raise
        log.error("%s: %s", name, one_line(error))
        return Outcome(name, error.exit_code, one_line(error))


def _conclude(outcomes: list[Outcome], data_root: Path) -> int:
    """Print and write what became of each; the exit code: a failure's, a missing step's last."""
    if data_root.is_dir():
        noted = read_object(data_root / SUMMARY)
        write_json(data_root / SUMMARY, noted | {item.name: item.text for item in outcomes})
    for outcome in outcomes:
        print(f"{outcome.name:<10} {'failed: ' if outcome.code else ''}{outcome.text}")
    failed = sorted(outcome.code for outcome in outcomes if outcome.code)
    return failed[0] if failed else DONE


# --- what is there, and what it takes -------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """What getting a data set takes: bytes to fetch, and bytes on the disk in all."""

    fetch: int
    disk: int


def need_of(data_set: DataSet, root: Path) -> Need:
    """What is still to be fetched and written for the data set."""
    needs = [need_of_files(data_set, root)]
    needs += [need_of_archive(archive, root) for archive in data_set.archives]
    return Need(sum(need.fetch for need in needs), sum(need.disk for need in needs))


def need_of_words(data_root: Path) -> Need:
    """What open_clip's file of word embeddings takes."""
    from multimodal.pairs.sources import WORDS_BYTES, are_words_there

    left = 0 if are_words_there(data_root) else WORDS_BYTES
    return Need(left, left)


def need_of_files(data_set: DataSet, root: Path) -> Need:
    """What its plain files and single clips take."""
    missing = [source for source in data_set.files if not source.path(root).is_file()]
    clips = max(0, data_set.clips - _count(root / "audio", deep=True))
    total = sum(_left(source, root) for source in missing) + clips * data_set.clip_bytes
    return Need(total, total)


def need_of_archive(archive: Archive, root: Path) -> Need:
    """What an archive and its content take."""
    if is_unpacked(archive, root):
        return Need(0, 0)
    share = archive.unpacked // len(archive.parts)  # where nobody publishes a size
    parts = sum(_left(part, root, share) for part in archive.parts)
    return Need(parts, parts + archive.unpacked)


def check_space(need: Need, name: str, root: Path) -> None:
    """Raise UserError when the disk of `root` has less than `name` takes."""
    from shared.progress import amount

    directory = next(path for path in (root, *root.parents) if path.is_dir())
    free = shutil.disk_usage(directory).free
    if need.disk > free:
        raise UserError(
            f"{name}: {amount(need.disk)} are needed in {root} for archives and what they hold "
            f"and {amount(free)} are free: free some space, or name another disk by --data-root"
        )


def check_each(needs: Mapping[str, Need], root: Path) -> None:
    """Warn of the data sets for which the disk has no room; UserError when it has for none."""
    refused: list[UserError] = []
    for name, need in needs.items():
        try:
            check_space(need, name, root)
        except UserError as error:
            log.warning("%s", error)
            refused.append(error)
    if len(refused) == len(needs):
        raise refused[0]


def lacking_of(name: str, data_root: Path) -> str:
    """Why a data set cannot be trained on, '' when it can; either year of COCO will do."""
    from multimodal.pairs.sources import DATA_SETS

    forms = [form for form in DATA_SETS.values() if form.name.removesuffix("2014") == name]
    reasons = [lacking(form, data_root / name) for form in forms]
    return reasons[0] if all(reasons) else ""


def lacking(data_set: DataSet, root: Path) -> str:
    """What keeps the data set from being trained on; '' when enough is there.

    Of sounds that come one by one any will do: some are gone for good.
    """
    files = [source.name for source in data_set.files if not source.path(root).is_file()]
    files = [name for name in files if "karpathy" not in name]  # val2017 does in their place
    folders = [path for a in data_set.archives for path in a.holds if not is_unpacked(a, root)]
    missing = files or folders
    if missing:
        return f"{', '.join(missing[:3])} missing"
    clips = _count(root / "audio", deep=True)
    return f"none of {data_set.clips:,} clips" if data_set.clips and not clips else ""


def is_unpacked(archive: Archive, root: Path) -> bool:
    """Whether what the archive holds is there, counted."""
    return all(_count(root / path) >= count for path, count in archive.holds.items())


def _has_size(source: Source, root: Path) -> bool:
    """Whether the file is there, with its size where one is published."""
    path = source.path(root)
    return path.is_file() and source.size in (None, path.stat().st_size)


def _left(source: Source, root: Path, guess: int = 1_000_000) -> int:
    """Bytes of a file that are still to be fetched; `guess` of one whose size nobody publishes."""
    from shared.download import part_of, size_of

    if _has_size(source, root):
        return 0
    size = guess if source.size is None else source.size
    return max(0, size - size_of(part_of(source.path(root))))


def _count(path: Path, *, deep: bool = False) -> int:
    """Files and folders in a folder, 1 for a file, 0 where there is nothing."""
    if path.is_file():
        return 1
    if not path.is_dir():
        return 0
    if deep:
        return sum(len(files) for _, _, files in os.walk(path))
    with os.scandir(path) as entries:
        return sum(1 for entry in entries if not entry.name.startswith("."))


def from_source(data_set: DataSet, audiocaps_source: str, data_root: Path) -> DataSet:
    """The data set; of clips in a directory of the same disk, which are linked, without bytes."""
    kind, _, rest = audiocaps_source.partition(":")
    if kind == "local" and data_set.clips and _disk(Path(rest).expanduser()) == _disk(data_root):
        return replace(data_set, clip_bytes=0)
    return data_set


def _disk(path: Path) -> int:
    """The number of the disk that a path is on, or will be."""
    return next(one for one in (path, *path.absolute().parents) if one.exists()).stat().st_dev


def pointed_at(data_set: DataSet, base: str) -> DataSet:
    """The data set with every address at `base`/<file name>: a mirror of one's own."""

    def moved(source: Source) -> Source:
        return replace(source, urls=(f"{base.rstrip('/')}/{source.name}",))

    archives = tuple(
        replace(archive, parts=tuple(map(moved, archive.parts))) for archive in data_set.archives
    )
    return replace(data_set, files=tuple(map(moved, data_set.files)), archives=archives)


if __name__ == "__main__":
    sys.exit(launch_alone(main))
