"""IResNet, the face embedder of InsightFace's ArcFace models, under the names of its weight files.

    network = iresnet.build("iresnet50")
    network.load_state_dict(state)             # backbone.pth of arcface_torch
    embeddings = network.eval()(images)        # (B, 3, 112, 112) → (B, 512)

Sources: the IR block and the BN-Dropout-FC-BN end are of Deng et al. 2019, "ArcFace: Additive
Angular Margin Loss for Deep Face Recognition" (arXiv:1801.07698, section 3.1), block counts too;
residual blocks that end without an activation, of Duta et al. 2020, "Improved Residual Networks"
(arXiv:2004.04989).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.errors import UserError

# Blocks in each of the four stages.
VARIANTS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
IMAGE_SIZE = 112  # pixels a side; the fully connected layer fits no other size
EMBEDDING_DIM = 512
_WIDTHS = (64, 128, 256, 512)  # channels of the stages
_LAST_SIDE = IMAGE_SIZE // 2 ** len(_WIDTHS)  # every stage halves the picture: 7
_BLOCK_NAME = re.compile(r"layer([1-4])\.(\d+)\.")


class IRBlock(nn.Module):
    """(B, in_channels, H, W) → (B, channels, H / stride, W / stride).

    BN, convolution, BN, PReLU, convolution with the stride, BN; added to the input, which passes a
    1 x 1 convolution and BN first where the shape changes. No activation after the sum.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = _conv3x3(in_channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = _conv3x3(channels, channels, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()  # has no weights, hence no names in a file
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        hidden = self.prelu(self.bn2(self.conv1(self.bn1(images))))
        return self.bn3(self.conv2(hidden)) + self.downsample(images)


class IResNet(nn.Module):
    """Faces (B, 3, 112, 112), RGB, each channel (level / 255 - 0.5) / 0.5 → embeddings (B, 512).

    blocks: how many IR blocks each of the four stages has, see VARIANTS. The embeddings are not
    unit length.
    """

    def __init__(self, blocks: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, _WIDTHS[0], 1)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.prelu = nn.PReLU(_WIDTHS[0])
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], blocks[0])
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], blocks[1])
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], blocks[2])
        self.layer4 = _stage(_WIDTHS[2], _WIDTHS[3], blocks[3])
        self.bn2 = nn.BatchNorm2d(_WIDTHS[3])
        self.dropout = nn.Dropout(0.0)  # InsightFace's value for every published model
        self.fc = nn.Linear(_WIDTHS[3] * _LAST_SIDE**2, EMBEDDING_DIM)
        self.features = nn.BatchNorm1d(EMBEDDING_DIM)
        self.features.weight.requires_grad_(False)  # stays 1: lengths of embeddings mean nothing

    def embed_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (B, 512), float32, and the last stage's output (B, 512, 7, 7).

        Raises UserError for images of another size.
        """
        if images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
            raise UserError(
                f"an IResNet takes images (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), got "
                f"{tuple(images.shape)}"
            )
        stem = self.prelu(self.bn1(self.conv1(images)))
        feature_map = self.layer4(self.layer3(self.layer2(self.layer1(stem))))
        flat = self.dropout(self.bn2(feature_map)).flatten(1)
        # Sums of 25,088 products: in half precision they would lose the embedding's last digits.
        with torch.autocast(flat.device.type, enabled=False):
            return self.features(self.fc(flat.float())), feature_map

    def forward(self, images: Tensor) -> Tensor:
        """The embeddings (B, 512) alone."""
        return self.embed_and_map(images)[0]


def build(variant: str) -> IResNet:
    """An IResNet with PyTorch's own initial weights; `variant` is one of VARIANTS."""
    return IResNet(VARIANTS[variant])


def find_variant(names: Iterable[str], source: str | Path = "the given state") -> str | None:
    """Which of VARIANTS a state dict with these names is; None when it is no IResNet at all.

    source: the file they came from, for the error.
    Raises UserError for an IResNet of other block counts.
    """
    names = set(names)
    if not {"prelu.weight", "features.weight", "layer4.0.prelu.weight"} <= names:
        return None
    found = {(int(m[1]), int(m[2])) for name in names if (m := _BLOCK_NAME.match(name))}
    counts = tuple(sum(stage == wanted for stage, _ in found) for wanted in (1, 2, 3, 4))
    for variant, blocks in VARIANTS.items():
        if blocks == counts:
            return variant
    known = ", ".join(f"{name} {blocks}" for name, blocks in VARIANTS.items())
    raise UserError(f"{source} is an IResNet with {counts} blocks a stage; known are {known}")


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    """Blocks of which the first halves the picture."""
    rest = (IRBlock(channels, channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(IRBlock(in_channels, channels, 2), *rest)


def _conv3x3(in_channels: int, channels: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
