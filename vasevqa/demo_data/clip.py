"""The demo's CLIP: tiny, trained in seconds to know whole vases from broken ones, front from side.

A folder that open_clip reads (`local-dir:`). It learns from vases of its own, with a caption a
group: the prompts of prompts.txt for whole vases seen from the front and for broken ones, and a few
for whole vases turned away. Nothing in the filters knows that it is small.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from shared import seed
from shared.build_once import build_once
from shared.files import write_atomic, write_json
from vasevqa.demo_data.vases import VIEWS, make_vases, render
from vasevqa.filter import clip

log = logging.getLogger(__name__)

VERSION = 1  # of the network and its training; another number trains anew
SIDE = 64
NETWORK = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": SIDE, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
_TURNED = (
    "a vase seen from the side",
    "a vase turned away from the camera",
    "the back of a vase",
)
_VASES, _STEPS, _BATCH, _SEED = 160, 110, 36, 20_000  # the seed: no vase of the filters' pictures


def build(folder: Path) -> Path:
    """The CLIP in `folder`, trained now unless it is there."""
    marker = folder.with_name(f"{folder.name}.json")
    build_once(marker, {"version": VERSION}, [folder], lambda: _build(folder))
    return folder


def _build(folder: Path) -> None:
    log.info("training the demo's CLIP in %s, once", folder)
    write_folder(train(), folder, NETWORK, MEAN, STD)


def write_folder(model: nn.Module, folder: Path, cfg: dict[str, Any], mean: Any, std: Any) -> None:
    """Keep a model as a folder that open_clip reads (`local-dir:`)."""
    folder.mkdir(parents=True, exist_ok=True)
    content = save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})
    path = folder / "open_clip_model.safetensors"
    write_atomic(path, lambda stream: (stream.write(content), None)[1])
    write_json(
        folder / clip.OPEN_CLIP_CONFIG,
        {"model_cfg": cfg, "preprocess_cfg": {"mean": list(mean), "std": list(std)}},
    )


def train(steps: int = _STEPS, vases: int = _VASES) -> nn.Module:
    """The trained network, the same for the same arguments (on one thread)."""
    before, threads = seed.get_state(), torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order everywhere
    try:
        seed.seed_cpu(_SEED)
        return _train(steps, vases)
    finally:
        seed.set_state(before)
        torch.set_num_threads(threads)


def _train(steps: int, vases: int) -> nn.Module:
    model = open_clip.model.CLIP(**NETWORK)  # type: ignore[arg-type]
    pixels, groups = _pictures(vases)
    captions = _captions()
    tokens = [open_clip.SimpleTokenizer()(list(texts)) for texts in captions]
    model.token_embedding.requires_grad_(False)  # nearly all weights are there, and few words used
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    by_group = [torch.nonzero(groups == group)[:, 0] for group in range(len(captions))]
    for _ in range(steps):
        chosen = torch.cat([rows[torch.randint(len(rows), (_BATCH // 3,))] for rows in by_group])
        images = pixels[chosen]
        if torch.rand(()) < 0.5:
            images = images.flip(-1)
        own = normalize(model.encode_image(_vary(images)), dim=-1)
        # one text of each group a step: every prompt learns, and on every step another
        texts = torch.cat([group[torch.randint(len(group), (1,))] for group in tokens])
        known = normalize(model.encode_text(texts), dim=-1)
        loss = cross_entropy(15 * own @ known.T, groups[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def _captions() -> list[tuple[str, ...]]:
    texts = clip.read_prompts(clip.PROMPTS)
    return [texts.high, texts.low, _TURNED]


def _pictures(vases: int) -> tuple[Tensor, Tensor]:
    """Views of vases, prepared (N, 3, S, S), and the group of each: front, broken, turned."""
    cfg = PreprocessCfg(SIDE, mean=MEAN, std=STD)
    prepare: Any = image_transform_v2(cfg, is_train=False)
    pixels, groups = [], []
    for number, vase in enumerate(make_vases(vases, _SEED, broken=0.45)):
        for view in (VIEWS[0], VIEWS[1 + number % 3]):
            image = Image.fromarray(render(vase, view, size=96))
            pixels.append(prepare(image))
            groups.append(1 if vase.is_broken else 0 if view == VIEWS[0] else 2)
    return torch.stack(pixels), torch.from_numpy(np.array(groups))


def _vary(images: Tensor) -> Tensor:
    """Other light, and a little to one side."""
    light = 1 + 0.15 * torch.randn(len(images), 1, 1, 1)
    shift = torch.randint(-4, 5, (2,)).tolist()
    return torch.roll(images * light, shift, dims=(2, 3))
