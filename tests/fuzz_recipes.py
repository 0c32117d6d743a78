"""Readers of lavic, vasevqa and multimodal, and of archives, for tests/fuzzing.py; a line each."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from lavic.src import catalogue
from lavic.src.recommend import data as conversations
from multimodal.pairs import audio, audiocaps, clotho, coco
from multimodal.pairs.audio import AudioError
from shared import unpack
from tests.fuzz_readers import folder, of
from tests.fuzzing import Reader
from vasevqa.filter import clip
from vasevqa.model import rows
from vasevqa.model.rows import RowError

ITEMS = {
    "B01": {
        "title": "A shirt",
        "images": [{"large": "https://images.example/a.jpg"}],
        "image_descriptions_llava_cleaned": {"B01_0.jpg": "red, plain", "B01_1.jpg": "blue"},
    },
    "B02": {"title": "A cap", "images": [], "image_descriptions_llava_cleaned": {"B02_0.jpg": "x"}},
}
LINES = "".join(
    json.dumps(
        {"title": "A cap", "image_name": f"B{n}_0.jpg", "image": "https://images.example/b.jpg",
         "image_description_llava_cleaned": "green, striped"}
    ) + "\n"
    for n in range(4)
)  # fmt: skip
TALKS = "".join(
    json.dumps(
        {"context": f"<submission>{n}</submission>\n", "context_items": [], "gt": ["a cap"],
         "gt_items": ["B01"], "candidates_st": ["B01", "B02"], "candidates_gpt_large": ["B02"]}
    ) + "\n"
    for n in range(3)
)  # fmt: skip
VASES = [
    {
        "images": ["a.jpg"],
        "caption": "an amphora",
        "conversations": [
            {"from": "human", "value": "<image>What shape?"},
            {"from": "gpt", "value": "amphora"},
        ],
    }
] * 2
CAPTIONS = {
    "images": [{"id": n, "file_name": f"{n:012}.jpg", "height": 4, "width": 4} for n in (1, 2)],
    "annotations": [{"id": 7, "image_id": 1, "caption": "a cat"}],
}
INSTANCES = {
    "images": CAPTIONS["images"],
    "annotations": [{"id": 8, "image_id": 1, "category_id": 3}],
    "categories": [{"id": 3, "name": "cat", "supercategory": "animal"}],
}
CLIPS = "audiocap_id,youtube_id,start_time,caption\n" + "".join(
    f'{n},{"abcdefghij" + str(n)},{30 * n},"a dog, barking"\n' for n in range(3)
)
CLOTHO = "file_name," + ",".join(f"caption_{n}" for n in range(1, 6)) + "\n" + "".join(
    f"{name}.wav,one,two,three,four,five\n" for name in ("a", "b é", "c")
)  # fmt: skip


def _make_sound(directory: Path) -> None:
    import soundfile

    wave = np.sin(np.arange(1600) / 7).astype(np.float32)
    soundfile.write(directory / "a.wav", wave, 16_000)
    soundfile.write(directory / "a.flac", wave, 16_000)


def _read_sound(directory: Path) -> None:
    for name in ("a.wav", "a.flac"):
        audio.length_of(directory / name)
        audio.read_waveform(directory / name)


def _make_zip(directory: Path) -> None:
    with zipfile.ZipFile(directory / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/a.txt", "text " * 50)
        archive.writestr("b.jpg", bytes(200))


def _make_tar(directory: Path) -> None:
    with tarfile.open(directory / "a.tar.gz", "w:gz") as archive:
        for name in ("folder/a.txt", "b.jpg"):
            member = tarfile.TarInfo(name)
            member.size = 300
            archive.addfile(member, io.BytesIO(b"text " * 60))


def _unpack(archive: Path) -> None:
    try:
        unpack.unpack([archive], archive.parent / "out")
    finally:
        shutil.rmtree(archive.parent / "out", ignore_errors=True)


def _read_vases(path: Path) -> None:
    for number, source in enumerate(rows.read(path), 1):
        rows.check(rows.parse(source, number), is_grpo=False)


def _read_coco(directory: Path) -> None:
    coco.pictures(directory, coco.find_year(directory))
    coco.karpathy(directory)


READERS: dict[str, Reader] = {
    "lavic items": of("items.json", ITEMS, catalogue.read_titles),
    "lavic descriptions": folder(
        {"lines.jsonl": LINES, "images/B1_0.jpg": b"a picture"},
        lambda d: catalogue.read_samples(d / "lines.jsonl", d / "images"),
    ),
    "lavic conversations": of(
        "train.jsonl",
        TALKS,
        lambda path: conversations.read_conversations(path, "candidates_st"),
    ),
    "vasevqa rows": of("rows.json", VASES, _read_vases, RowError),
    "vasevqa row lines": of(
        "rows.jsonl", "".join(json.dumps(row) + "\n" for row in VASES), _read_vases, RowError
    ),
    "vasevqa prompts": of(
        "prompts.txt",
        "# what to look for\n[high]\na whole vase\n[low]\na broken vase\n",
        clip.read_prompts,
    ),
    "multimodal COCO": folder(
        {
            "annotations/captions_train2017.json": CAPTIONS,
            "annotations/instances_train2017.json": INSTANCES,
            "karpathy/dataset_coco.json": {"images": [{"cocoid": 1, "split": "test"}]},
        },
        _read_coco,
    ),
    "multimodal AudioCaps csv": of("train.csv", CLIPS, audiocaps.listed_clips),
    "multimodal Clotho csv": folder(
        {
            "clotho_captions_development.csv": CLOTHO,
            "clotho_metadata_development.csv": "file_name,keywords\na.wav,dog;rain\n",
        },
        lambda d: clotho._clips(d, "development", ("dog", "rain")),
    ),
    "multimodal sound": Reader(_make_sound, _read_sound, (AudioError,)),
    "zip archive": Reader(_make_zip, lambda d: _unpack(d / "a.zip")),
    "tar archive": Reader(_make_tar, lambda d: _unpack(d / "a.tar.gz")),
}
