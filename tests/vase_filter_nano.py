"""What tests of vasevqa/filter work on: a tiny random CLIP, a handful of pictures."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torchvision
from PIL import Image

from vasevqa.demo_data import clip as demo_clip
from vasevqa.filter.quality import ImageQualityNet

CLIP_CFG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {
        **{"context_length": 77, "vocab_size": 49408},
        **{"width": 32, "heads": 2, "layers": 2},
    },
}
MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.3, 0.2)


def write_clip(folder: Path, seed: int = 0) -> Path:
    """A CLIP with random weights as a folder of open_clip."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.model.CLIP(**CLIP_CFG)
        demo_clip.write_folder(model, folder, CLIP_CFG, MEAN, STD)
    return folder


@cache
def pixels(seed: int, side: int = 40) -> np.ndarray:
    """A picture of soft blotches (side, side, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def write_picture(path: Path, seed: int, side: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed, side)).save(path)
    return path


def vase_name(number: int, view: int) -> str:
    """The archive's name of a view."""
    return f"0000000{number}-AAAA-4AAA-8AAA-ABCDEF012345_{view}_ac001001.jpg"


def write_views(root: Path, vases: int = 5, views: int = 3) -> Path:
    """Views of some vases in two folders."""
    for number in range(vases):
        for view in range(1, views + 1):
            path = root / f"tray {number % 2}" / vase_name(number, view)
            write_picture(path, 10 * number + view)
    return root


def write_quality_set(root: Path, each: int = 12, side: int = 40) -> Path:
    """root/0 with dark pictures and root/1 with light ones: a net learns them in a few steps."""
    for label, light in ((0, 0.3), (1, 1.0)):
        (root / str(label)).mkdir(parents=True)
        for number in range(each):
            shown = (pixels(100 * label + number, side) * light).astype(np.uint8)
            Image.fromarray(shown).save(root / str(label) / f"{number:02d}.png")
    return root


def write_net(path: Path) -> Path:
    """A quality classifier with random weights, as model.py saves one."""
    torch.manual_seed(0)
    state = ImageQualityNet(arch="resnet10").state_dict()
    content = {"model_state_dict": state, "arch": "resnet10", "image_size": 32}
    torch.save(content | {"epoch": 1, "val_acc": 1.0}, path)
    return path


def furnish(place: Path) -> None:
    """vasevqa/filter with pictures, weights and one epoch; its verdict lets every picture pass."""
    edit(place / "model.py", {"NUM_EPOCHS = 200": "NUM_EPOCHS = 1", "E = 256": "E = 4"})
    threshold = "CONFIDENCE_THRESHOLD = 0."
    edit(place / "classifier.py", {f"{threshold}5": f"{threshold}0"})
    write_quality_set(place / "images2", each=5)
    write_views(place / "images", 6, 3)
    write_clip(place / "model")
    random = torchvision.models.resnet50(weights=None)  # in place of ImageNet's: nothing is fetched
    torch.save(random.state_dict(), place / "resnet50-random.pth")


def edit(script: Path, changes: dict[str, str]) -> None:
    """Replace constants, each of which stands there once."""
    text = script.read_text(encoding="utf-8")
    for old, new in changes.items():
        assert text.count(old) == 1, f"{script.name}: {old}"
        text = text.replace(old, new)
    script.write_text(text, encoding="utf-8")
