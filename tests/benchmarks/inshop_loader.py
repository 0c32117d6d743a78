"""How much faster In-shop pictures reach the model than by Pillow's pipeline.

    python tests/benchmarks/inshop_loader.py [--images 64] [--repeats 7]

Both sides start from the same 256 x 256 JPEG files and do what the recipe asks: resize to 512, cut
out 448 at random, mirror half of them. "worker": up to the uint8 picture that leaves a loader
worker. "batch": on to the normalised float32 batch (B, 3, 448, 448). One core, no workers, CPU
time, the sides in turn. The last line is JSON; the largest difference is that of the centre crop.
"""

from __future__ import annotations

import argparse
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
from torchvision.transforms import InterpolationMode

from arcface.demo_data.garments import draw_garment, draw_shot, style_of
from arcface.inshop_retrieval.encoders import Preprocess
from arcface.inshop_retrieval.inshop import InShop, collate
from arcface.inshop_retrieval.pipeline import build_pipeline
from shared.device import keep_freed_memory
from shared.images import decode_rgb
from tests.benchmarks.measure import compare, conclude, in_turn

BATCH = 32
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
STEPS = [
    {"type": "LoadImageFromFile"},
    {"type": "Resize", "scale": 512},
    {"type": "RandomCrop", "crop_size": 448},
    {"type": "RandomFlip", "prob": 0.5},
    {"type": "PackInputs"},
]


def main() -> None:
    """Print two tables of microseconds a picture, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # for both sides, as run_arcface.py does on the CPU
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder), options.images)
        data = InShop(Path(folder), "train", build_pipeline(STEPS))
        paths = [Path(folder) / "Img" / name for name in data.names]
        found = {}
        for name, sides in (("worker", workers(data, paths)), ("batch", batches(data, paths))):
            figures = in_turn(timed(sides, len(paths)), options.repeats)
            found[name] = compare(name, "us a picture", figures, "Pillow")
        difference = max(largest_difference(path) for path in paths[:BATCH])
    speed_up = {name: round(1 / rows["ours"]["ratio"], 2) for name, rows in found.items()}
    print(f"\ntimes Pillow's speed: {speed_up}; largest difference: {difference} grey level(s)")
    conclude("inshop_loader", "us", sides=found, speed_up=speed_up, grey_levels=difference)


def write_pictures(root: Path, count: int) -> None:
    """An In-shop of `count` garments at 256 x 256, JPEG quality 92."""
    rng = np.random.default_rng(0)
    (root / "Img" / "img").mkdir(parents=True)
    (root / "Eval").mkdir()
    lines = [str(count), "image_name item_id evaluation_status"]
    for number in range(count):
        pixels, _ = draw_garment(style_of(17 * number, rng), draw_shot("front", rng))
        image = Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 5, (256, 256, 3))
        image = Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))
        image.save(root / "Img" / "img" / f"{number}.jpg", quality=92)
        lines.append(f"img/{number}.jpg id_{number} train")
    (root / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")


def pillow_steps() -> list[Callable[[Image.Image], Image.Image]]:
    """The usual transforms up to the mirrored picture."""
    return [
        transforms.Resize((512, 512), InterpolationMode.BILINEAR),
        transforms.RandomCrop(448),
        transforms.RandomHorizontalFlip(),
    ]


def workers(data: InShop, paths: list[Path]) -> dict[str, Callable[[], None]]:
    """Both sides up to the uint8 picture."""
    transform = transforms.Compose([*pillow_steps(), transforms.PILToTensor()])

    def pillow() -> None:
        for path in paths:
            transform(Image.open(path).convert("RGB"))

    def ours() -> None:
        for index in range(len(paths)):
            data[index]

    return {"Pillow": pillow, "ours": ours}


def batches(data: InShop, paths: list[Path]) -> dict[str, Callable[[], None]]:
    """Both sides up to the normalised batch."""
    mean, std = ([value / 255 for value in values] for values in (MEAN, STD))
    transform = transforms.Compose(
        [*pillow_steps(), transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    preprocess = Preprocess(MEAN, STD)
    groups = [range(i, min(i + BATCH, len(paths))) for i in range(0, len(paths), BATCH)]

    def pillow() -> None:
        for group in groups:
            torch.stack([transform(Image.open(paths[i]).convert("RGB")) for i in group])

    def ours() -> None:
        for group in groups:
            batch = collate([data[i] for i in group])
            preprocess(batch.images, batch.flipped)

    return {"Pillow": pillow, "ours": ours}


def timed(sides: dict[str, Callable[[], None]], count: int) -> dict[str, Callable[[], float]]:
    """Each side as a function that runs it and gives its CPU microseconds a picture."""

    def clocked(side: Callable[[], None]) -> Callable[[], float]:
        def run() -> float:
            start = time.process_time()  # other programs on the machine do not count
            side()
            return (time.process_time() - start) / count * 1e6

        return run

    return {name: clocked(side) for name, side in sides.items()}


def largest_difference(path: Path) -> int:
    """The largest difference from Pillow's centre crop, in grey levels."""
    steps = [*STEPS[:2], {"type": "CenterCrop", "crop_size": 448}, STEPS[-1]]
    ours, _ = build_pipeline(steps)(decode_rgb(path.read_bytes()))
    resized = Image.open(path).convert("RGB").resize((512, 512), Image.Resampling.BILINEAR)
    theirs = torch.from_numpy(np.array(resized.crop((32, 32, 480, 480)))).permute(2, 0, 1)
    return int(_difference(ours, theirs).max())


def _difference(ours: Tensor, theirs: Tensor) -> Tensor:
    return (ours.int() - theirs.int()).abs()


if __name__ == "__main__":
    main()
