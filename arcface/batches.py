"""Pictures in batches: put together in the loader, mirrored and normalised on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arcface.inshop import Garment
from arcface.section import refuse_unknown
from shared.errors import UserError, shown

_SETTINGS = ("type", "num_classes", "mean", "std", "to_rgb")


class GarmentBatch(NamedTuple):
    """Some pictures of one split; see Garment."""

    images: Tensor  # uint8 (B, 3, H, W), channels last in memory
    labels: Tensor  # int64 (B,)
    indices: Tensor  # int64 (B,)
    flipped: Tensor  # bool (B,)


def collate(garments: Sequence[Garment]) -> GarmentBatch:
    """The pictures as one batch; the loader's `collate`."""
    # Interleaved colours stay so: stacking them as planes takes ten times as long.
    interleaved = torch.stack([garment.image.permute(1, 2, 0) for garment in garments])
    return GarmentBatch(
        interleaved.permute(0, 3, 1, 2),
        torch.tensor([garment.label for garment in garments]),
        torch.tensor([garment.position for garment in garments]),
        torch.tensor([garment.flipped for garment in garments]),
    )


class Preprocess(nn.Module):
    """uint8 pictures → the model's float32 input, (level - mean) / std, channels last.

    mean, std: of R, G and B in grey levels (0..255). direction: what a flipped picture is mirrored
    along, "horizontal" or "vertical".
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], direction: str = "horizontal"
    ) -> None:
        super().__init__()
        self._axis = {"vertical": 1, "horizontal": 2}[direction]  # of (B, H, W, 3)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, images: Tensor, flipped: Tensor | None = None) -> Tensor:
        """images: (B, 3, H, W) uint8. flipped: bool (B,), both on this module's device.

        Returns (B, 3, H, W) float32. Raises ValueError for images of another kind.
        """
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(
                f"expected uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        levels = images.permute(0, 2, 3, 1).contiguous()
        on_cpu = levels.device.type == "cpu"
        out = (self._one_by_one if on_cpu else self._all_at_once)(levels, flipped)
        return out.permute(0, 3, 1, 2)

    def _all_at_once(self, levels: Tensor, flipped: Tensor | None) -> Tensor:
        """levels: (B, H, W, 3) uint8. Mirrored and normalised, without a wait for the device."""
        if flipped is not None:
            mirrored = levels.flip(self._axis)
            levels = torch.where(flipped.view(-1, 1, 1, 1), mirrored, levels)
        return self._normalise(levels.float())

    def _one_by_one(self, levels: Tensor, flipped: Tensor | None) -> Tensor:
        """The same for the CPU: a picture at a time stays in its cache, which halves the time."""
        out = torch.empty(levels.shape, dtype=torch.float32)
        flags = [False] * len(levels) if flipped is None else flipped.tolist()
        for i, is_flipped in enumerate(flags):
            out[i] = levels[i].flip(self._axis - 1) if is_flipped else levels[i]
            self._normalise(out[i : i + 1])
        return out

    def _normalise(self, levels: Tensor) -> Tensor:
        """levels, (B, H, W, 3) float, changed in place; by rows: by 3 numbers takes four times."""
        width = levels.shape[2]
        scale, shift = (1 / self.std).repeat(width), (-self.mean / self.std).repeat(width)
        levels.flatten(2).mul_(scale).add_(shift)
        return levels


def open_preprocess(settings: Any, direction: str = "horizontal") -> Preprocess:
    """What a configuration's `data_preprocessor` dict describes.

    Raises UserError for settings that are unknown or of a wrong kind, and for BGR.
    """
    name = "data_preprocessor"
    refuse_unknown(settings, name, _SETTINGS, "dict(mean=…, std=…)")
    if settings.get("to_rgb", True) is not True:
        raise UserError(
            f"{name}.to_rgb is {shown(settings['to_rgb'])}: pictures are RGB here, use True"
        )
    for key in ("mean", "std"):
        values, kind = settings.get(key), "three numbers" + " above 0" * (key == "std")
        if not _is_colour(values) or (key == "std" and min(settings[key]) <= 0):
            raise UserError(f"{name}.{key} is {shown(values)}, expected {kind}, in grey levels")
    return Preprocess(settings["mean"], settings["std"], direction)


def _is_colour(values: Any) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    )
