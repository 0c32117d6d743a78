"""The demo's files in the layouts and formats of COCO 2017, Clotho v2.1, AudioCaps and VoxCeleb."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from multimodal.demo_data import pictures, sounds
from multimodal.demo_data.pictures import Scene
from multimodal.demo_data.sounds import Clip
from shared.drawing import COLOURS, SHAPES, Floats, mask, paint, to_image
from shared.files import write_atomic

# Pictures of each Karpathy split, and how many of them lie in val2017 (the rest in train2017).
COCO_SPLITS = {"train": (640, 40), "val": (40, 4), "test": (100, 10)}
CLOTHO_SPLITS = {"development": 200, "validation": 30, "evaluation": 60}
# Clips of the lists; the second number are those whose sound is gone, as happens on YouTube.
AUDIOCAPS_SPLITS = {"train": (150, 6), "val": (20, 1), "test": (50, 2)}
# VoxCeleb1's test speakers are id10270 to id10309.
SPEAKERS = [f"id{number}" for number in (*range(10001, 10049), *range(10270, 10282))]
VIDEOS, UTTERANCES, FACES = 2, 2, 2  # of a speaker, of a video, of a video
_ODD_NAMES = ("Rain, far away ({}).wav", "Glockengeläut {}.wav", "it's {} o'clock.wav")
_YOUTUBE = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_")


def write_coco(root: Path, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
    """Pictures, captions, instances and Karpathy's lists; the first scenes are taken."""
    ids = iter(rng.choice(np.arange(1, 600_000), size=len(scenes), replace=False).tolist())
    left, karpathy = iter(scenes), {}
    halves: dict[str, list[dict[str, Any]]] = {"train2017": [], "val2017": []}
    for split, (total, in_val) in COCO_SPLITS.items():
        karpathy[split] = []
        for number in range(total):
            half = "val2017" if number < in_val else "train2017"
            record = _write_picture(root / half, int(next(ids)), next(left), rng)
            halves[half].append(record)
            karpathy[split].append(record)
    for half, records in halves.items():
        _write_json(root / "annotations" / f"captions_{half}.json", _captions(records))
        _write_json(root / "annotations" / f"instances_{half}.json", _instances(records))
    for split, records in karpathy.items():
        _write_json(root / "karpathy" / f"coco_{split}_karpathy.json", _captions(records))


def _write_picture(
    directory: Path, number: int, scene: Scene, rng: np.random.Generator
) -> dict[str, Any]:
    canvas, boxes = pictures.draw(scene, rng)
    name = f"{number:012d}.jpg"
    _write_jpeg(directory / name, canvas)
    side = pictures.SIDE
    image = {"id": number, "file_name": name, "height": side, "width": side, "license": 1}
    return {"image": image, "scene": scene, "boxes": boxes}


def _captions(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of captions_*.json."""
    texts = [
        (record["image"]["id"], text)
        for record in records
        for text in pictures.captions(record["scene"])
    ]
    return {
        "info": {"description": "shapes in COCO's layout", "year": 2017},
        "licenses": [{"id": 1, "name": "MIT", "url": ""}],
        "images": [record["image"] for record in records],
        "annotations": [
            {"id": 1000 + place, "image_id": number, "caption": text}
            for place, (number, text) in enumerate(texts)
        ],
    }


def _instances(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The content of instances_*.json."""
    ids = pictures.categories()
    found = [
        (record["image"]["id"], ids[record["scene"].category], box)
        for record in records
        for box in record["boxes"]
    ]
    return {
        "images": [record["image"] for record in records],
        "categories": [
            {"id": number, "name": name, "supercategory": name.split()[1]}
            for name, number in ids.items()
        ],
        "annotations": [
            {
                **{"id": place, "image_id": image, "category_id": category, "iscrowd": 0},
                **{"bbox": list(box), "area": box[2] * box[3]},
            }
            for place, (image, category, box) in enumerate(found, 1)
        ],
    }


def write_clotho(root: Path, clips: Sequence[Clip], rng: np.random.Generator) -> Sequence[Clip]:
    """Sounds (wav, 44.1 kHz), captions and metadata; the clips that were not taken come back."""
    for split, total in CLOTHO_SPLITS.items():
        taken, clips = clips[:total], clips[total:]
        names = [_clotho_name(split, number) for number in range(total)]
        for name, clip in zip(names, taken, strict=True):
            _write_sound(root / split / name, sounds.synthesise(clip, 44_100, rng), 44_100)
        rows = [[name, *sounds.captions(clip)] for name, clip in zip(names, taken, strict=True)]
        header = ["file_name", *(f"caption_{number}" for number in range(1, 6))]
        _write_csv(root / f"clotho_captions_{split}.csv", [header, *rows], "utf-8")
        _write_metadata(root / f"clotho_metadata_{split}.csv", names, taken)
    return clips


def _clotho_name(split: str, number: int) -> str:
    """Most names are plain, every seventh has what Freesound's users put into theirs."""
    if number % 7:
        return f"{split}_{number:03d}.wav"
    return _ODD_NAMES[number // 7 % len(_ODD_NAMES)].format(f"{split[:3]} {number}")


def _write_metadata(path: Path, names: list[str], clips: Sequence[Clip]) -> None:
    header = ["file_name", "keywords", "sound_id", "sound_link", "start_end_samples"]
    rows = [
        [name, ";".join(clip.keywords), str(place), "", "[0, 88200]", "José Pérez", "CC0"]
        for place, (name, clip) in enumerate(zip(names, clips, strict=True))
    ]
    _write_csv(path, [[*header, "manufacturer", "license"], *rows], "iso-8859-1")


def write_audiocaps(root: Path, clips: Sequence[Clip], rng: np.random.Generator) -> None:
    """Lists, and sounds (flac, 32 kHz) of the clips that are not gone."""
    left, number = iter(clips), 0
    for split, (total, gone) in AUDIOCAPS_SPLITS.items():
        rows = [["audiocap_id", "youtube_id", "start_time", "caption"]]
        for place in range(total):
            clip, start = next(left), str(10 * int(rng.integers(0, 30)))
            name = "".join(rng.choice(_YOUTUBE, 11))
            texts = sounds.captions(clip)
            for text in texts if split != "train" else [str(rng.choice(texts))]:
                number += 1
                rows.append([str(number), name, start, text])
            if place >= gone:
                wave = sounds.synthesise(clip, 32_000, rng)
                _write_sound(root / "audio" / split / f"{name}_{start}.flac", wave, 32_000)
        _write_csv(root / f"{split}.csv", rows, "utf-8")


def write_voxceleb(root: Path, rng: np.random.Generator) -> None:
    """Voices (wav, 16 kHz) and faces of people: colour goes with pitch, the mouth with the vowel.

    No two of 60 people have the same of both.
    """
    rows = [["VoxCeleb1 ID", "VGGFace1 ID", "Gender", "Nationality", "Set"]]
    for place, speaker in enumerate(SPEAKERS):
        number_of_colours = len(pictures.COLOUR_NAMES)
        tone = place % number_of_colours
        vowel = (place + place // number_of_colours) % len(sounds.VOWELS)
        colour, pitch = pictures.COLOUR_NAMES[tone], 110.0 * 2 ** (tone / 4)
        for _ in range(VIDEOS):
            video = "".join(rng.choice(_YOUTUBE[:-2], 11))
            for number in range(1, UTTERANCES + 1):
                wave = sounds.voice(pitch, sounds.VOWELS[vowel], 16_000, 1.5, rng)
                path = root / "wav" / speaker / video / f"{number:05d}.wav"
                _write_sound(path, wave, 16_000)
            for number in range(1, FACES + 1):
                face = _draw_face(colour, SHAPES[vowel], rng)
                _write_jpeg(root / "faces" / speaker / video / f"{25 * number:07d}.jpg", face)
        split = "dev" if speaker < "id10270" else "test"
        rows.append([speaker, f"Person_{place}", "m", "-", split])
    _write_csv(root / "vox1_meta.csv", rows, "utf-8", delimiter="\t")


def _draw_face(colour: str, mouth: str, rng: np.random.Generator) -> Floats:
    side = pictures.SIDE
    canvas = np.full((side, side, 3), rng.uniform(95, 175), np.float32)
    y, x = rng.normal(side / 2, 2, 2)
    paint(canvas, COLOURS[colour], mask("circle", side, side, centre=(y, x), radius=36))
    for across in (-13, 13):
        eye = mask("circle", side, side, centre=(y - 10, x + across), radius=5)
        paint(canvas, COLOURS["cyan"], eye)
    paint(canvas, COLOURS["grey"], mask(mouth, side, side, centre=(y + 14, x), radius=10))
    return canvas + rng.normal(0, 4, canvas.shape).astype(np.float32)


def _write_jpeg(path: Path, canvas: Floats) -> None:
    encoded = io.BytesIO()
    to_image(canvas).save(encoded, "JPEG", quality=92)
    _write(path, encoded.getvalue())


def _write_sound(path: Path, wave: np.ndarray, rate: int) -> None:
    import soundfile

    encoded = io.BytesIO()
    soundfile.write(encoded, wave, rate, format=path.suffix[1:], subtype="PCM_16")
    _write(path, encoded.getvalue())


def _write_csv(
    path: Path, rows: Iterable[Sequence[str]], encoding: str, delimiter: str = ","
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows(rows)
    _write(path, text.getvalue().encode(encoding))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    _write(path, json.dumps(value).encode())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A thousand waits for the disk would take longer than the drawing; the marker comes last.
    write_atomic(path, lambda stream: (stream.write(content), None)[1], durable=False)
