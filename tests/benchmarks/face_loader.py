"""How much faster faces reach the tower than by the usual pipeline of one image at a time.

    python tests/benchmarks/face_loader.py [--images 256] [--repeats 7]

Both sides start from the same record file of 112 x 112 JPEGs and end with float32 batches
(B, 3, 224, 224), on one core and without workers. Usual: read a record, decode with Pillow,
Resize(224, bicubic), ToTensor, Normalize, stack. Ours: FaceDataset and Preprocess, with and without
the decode-once cache (its filling is timed apart). Times are of one run, the sides in turn.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from face_distill.demo_data.faces import NUM_LATENTS, draw_face, draw_shot, look_of
from face_distill.demo_data.records import pack, write_records
from face_distill.distill.images import CLIP_MEAN, CLIP_STD, Preprocess
from face_distill.distill.recordio import RecordReader
from face_distill.FaceDataset import FaceDataset

BATCH = 32


def main() -> None:
    """Print a table of microseconds an image and ratios, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        jpeg_bytes = write_faces(Path(folder), options.images)
        sides = pipelines(Path(folder))
        difference = largest_difference(sides)
        times = measure(sides, options.images, options.repeats)
        filling = time_filling(Path(folder)) / options.images
    report(times, jpeg_bytes, difference, filling)


def write_faces(folder: Path, count: int) -> float:
    """Write `count` faces as records, JPEG quality 95; returns their mean size in bytes."""
    rng = np.random.default_rng(0)
    jpegs = []
    for _ in range(count):
        face = draw_face(look_of(rng.standard_normal(NUM_LATENTS)), draw_shot(rng))
        stream = io.BytesIO()
        Image.fromarray(face).save(stream, "JPEG", quality=95)
        jpegs.append(stream.getvalue())
    items = ((key, pack(0.0, jpeg, key)) for key, jpeg in enumerate(jpegs, 1))
    write_records(folder / "train.rec", folder / "train.idx", items)
    return statistics.fmean(len(jpeg) for jpeg in jpegs)


def pipelines(folder: Path) -> dict[str, Callable[[list[int]], Tensor]]:
    """Each side as a function from image numbers to a batch (B, 3, 224, 224)."""
    reader = RecordReader(folder / "train.rec", folder / "train.idx")
    transform = transforms.Compose(
        [
            transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    preprocess = Preprocess(224)

    def usual(indices: list[int]) -> Tensor:
        contents = (reader.labelled(index + 1).content for index in indices)
        images = (Image.open(io.BytesIO(content)).convert("RGB") for content in contents)
        return torch.stack([transform(image) for image in images])

    def ours(cache: bool) -> Callable[[list[int]], Tensor]:
        faces = FaceDataset(folder, cache=cache)

        def batch(indices: list[int]) -> Tensor:
            items = faces.__getitems__(indices)  # as a DataLoader asks
            return preprocess(torch.stack([image for image, _, _ in items]))

        return batch

    return {"usual": usual, "cache off": ours(cache=False), "cache on": ours(cache=True)}


def largest_difference(sides: dict[str, Callable[[list[int]], Tensor]]) -> float:
    """The largest difference from the usual pipeline in grey levels, over one batch."""
    batches = {name: side(list(range(BATCH))) for name, side in sides.items()}
    levels = 255 * torch.tensor(CLIP_STD).view(3, 1, 1)
    usual = batches.pop("usual")
    return max(float(((batch - usual).abs() * levels).max()) for batch in batches.values())


def measure(
    sides: dict[str, Callable[[list[int]], Tensor]], count: int, repeats: int
) -> dict[str, list[float]]:
    """Microseconds an image of every repeat, the sides in turn, after one untimed round."""
    batches = [list(range(i, min(i + BATCH, count))) for i in range(0, count, BATCH)]
    times: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            start = time.process_time()  # other programs on the machine do not count
            for batch in batches:
                side(batch)
            if repeat:
                times[name].append((time.process_time() - start) / count * 1e6)
    return times


def time_filling(folder: Path) -> float:
    """Microseconds to open the records and to fill the decode-once cache."""
    start = time.process_time()
    FaceDataset(folder, cache=True)
    return (time.process_time() - start) * 1e6


def report(
    times: dict[str, list[float]], jpeg_bytes: float, difference: float, filling: float
) -> None:
    """Print the table and the JSON line."""
    usual = times["usual"]
    row: dict[str, object] = {"benchmark": "face_loader", "jpeg_bytes": round(jpeg_bytes)}
    print(f"{'':12}{'us/image, median (range)':>28}{'ratio, median (range)':>28}")
    for name, values in times.items():
        ratios = [u / v for u, v in zip(usual, values, strict=True)]
        middle = statistics.median(values)
        spread = f"{middle:.0f} ({min(values):.0f}-{max(values):.0f})"
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{name:12}{spread:>28}{ratio:>28}")
        row[name] = {"us": round(middle, 1), "ratio": round(statistics.median(ratios), 2)}
    print(f"filling the cache: {filling:.0f} us/image, once; largest difference: {difference:.2f}")
    row |= {"filling_us": round(filling, 1), "grey_levels": round(difference, 3)}
    print(json.dumps({**row, "repeats": len(usual)}))


if __name__ == "__main__":
    main()
