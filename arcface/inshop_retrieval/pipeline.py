"""The `pipeline` list of a configuration: what happens to a picture on its way to the model.

Sizes and cuts are done here, picture by picture, on uint8; whether a picture is mirrored is drawn
here and done later, on the device, with the normalisation (encoders.Preprocess).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.errors import UserError, did_you_mean, shown
from shared.settings import SIZES, Range

if TYPE_CHECKING:  # steps are checked before torch is imported
    from torch import Tensor

Size = tuple[Any, Any]  # height and width, int; None: differs from picture to picture


@dataclass(frozen=True)
class LoadImageFromFile:
    """The first step: a file's content as RGB."""

    color_type: str = "color"

    def __post_init__(self) -> None:
        _check("color_type", self.color_type, ("color",))


@dataclass(frozen=True)
class PackInputs:
    """The last step, which hands the picture on."""

    meta_keys: Any = None  # of no effect here


@dataclass(frozen=True)
class RandomFlip:
    """Mirror a picture, left to right, with probability `prob`."""

    prob: float = 0.5
    direction: str = "horizontal"

    def __post_init__(self) -> None:
        _check("direction", self.direction, ("horizontal",))
        if not Range(0, 1).fits(self.prob, float):
            raise ValueError(f"prob is {shown(self.prob)}, expected a number from 0 to 1")


@dataclass(frozen=True)
class Resize:
    """Resize to `scale`: both sides (a number), or (width, height)."""

    scale: Any
    keep_ratio: bool = False
    interpolation: str = "bilinear"
    backend: str = ""  # of no effect here

    def __post_init__(self) -> None:
        _check("interpolation", self.interpolation, ("bilinear", "bicubic"))
        _sides("scale", self.scale)
        if self.keep_ratio:
            raise ValueError("keep_ratio is True, allowed: False; ResizeEdge keeps the shape")

    def size(self, height: int | None, width: int | None) -> Size:
        """Height and width after this step."""
        wide, high = _sides("scale", self.scale)
        return high, wide

    def __call__(self, image: Tensor) -> Tensor:
        """The picture, uint8 (3, H, W), at that size."""
        return resize(image, *self.size(*image.shape[-2:]), self.interpolation)


@dataclass(frozen=True)
class ResizeEdge:
    """Resize so that one edge has `scale` pixels, the shape kept."""

    scale: Any
    edge: str = "short"
    interpolation: str = "bilinear"
    backend: str = ""  # of no effect here

    def __post_init__(self) -> None:
        _check("edge", self.edge, ("short", "long"))
        _check("interpolation", self.interpolation, ("bilinear", "bicubic"))
        if not SIZES.fits(self.scale, int):
            raise ValueError(f"scale is {shown(self.scale)}, expected {SIZES.describe(int)}")

    def size(self, height: int | None, width: int | None) -> Size:
        """Height and width after this step."""
        if height is None or width is None:
            return None, None
        factor = self.scale / (min if self.edge == "short" else max)(height, width)
        return max(1, round(height * factor)), max(1, round(width * factor))

    def __call__(self, image: Tensor) -> Tensor:
        """The picture, uint8 (3, H, W), at that size."""
        return resize(image, *self.size(*image.shape[-2:]), self.interpolation)


@dataclass(frozen=True)
class CenterCrop:
    """Cut out the middle: a square (a number), or (width, height)."""

    crop_size: Any

    def __post_init__(self) -> None:
        _sides("crop_size", self.crop_size)

    def size(self, height: int | None, width: int | None) -> Size:
        """Height and width after this step."""
        wide, high = _sides("crop_size", self.crop_size)
        return _cut_size(height, width, high, wide)

    def __call__(self, image: Tensor) -> Tensor:
        """The part, uint8 (3, H, W)."""
        height, width = self.size(*image.shape[-2:])
        top, left = (round(room / 2) for room in _room(image, height, width))
        return image[:, top : top + height, left : left + width]


@dataclass(frozen=True)
class RandomCrop:
    """Cut out a random part: a square (a number), or (height, width)."""

    crop_size: Any

    def __post_init__(self) -> None:
        _sides("crop_size", self.crop_size)

    def size(self, height: int | None, width: int | None) -> Size:
        """Height and width after this step."""
        return _cut_size(height, width, *_sides("crop_size", self.crop_size))

    def __call__(self, image: Tensor) -> Tensor:
        """The part, uint8 (3, H, W)."""
        import torch

        height, width = self.size(*image.shape[-2:])
        top, left = (int(torch.randint(room + 1, ())) for room in _room(image, height, width))
        return image[:, top : top + height, left : left + width]


Step = Resize | ResizeEdge | CenterCrop | RandomCrop
_KINDS: dict[str, Callable[..., Any]] = {
    kind.__name__: kind
    for kind in (
        *(LoadImageFromFile, Resize, ResizeEdge, RandomCrop, CenterCrop, RandomFlip, PackInputs),
    )
}


@dataclass(frozen=True)
class Pipeline:
    """The steps of one data set."""

    steps: tuple[Step, ...]
    flip: RandomFlip
    height: int
    width: int

    def __call__(self, image: Tensor) -> tuple[Tensor, bool]:
        """The picture, uint8 (3, height, width), and whether it is to be mirrored.

        Random numbers come from torch's global generator, which the loader seeds for each sample.
        Raises ValueError for a picture that is smaller than the part to cut out.
        """
        import torch

        for step in self.steps:
            image = step(image)
        return image, self.flip.prob > 0 and float(torch.rand(())) < self.flip.prob


def build_pipeline(settings: Any, name: str = "pipeline") -> Pipeline:
    """The pipeline of a configuration's list of dicts.

    name: the list's key, for messages. Raises UserError, with name and index, for a step or a
    setting that does not exist, a wrong value, and steps that leave pictures of several sizes.
    """
    if not isinstance(settings, Sequence) or isinstance(settings, str):
        raise UserError(f"{name} is {shown(settings)}, expected a list of dict(type=…)")
    built = [_build_step(entry, f"{name}.{index}") for index, entry in enumerate(settings)]
    if not built or not isinstance(built[0], LoadImageFromFile):
        raise UserError(f"{name}: the first step must be dict(type='LoadImageFromFile')")
    if not isinstance(built[-1], PackInputs):
        raise UserError(f"{name}: the last step must be dict(type='PackInputs')")
    if any(isinstance(step, LoadImageFromFile | PackInputs) for step in built[1:-1]):
        raise UserError(f"{name}: LoadImageFromFile and PackInputs stand once, first and last")
    flips = [step for step in built if isinstance(step, RandomFlip)]
    if len(flips) > 1:
        raise UserError(f"{name}: RandomFlip stands {len(flips)} times, once is allowed")
    steps = tuple(step for step in built[1:-1] if not isinstance(step, RandomFlip))
    height, width = _final_size(steps, name)
    return Pipeline(steps, flips[0] if flips else RandomFlip(prob=0.0), height, width)


def _build_step(entry: Any, name: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        raise UserError(f"{name} is {shown(entry)}, expected dict(type=…)")
    settings = dict(entry)
    kind = settings.pop("type")
    if kind not in _KINDS:
        near = did_you_mean(kind, _KINDS)
        raise UserError(f"{name}: there is no step {kind}; allowed are {', '.join(_KINDS)}{near}")
    known = [field.name for field in dataclasses.fields(_KINDS[kind])]  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise UserError(
                f"{name}: {kind} has no setting {key}; allowed are {', '.join(known)}"
                f"{did_you_mean(str(key), known)}"
            )
    try:
        return _KINDS[kind](**settings)
    except (ValueError, TypeError) as error:  # TypeError: a setting without default is missing
        raise UserError(f"{name}: {kind}: {error}") from None


def _final_size(steps: tuple[Step, ...], name: str) -> tuple[int, int]:
    height: int | None = None
    width: int | None = None
    for step in steps:
        try:
            height, width = step.size(height, width)
        except ValueError as error:
            raise UserError(f"{name}: {type(step).__name__}: {error}") from None
    if height is None or width is None:
        raise UserError(
            f"{name} leaves pictures of different sizes, which make no batch: add "
            "dict(type='CenterCrop', crop_size=…) or a Resize to one size"
        )
    return height, width


def resize(image: Tensor, height: int, width: int, interpolation: str = "bilinear") -> Tensor:
    """The picture, uint8 (3, H, W), at another size, as Pillow resizes it (antialiased).

    The kernel that works on interleaved colours takes a third of the time of the other. Bilinear:
    equal to Pillow at whole factors; else one grey level off, two at most, in few pixels.
    """
    from torch.nn import functional

    if image.shape[-2:] == (height, width):
        return image
    batch = image.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    return functional.interpolate(batch, (height, width), mode=interpolation, antialias=True)[0]


def _check(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {shown(value)}, allowed: {', '.join(allowed)}")


def _sides(name: str, value: Any) -> tuple[int, int]:
    """Two sides from a number or a pair."""
    pair = (value, value) if isinstance(value, int) else value
    is_pair = isinstance(pair, list | tuple) and len(pair) == 2
    if not is_pair or not all(SIZES.fits(side, int) for side in pair):
        raise ValueError(
            f"{name} is {shown(value)}, expected {SIZES.describe(int)} (pixels), or two of them"
        )
    return pair[0], pair[1]


def _cut_size(height: int | None, width: int | None, high: int, wide: int) -> Size:
    for side, part in ((height, high), (width, wide)):
        if side is not None and side < part:
            raise ValueError(f"{part} pixels cannot be cut out of {side}")
    return high, wide


def _room(image: Tensor, height: int, width: int) -> tuple[int, int]:
    """How far a part of this size can be moved down and to the right."""
    return image.shape[-2] - height, image.shape[-1] - width
