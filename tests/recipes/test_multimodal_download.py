"""download_datasets.py against a server of small archives in the real layouts."""

import hashlib
import io
import json
import re
import shutil
import stat
import tarfile
import textwrap
import time
import zipfile
from collections import namedtuple
from dataclasses import replace

import pytest

from multimodal import download_datasets
from multimodal.datasets import AudioCaps, Clotho, Coco, VoxCeleb
from multimodal.demo_data import files as demo_files
from multimodal.pairs import sources
from multimodal.pairs.sources import DOWNLOADS, Archive, DataSet, Source
from shared.web import Patience
from tests import hub_server, multimodal_data
from tests.hub_server import REPO_ID, HubServer

QUICK = Patience(contact=2.0, connect=1.0, silence=0.5, tries=2, pause=0.01, longest_wait=1.5)
LARGE = (".zip", ".csv", ".json", ".flac", "partaa", "partab", ".tar")


COCO = {  # archive: its folder, and how many files that holds
    "annotations_trainval2017.zip": ("annotations", 4),
    "val2017.zip": ("val2017", 6),
    "train2017.zip": ("train2017", 54),
}
CLOTHO = {  # zips under the names of 7z, which is unpacked in tests/unit/test_unpack.py
    "clotho_audio_validation.7z": ("validation", 8),
    "clotho_audio_evaluation.7z": ("evaluation", 6),
    "clotho_audio_development.7z": ("development", 20),
}


def zipped(root, folder):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file():
                archive.write(path, path.relative_to(root))
    return content.getvalue()


@pytest.fixture(scope="session")
def made():
    return multimodal_data.made()


@pytest.fixture(scope="session")
def files(made):
    """What the server has: the demo's data sets packed as the real ones are."""
    coco, clotho, caps = made.coco, made.clotho, made.audiocaps
    lists = [*(coco / "karpathy").iterdir(), *clotho.glob("*.csv"), *caps.glob("*.csv")]
    packed = {path.name: path.read_bytes() for path in lists}
    for root, archives in ((coco, COCO), (clotho, CLOTHO)):
        packed |= {name: zipped(root, folder) for name, (folder, _) in archives.items()}
    voices = zipped(made.voxceleb, "wav")
    half = len(voices) // 2
    packed |= {"vox_partaa": voices[:half], "vox_partab": voices[half:]}
    return packed


def md5(content):
    return f"md5:{hashlib.md5(content, usedforsecurity=False).hexdigest()}"


def archive_of(files, names, holds):
    parts = (
        Source(name, len(files[name]), md5(files[name]), (f"http://x.invalid/{name}",), DOWNLOADS)
        for name in names
    )
    return Archive(tuple(parts), holds, 1000)


@pytest.fixture
def table(files, monkeypatch):
    """The table with the demo's archives in the places of the real ones."""
    coco, clotho = (
        tuple(archive_of(files, [name], dict([holds])) for name, holds in archives.items())
        for archives in (COCO, CLOTHO)
    )
    lists = tuple(replace(source, size=None, checksum="") for source in sources.CLOTHO.files)
    voices = (archive_of(files, ["vox_partaa", "vox_partab"], {"wav": 22}),)
    data_sets = {
        "coco": replace(sources.COCO, archives=coco),
        "clotho": DataSet("clotho", files=lists, archives=clotho),
        "audiocaps": replace(sources.AUDIOCAPS, clips=32, clip_bytes=1),
        "voxceleb": DataSet("voxceleb", ("image", "audio"), archives=voices, needs_key=True),
    }
    monkeypatch.setattr(sources, "DATA_SETS", data_sets)
    monkeypatch.setattr("shared.web.PATIENCE", QUICK)
    return data_sets


@pytest.fixture(autouse=True)
def _neutral(monkeypatch):
    hub_server.forget_the_users_settings(monkeypatch)
    monkeypatch.delenv("VOXCELEB_KEY", raising=False)


@pytest.fixture
def server(files, table):
    with HubServer(dict(files), large=LARGE) as hub:
        yield hub


def download(server, root, *flags):
    """Everything from the server; the word embeddings where they are asked for."""
    words = [] if "--words" in flags else ["--no-words"]
    flags = ["--mirror", f"{server.url}/cdn", "--data-root", str(root), *words, *map(str, flags)]
    return download_datasets.main(flags)


def test_coco_arrives_as_the_reader_wants_it_and_a_second_call_asks_for_nothing(
    server, tmp_path, made, capsys
):
    assert download(server, tmp_path, "--datasets", "coco") == 0
    assert "lists name {'val': 12, 'test': 8} pictures, not 5000" in capsys.readouterr().out
    for split in ("train", "val", "test"):
        ours, theirs = Coco(tmp_path / "coco", split), Coco(made.coco, split)
        assert ours.counts == theirs.counts and ours.counts.split == f"Karpathy {split}"
    server.heal()
    assert download(server, tmp_path, "--datasets", "coco") == 0
    assert server.requests == []


def test_clotho_and_voxceleb_in_parts(server, tmp_path, made):
    assert download(server, tmp_path, "--datasets", "clotho", "voxceleb") == 0
    assert Clotho(tmp_path / "clotho", "train").counts == Clotho(made.clotho, "train").counts
    assert VoxCeleb(tmp_path / "voxceleb", "test").counts.found == 12


def test_archives_are_deleted_when_asked_and_not_fetched_again(server, tmp_path):
    assert download(server, tmp_path, "--datasets", "coco", "--delete-archives") == 0
    assert not list((tmp_path / "coco/downloads").glob("*.zip"))
    server.heal()
    assert download(server, tmp_path, "--datasets", "coco", "--verify") == 0
    assert not [request for request in server.requests if request.path.endswith(".zip")]


def test_verify_finds_a_damaged_archive_and_fetches_it_again(server, tmp_path, files):
    download(server, tmp_path, "--datasets", "coco")
    archive = tmp_path / "coco/downloads/val2017.zip"
    damaged = bytearray(files["val2017.zip"])
    damaged[100] ^= 1
    archive.write_bytes(damaged)
    server.heal()
    assert download(server, tmp_path, "--datasets", "coco", "--verify") == 0
    assert archive.read_bytes() == files["val2017.zip"]
    assert server.asked("train2017.zip") == []


@pytest.mark.parametrize(("flags", "read"), [([], True), (["--skip-existing"], False)])
def test_archives_that_somebody_put_there_are_used(server, tmp_path, files, caplog, flags, read):
    downloads = tmp_path / "coco/downloads"
    downloads.mkdir(parents=True)
    (downloads / "train2017.zip").write_bytes(files["train2017.zip"])
    with caplog.at_level("INFO"):
        assert download(server, tmp_path, "--datasets", "coco", *flags) == 0
    assert server.asked("train2017.zip") == []
    assert ("checking" in caplog.text) == read


PORTAL = b"<!DOCTYPE html>\n<html><title>Log in to the network</title></html>"


def test_a_login_page_is_put_in_the_place_of_no_list(server, tmp_path, files, capsys):
    server.files |= {"train.csv": PORTAL, "coco_val_karpathy.json": PORTAL}
    (tmp_path / "Y0123456789a.wav").touch()
    source = f"local:{tmp_path}"
    flags = ["--datasets", "audiocaps", "coco", "--audiocaps-source", source]
    assert download(server, tmp_path, *flags) == 1
    assert not (tmp_path / "audiocaps/train.csv").exists()
    assert not (tmp_path / "coco/karpathy/coco_val_karpathy.json").exists()
    assert "train.csv came from 127.0.0.1 with a web page" in capsys.readouterr().out


def test_a_login_page_that_an_earlier_call_took_for_a_list_is_replaced(server, tmp_path, files):
    folder = tmp_path / "audiocaps"
    folder.mkdir()
    page, rest = folder / "train.csv", ["val.csv", "test.csv"]
    page.write_bytes(PORTAL)
    status = page.stat()
    known = {"train.csv": ["", status.st_size, status.st_mtime_ns]}
    (folder / ".download.json").write_text(json.dumps({"files": known, "parts": {}}))
    for name in rest:
        (folder / name).write_bytes(files[name])
    download(server, tmp_path, "--datasets", "audiocaps", "--skip-existing")
    assert page.read_bytes() == files["train.csv"]
    assert not any(server.asked(name) for name in rest)


def test_what_was_unpacked_by_hand_needs_no_archive(server, tmp_path, made):
    shutil.copytree(made.coco / "train2017", tmp_path / "coco/train2017")
    assert download(server, tmp_path, "--datasets", "coco") == 0
    assert server.asked("train2017.zip") == []


def test_one_failure_stops_no_other_and_the_exit_code_tells(server, tmp_path, capsys):
    server.misbehave("val2017.zip", hub_server.corrupted, times=9, late=False)
    assert download(server, tmp_path, "--datasets", "coco", "clotho") == 1
    assert Clotho(tmp_path / "clotho", "val").counts.found == 8
    assert "coco       failed: val2017.zip came from 127.0.0.1" in capsys.readouterr().out


def test_second_address_is_tried_when_the_first_fails(server, tmp_path, table, monkeypatch):
    archive, base = table["coco"].archives[1], f"{server.url}/cdn"
    part = replace(archive.parts[0], urls=(f"{base}/nothing.zip", f"{base}/val2017.zip"))
    only = replace(table["coco"], files=(), archives=(replace(archive, parts=(part,)),))
    monkeypatch.setitem(sources.DATA_SETS, "coco", only)
    flags = ["--datasets", "coco", "--data-root", str(tmp_path), "--no-words"]
    assert download_datasets.main(flags) == 0
    assert len(list((tmp_path / "coco/val2017").iterdir())) == 6


def free_disk(monkeypatch, free):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, free))


def test_disk_is_looked_at_before_anything_is_fetched(server, tmp_path, monkeypatch, capsys):
    free_disk(monkeypatch, 1000)
    assert download(server, tmp_path, "--datasets", "coco") == 2
    out = capsys.readouterr().out
    assert re.search(r"are needed in .*/coco for archives .* and 1 kB are free", out)
    assert server.requests == []


def test_what_fits_on_the_disk_is_fetched(server, tmp_path, table, monkeypatch, capsys):
    free_disk(monkeypatch, 90_000_000)
    large = replace(table["coco"].archives[2], unpacked=100_000_000)
    coco = replace(table["coco"], archives=(*table["coco"].archives[:2], large))
    monkeypatch.setitem(sources.DATA_SETS, "coco", coco)
    assert download(server, tmp_path, "--datasets", "coco", "clotho") == 2
    assert len(list((tmp_path / "coco/val2017").iterdir())) == 6
    assert Clotho(tmp_path / "clotho", "val").counts.found == 8
    assert server.asked("train2017.zip") == []
    out = capsys.readouterr().out
    assert "coco       failed: train2017.zip: 10" in out and "clotho     complete" in out


def test_dry_run_says_what_it_takes_and_asks_nobody(server, tmp_path, capsys):
    assert download(server, tmp_path, "--datasets", "all", "--dry-run") == 0
    assert server.requests == [] and not list(tmp_path.iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["coco", "clotho", "audiocaps", "voxceleb"]


def test_the_real_tables_need_of_the_disk(tmp_path):
    """COCO: 20.4 GB of archives and about as much unpacked."""
    need = download_datasets.need_of(sources.COCO, tmp_path)
    assert need.fetch == 252_907_541 + 815_585_330 + 19_336_861_798 + 2_000_000
    assert 40e9 < need.disk < 45e9


def words_only(monkeypatch, cache):
    """COCO without a file of its own; the Hub's cache in `cache`, its repository the server's."""
    monkeypatch.setitem(sources.DATA_SETS, "coco", DataSet("coco"))
    monkeypatch.setattr(sources, "WORDS", REPO_ID)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def test_word_embeddings_are_fetched_once_into_the_hubs_cache(server, tmp_path, monkeypatch):
    words_only(monkeypatch, tmp_path / "hub")
    server.files = {sources.WORDS_FILE: bytes(8) + b"{}"}
    hub_server.move_hub(monkeypatch, server.url)
    flags = ["--datasets", "coco", "--data-root", str(tmp_path / "data")]
    assert download_datasets.main(flags) == 0
    found = sources.start_of_words("auto", tmp_path / "data")
    assert found.read_bytes() == bytes(8) + b"{}" and tmp_path / "hub" in found.parents
    server.heal()
    assert download_datasets.main(flags) == 0 and server.requests == []


def test_word_embeddings_of_a_mirror_are_put_where_training_looks(server, tmp_path, monkeypatch):
    words_only(monkeypatch, tmp_path / "hub")
    server.files[sources.WORDS_FILE] = bytes(8) + b"{}"
    assert download(server, tmp_path, "--datasets", "coco", "--words") == 0
    place = tmp_path / "pretrained" / sources.WORDS_FILE
    assert sources.start_of_words("auto", tmp_path) == place


def test_voxceleb_without_a_key_prints_the_layout_and_is_a_missing_step(tmp_path, capsys, table):
    flags = ["--datasets", "voxceleb", "--data-root", str(tmp_path)]
    assert download_datasets.main(flags) == 3
    assert f"{tmp_path}/voxceleb/wav/id10001/<video>/00001.wav" in capsys.readouterr().out


def test_voxcelebs_key_goes_into_the_address_and_into_no_message(
    server, tmp_path, table, monkeypatch, capsys, caplog
):
    monkeypatch.setenv("VOXCELEB_KEY", "secret-key")
    keyed = download_datasets.pointed_at(table["voxceleb"], f"{server.url}/cdn/x?key={{key}}&file=")
    monkeypatch.setitem(sources.DATA_SETS, "voxceleb", keyed)
    flags = ["--datasets", "voxceleb", "--data-root", str(tmp_path)]
    assert download_datasets.main(flags) == 2  # the server knows no /cdn/x
    assert "key=secret-key" in server.requests[0].query
    out = capsys.readouterr()
    assert "secret" not in out.out + out.err + caplog.text


# --- AudioCaps ------------------------------------------------------------------------------------


def ledger(root):
    lines = (root / "audiocaps/clips.jsonl").read_text().splitlines()
    return {row["key"]: row["status"] for row in map(json.loads, lines)}


def test_audiocaps_out_of_a_directory(server, tmp_path, made, capsys):
    source = f"local:{made.audiocaps}"
    assert download(server, tmp_path, "--datasets", "audiocaps", "--audiocaps-source", source) == 0
    ours = AudioCaps(tmp_path / "audiocaps", "test")
    assert ours.counts == AudioCaps(made.audiocaps, "test").counts
    assert set(ledger(tmp_path).values()) == {"ok"} and len(ledger(tmp_path)) == 28
    assert "5 of 6 test; not there: 4 not tried" in capsys.readouterr().out


def test_audiocaps_directory_without_a_clip_is_said(server, tmp_path, capsys):
    (tmp_path / "holiday.wav").touch()
    flags = ["--datasets", "audiocaps", "--audiocaps-source", f"local:{tmp_path}"]
    assert download(server, tmp_path, *flags) == 2
    assert "none of the 32 missing clips is below" in capsys.readouterr().out


def test_clips_that_are_linked_from_the_same_disk_need_no_room(made, tmp_path, capsys):
    flags = ["--datasets", "audiocaps", "--audiocaps-source", f"local:{made.audiocaps}"]
    assert download_datasets.main([*flags, "--data-root", str(tmp_path), "--dry-run"]) == 0
    (line,) = [row for row in capsys.readouterr().out.splitlines() if "audiocaps" in row]
    assert line.split()[1] == "3,000,000"  # the three lists; 47 GB from YouTube


def as_parquet(sounds, **columns):
    pyarrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    columns = columns or {
        "youtube_id": [path.stem[:11] for path in sounds],
        "start_time": [int(path.stem[12:]) for path in sounds],
        "audio": [{"bytes": path.read_bytes(), "path": path.name} for path in sounds],
    }
    content = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), content)
    return content.getvalue()


def test_parquet_with_other_columns_is_said(server, tmp_path, monkeypatch, capsys):
    server.files = {n: c for n, c in server.files.items() if not n.endswith((".zip", ".7z"))}
    server.files["val.parquet"] = as_parquet([], id=["a"], sound=[b"b"])
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    flags = ["--datasets", "audiocaps", "--audiocaps-source", f"hf:{REPO_ID}"]
    assert download(server, tmp_path, *flags) == 2
    assert "has no column youtube_id, start_time, audio, only id, sound" in capsys.readouterr().out


@pytest.mark.parametrize("packed", ["files", "tar", "parquet"])
def test_audiocaps_out_of_a_repository_of_the_hub(server, tmp_path, made, monkeypatch, packed):
    sounds = sorted((made.audiocaps / "audio/val").iterdir())
    if packed == "parquet":
        server.files["val.parquet"] = as_parquet(sounds)
    elif packed == "tar":
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w") as archive:
            for path in sounds:
                archive.add(path, f"val/{path.name}")
        server.files["val.tar"] = content.getvalue()
    else:
        server.files |= {f"data/{path.name}": path.read_bytes() for path in sounds}
    server.files = {n: c for n, c in server.files.items() if not n.endswith((".zip", ".7z"))}
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    flags = ["--datasets", "audiocaps", "--audiocaps-source", f"hf:{REPO_ID}"]
    assert download(server, tmp_path, *flags) == 0
    assert len(list((tmp_path / "audiocaps/audio/val").iterdir())) == 7


def programs(directory, monkeypatch, yt_dlp):
    """Stand-ins of yt-dlp and ffmpeg on PATH."""
    directory.mkdir()
    for name, code in (("yt-dlp", yt_dlp), ("ffmpeg", "exit 1")):
        path = directory / name
        path.write_text("#!/bin/sh\n" + textwrap.dedent(code))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")


YT_DLP = """
    for word; do [ "$before" = -o ] && target=$word; before=$word; done
    echo "$*" >> "$(dirname "$0")/asked"
    case $before in
      *v=[a-m]*) echo "ERROR: [youtube] Video unavailable" >&2; exit 1;;
      *) printf fLaC > "${target%.*}.flac";;
    esac
"""


def test_audiocaps_from_youtube_keeps_a_ledger_of_every_clip(server, tmp_path, monkeypatch):
    programs(tmp_path / "bin", monkeypatch, YT_DLP)
    cookies = tmp_path / "cookies.txt"
    cookies.touch()
    flags = ["--datasets", "audiocaps", "--cookies", cookies]
    assert download(server, tmp_path, *flags) == 0
    found = ledger(tmp_path)
    gone = {key for key in found if "a" <= key[0] <= "m"}
    assert len(found) == 32 and gone
    assert {key for key, status in found.items() if status == "unavailable"} == gone
    assert {key for key, status in found.items() if status == "ok"} == found.keys() - gone
    asked = (tmp_path / "bin/asked").read_text().splitlines()
    assert len(asked) == 32 and f"--cookies {cookies}" in asked[0]
    for line in asked:  # ten seconds from the clip's own start
        key = line.partition("/watch?v=")[2]
        start = int(line.partition("--download-sections *")[2].partition("-")[0])
        assert f"*{start}-{start + 10} " in line and f"/{key}_{start}.part.%(ext)s" in line
    assert not list((tmp_path / "audiocaps/audio").rglob("*.part*"))
    assert download(server, tmp_path, *flags) == 0  # those that are gone are not asked for again
    assert len((tmp_path / "bin/asked").read_text().splitlines()) == 32


def test_audiocaps_from_youtube_stops_when_it_is_taken_for_a_robot(server, tmp_path, monkeypatch):
    said = "ERROR: [youtube] x: Sign in to confirm you're not a bot. Use --cookies"
    programs(tmp_path / "bin", monkeypatch, f'echo "{said}" >&2; exit 1')
    assert download(server, tmp_path, "--datasets", "audiocaps", "--max-workers", 2) == 1
    assert 10 <= len(ledger(tmp_path)) < 20
    assert set(ledger(tmp_path).values()) == {"blocked"}


def test_audiocaps_from_youtube_needs_its_programs(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert download(server, tmp_path, "--datasets", "audiocaps") == 3
    assert "needs yt-dlp and ffmpeg: pip install yt-dlp" in capsys.readouterr().out


# --- the demo, and no network ---------------------------------------------------------------------


def test_demo_is_made_and_nothing_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(download_datasets, "RECIPE", tmp_path)
    for name, value in multimodal_data.SMALL[demo_files].items():
        monkeypatch.setattr(demo_files, name, value)
    assert download_datasets.main(["--demo"]) == 0
    assert (tmp_path / "demo/data/coco/annotations").is_dir()


def test_fault_48_without_a_network_it_ends_soon(tmp_path, table, capsys):
    began = time.monotonic()
    flags = ["--datasets", "coco", "--data-root", str(tmp_path), "--mirror", "http://127.0.0.1:9"]
    assert download_datasets.main(flags) == 1
    assert time.monotonic() - began < 15
    out = capsys.readouterr().out
    assert "127.0.0.1 cannot be reached" in out and "or leave --mirror out" in out
