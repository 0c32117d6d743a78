"""The picture-quality classifier: a ResNet with a small head, classes 0 (low) and 1 (high)."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.transforms import v2

from shared import hub, weights
from shared.checkpoint import DamagedError
from shared.checkpoint import load as load_checkpoint
from shared.errors import UserError

log = logging.getLogger(__name__)

_ARCH = re.compile(r"(wide_)?resne(x)?t\d+(_\d+x?\d*d?)?")

CLASSES = ("low", "high")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


class ImageQualityNet(nn.Module):
    """Images (B, 3, S, S), normalised → logits (B, num_classes); weights at `resnet.*`."""

    def __init__(self, num_classes: int = 2, arch: str = "resnet50") -> None:
        super().__init__()
        self.resnet = _backbone(arch)
        features = self.resnet.fc.in_features
        self.resnet.fc = nn.Sequential(  # type: ignore[assignment]
            nn.Linear(features, 512),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(512, 256),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(256, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, num_classes)."""
        return self.resnet(images)


def _backbone(arch: str) -> ResNet:
    """A ResNet with random weights; resnet10 has one plain block a stage."""
    if arch == "resnet10":
        return ResNet(BasicBlock, [1, 1, 1, 1])
    build = getattr(models, arch, None) if _ARCH.fullmatch(arch) else None
    if build is None:
        raise UserError(f"{arch} is no ResNet of torchvision: name resnet10, resnet18, resnet50 …")
    return build(weights=None)


def start_from(net: ImageQualityNet, path: Path) -> None:
    """Fill the backbone from ImageNet weights, or the whole net from one trained before.

    Raises UserError when the file does not fit.
    """
    state = weights.strip_wrappers(weights.read(path))
    if any(name.startswith("resnet.fc.6") for name in state):
        weights.load_strict(net, state, source=path)
    else:
        body = {k.removeprefix("resnet."): v for k, v in state.items() if "fc." not in k}
        names = [name for name in net.resnet.state_dict() if not name.startswith("fc.")]
        weights.load_strict(net.resnet, body, only=names, source=path)


def starting_weights(pretrained: str, arch: str, places: Sequence[Path]) -> Path | None:
    """The file that `--pretrained` names; None for random weights.

    auto: the newest `{arch}*.pth` in `places`, else torchvision's first ones of ImageNet (V1, the
    original's `pretrained=True`), fetched into torch's own cache when they are not there.
    """
    if pretrained != "auto":
        return None if pretrained == "none" else Path(pretrained)
    found = (path for place in places for path in place.glob(f"{arch}*"))
    own = sorted(path for path in found if path.suffix in (".pth", ".safetensors"))
    if own:
        return own[-1]
    if arch == "resnet10":
        raise UserError("resnet10 has no published weights: type --pretrained none, or a file")
    published = models.get_model_weights(arch)["IMAGENET1K_V1"]
    return hub.fetched_weights(published.url, Path(torch.hub.get_dir()) / "checkpoints")


def for_training(size: int) -> v2.Transform:
    """uint8 (3, H, W) → a varied (3, size, size): mirrored, turned, other colours, normalised."""
    return v2.Compose(
        [
            v2.Resize((size, size), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation([-10, 10]),
            v2.ColorJitter(0.2, 0.2, 0.2, 0.1),
            *_normalised(),
        ]
    )


def for_evaluation(size: int) -> v2.Transform:
    """uint8 (3, H, W) → (3, size, size), normalised; always the same."""
    return v2.Compose([v2.Resize((size, size), antialias=True), *_normalised()])


def _normalised() -> list[nn.Module]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def load_trained(path: Path, device: torch.device) -> tuple[ImageQualityNet, dict[str, Any]]:
    """A net that model.py saved, in evaluation mode, and what else its file says.

    Raises UserError when it cannot be read whole.
    """
    try:
        content = load_checkpoint(path)
    except (DamagedError, UserError):
        content = {"model_state_dict": weights.read(path)}  # another format, or the reason in words
    state: Any = content.get("model_state_dict", content)
    net = ImageQualityNet(arch=str(content.get("arch", "resnet50")))
    weights.load_strict(net, weights.strip_wrappers(state), source=path)
    return net.eval().to(device), {k: v for k, v in content.items() if not k.endswith("_dict")}
