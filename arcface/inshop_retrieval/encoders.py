"""From uint8 pictures to embeddings: normalisation, ResNets of torchvision, towers of open_clip.

B batch, S image side, D width of the embedding.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arcface.inshop_retrieval.config import checked
from shared import checkpoint, distributed, hub, weights
from shared.checkpoint import DamagedError, Stateful
from shared.distributed import World, gather_with_grad
from shared.errors import UserError, did_you_mean, shown
from shared.recompute import recompute

log = logging.getLogger(__name__)

DEPTHS = (18, 34, 50, 101, 152)
_RESNET: dict[
    str, tuple[Any, ...]
] = {  # settings of mmpretrain's that torchvision's has in one way
    "num_stages": (4,),
    "out_indices": ((3,), [3]),
    "style": ("pytorch",),
    "frozen_stages": (-1,),
}
_BLOCKS = ("BasicBlock", "Bottleneck", "ResidualAttentionBlock", "Block", "ConvNeXtBlock")
_KINDS = {"ResNet": ["GlobalAveragePooling"], "OpenClip": []}  # and what has to stand behind each
_CLASSIFIERS = ("fc.", "head.")  # which an encoder has no use for
# Where the encoder is in a state dict: of this recipe, mmpretrain, open_clip.
_PREFIXES = ("encoder.backbone", "image_encoder.0", "backbone", "visual")
_CENTRES = ("head.weight", "head.norm_product.weight")
Find = Callable[[str], Path | None]


class Preprocess(nn.Module):
    """uint8 pictures → the model's float32 input, (level - mean) / std, channels last.

    mean, std: of R, G and B in grey levels (0..255). A flipped picture is mirrored left to right.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
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
            mirrored = levels.flip(2)
            levels = torch.where(flipped.view(-1, 1, 1, 1), mirrored, levels)
        return self._normalise(levels.float())

    def _one_by_one(self, levels: Tensor, flipped: Tensor | None) -> Tensor:
        """The same for the CPU: a picture at a time stays in its cache, which halves the time."""
        out = torch.empty(levels.shape, dtype=torch.float32)
        flags = [False] * len(levels) if flipped is None else flipped.tolist()
        for i, is_flipped in enumerate(flags):
            out[i] = levels[i].flip(1) if is_flipped else levels[i]
            self._normalise(out[i : i + 1])
        return out

    def _normalise(self, levels: Tensor) -> Tensor:
        """levels, (B, H, W, 3) float, changed in place; by rows: by 3 numbers takes four times."""
        width = levels.shape[2]
        scale, shift = (1 / self.std).repeat(width), (-self.mean / self.std).repeat(width)
        levels.flatten(2).mul_(scale).add_(shift)
        return levels


class Encoder(nn.Module):
    """Normalised images (B, 3, S, S) → embeddings (B, D), not unit length.

    image_size: (height, width) that the backbone needs; None where any will do. norm_eval keeps the
    running statistics of batch norms as they are, in training too.
    """

    def __init__(
        self, backbone: nn.Module, dim: int, *, norm_eval: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone, self.dim, self.image_size = backbone, dim, image_size
        self._norm_eval = norm_eval

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of the normalised images (B, 3, S, S)."""
        return self.backbone(images)

    def train(self, mode: bool = True) -> Encoder:
        """Set training mode; batch norms stay in evaluation mode with `norm_eval`."""
        super().train(mode)
        if self._norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def checkpoint_activations(encoder: Encoder) -> None:
    """Have the encoder's blocks keep their inputs alone in training: computed again."""
    recompute(part for part in encoder.modules() if type(part).__name__ in _BLOCKS)


def build_encoder(settings: Any, init: str) -> Encoder:
    """The encoder that `model.image_encoder` describes, with its weights.

    init: "pretrained" loads what init_cfg names, "random" leaves it out; an encoder without
    init_cfg is random.
    Raises UserError for what is not known, and for weights that are missing or do not fit.
    """
    entries = settings if isinstance(settings, list | tuple) else [settings]
    name, first = "model.image_encoder.0", entries[0] if entries else None
    kind = first.get("type") if isinstance(first, dict) else None
    if not isinstance(first, dict) or kind not in _KINDS:
        near = did_you_mean(str(kind), _KINDS)
        raise UserError(f"{name}.type is {shown(kind)}, allowed: {', '.join(_KINDS)}{near}")
    behind = [entry.get("type") if isinstance(entry, dict) else entry for entry in entries[1:]]
    if behind != _KINDS[kind]:
        raise UserError(
            f"model.image_encoder has {behind} behind {kind}, expected {_KINDS[kind]}: the "
            "embedding is the pooled feature itself"
        )
    encoder, find = _resnet(first, name) if kind == "ResNet" else _open_clip(first, name)
    init_cfg = first.get("init_cfg")
    if init != "random" and init_cfg is not None:
        _load(encoder.backbone, init_cfg, f"{name}.init_cfg", find)
    return encoder


def _resnet(entry: dict[str, Any], name: str) -> tuple[Encoder, Find]:
    """A ResNet without its classifier, random; where torchvision keeps weights by their names."""
    from torchvision import models

    fixed = {key: allowed[0] for key, allowed in _RESNET.items()}
    settings = checked(entry, name, depth=None, init_cfg=None, norm_eval=False, **fixed)
    allowed = {"depth": DEPTHS, "norm_eval": (False, True), **_RESNET}
    for key, values in allowed.items():
        if settings[key] not in values:
            listed = ", ".join(map(str, values if key == "depth" else values[:1]))
            raise UserError(f"{name}.{key} is {shown(settings[key])}; allowed: {listed}")
    kind = f"resnet{settings['depth']}"
    backbone = getattr(models, kind)(weights=None)
    dim = backbone.fc.in_features
    backbone.fc = nn.Identity()  # what is left ends with the pooled feature
    urls = {member.name: member.url for member in models.get_model_weights(kind)}

    def find(name: str) -> Path | None:
        return hub.fetched_weights(urls[name], _torch_cache()) if name in urls else None

    return Encoder(backbone, dim, norm_eval=settings["norm_eval"]), find


def _open_clip(entry: dict[str, Any], name: str) -> tuple[Encoder, Find]:
    """An image tower, random; where open_clip keeps the weights of its tags."""
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    model = str(checked(entry, name, model_name=None, init_cfg=None)["model_name"])
    if model not in open_clip.list_models():
        raise UserError(
            f"{name}.model_name is {shown(model)}, which open_clip does not have"
            f"{did_you_mean(model, open_clip.list_models())}"
        )
    config: dict[str, Any] = open_clip.get_model_config(model) or {}
    vision, dim = CLIPVisionCfg(**config["vision_cfg"]), int(config["embed_dim"])
    # the image tower alone: a text tower may want files from the Hub
    tower = _build_vision_tower(dim, vision, quick_gelu=bool(config.get("quick_gelu")))
    size = vision.image_size

    def find(tag: str) -> Path | None:
        found = open_clip.get_pretrained_cfg(model, tag)
        if found and bool(found.get("quick_gelu")) != bool(config.get("quick_gelu")):
            raise UserError(
                f"the weights {tag} need QuickGELU {'on' if found.get('quick_gelu') else 'off'}: "
                f"{name}.model_name with or without -quickgelu"
            )
        return hub.clip_weights(found) if found else None

    return Encoder(tower, dim, image_size=(size, size) if isinstance(size, int) else size), find


# --- weights --------------------------------------------------------------------------------------


def _load(backbone: nn.Module, init_cfg: Any, section: str, find: Find) -> None:
    """Fill `backbone` as `init_cfg` says. find: the file of a name, None for what is no name."""
    settings = checked(init_cfg, section, checkpoint=None, prefix=None, map_location=None)
    name = settings["checkpoint"]
    if init_cfg.get("type") != "Pretrained" or not isinstance(name, str) or not name:
        raise UserError(f"{section}: expected type='Pretrained' and checkpoint, a path or a name")
    try:
        path = find(name) or located(name)
    except hub.NoWeightsError as error:
        raise UserError(_missing(name, str(error), section)) from None
    if not path.exists():
        raise UserError(_missing(name, f"looked for {path}", section))
    fill_backbone(backbone, weights.read(path), path, settings["prefix"])
    log.info("the encoder starts from %s", path)


def _missing(name: str, reason: str, section: str) -> str:
    return (
        f"the encoder's weights {name} are missing ({reason}): put the file there, name another "
        f"with --cfg-options {section}.checkpoint=PATH, or begin with random ones by --init random"
    )


def located(name: str) -> Path:
    """The file of a path or, of an address, in torch's cache, fetched when it is not there."""
    if name.startswith(("http://", "https://")):
        return hub.fetched_weights(name, _torch_cache())
    return Path(name).expanduser()


def _torch_cache() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def fill_backbone(
    backbone: nn.Module, state: Mapping[str, Tensor], source: Path, prefix: str | None = None
) -> None:
    """Fill `backbone` from a state dict of this recipe, torchvision, mmpretrain or open_clip.

    prefix: what comes before the backbone's names, when it is another. Raises UserError for a state
    that does not fit.
    """
    given = _backbone_state(state, prefix)
    own = backbone.state_dict()
    # counts of batches, which old files lack, steer nothing with a fixed momentum
    counts = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
    weights.load_strict(backbone, counts | given, source=source)


def _backbone_state(state: Mapping[str, Tensor], prefix: str | None) -> dict[str, Tensor]:
    """The backbone's part of a state dict; a plain one is taken whole, without its classifier."""
    state = weights.strip_wrappers(state)
    for start in filter(None, (prefix, *_PREFIXES)):
        below = {n[len(start) + 1 :]: t for n, t in state.items() if n.startswith(f"{start}.")}
        if below:
            return below
    return {name: tensor for name, tensor in state.items() if not name.startswith(_CLASSIFIERS)}


def load_weights(encoder: Encoder, head: nn.Module | None, path: Path) -> None:
    """Fill the encoder from `path` and, where the file has the same centres, the head.

    path: best_….pth, epoch_N.pth or last.pt of a run, or a state dict as `fill_backbone` takes it.
    Raises UserError for a file that cannot be read or an encoder that does not fit.
    """
    state = _read(path)
    fill_backbone(encoder.backbone, state, path)
    if head is None:
        return
    centres = next((state[name] for name in _CENTRES if name in state), None)
    own = head.get_parameter("weight")
    if centres is None or centres.shape != own.shape:
        log.info("the head starts from random centres: %s has none of its size", path)
        return
    own.data.copy_(centres)


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, a run's checkpoint under the names of its best file."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing: expected best_….pth, epoch_N.pth or another checkpoint"
        )
    try:
        content = checkpoint.load(path)
    except (DamagedError, UserError):
        return weights.read(path)  # another format, or the reason in words
    parts = content.get("parts")
    if not isinstance(parts, dict) or not isinstance(parts.get("encoder"), dict):
        return weights.read(path)
    centres = _centres(parts.get("head") or {})
    state = {f"encoder.{name}": tensor for name, tensor in parts["encoder"].items()}
    return state | ({"head.weight": centres} if isinstance(centres, Tensor) else {})


def weights_of(encoder: Encoder, head: Stateful) -> dict[str, Tensor]:
    """Encoder and centres on the CPU under the names of one module; rank 0, after a collect."""
    state = {f"encoder.{name}": tensor.cpu() for name, tensor in encoder.state_dict().items()}
    return state | {"head.weight": _centres(head.state_dict()).cpu()}


def _centres(head: dict[str, Any]) -> Tensor:
    """The class centres in the state of a head."""
    return head.get("centres", head.get("weight"))  # type: ignore[return-value]


# --- statistics of several processes --------------------------------------------------------------


def wrap(module: nn.Module, world: World) -> nn.Module:
    """`module` under DDP, where each rank keeps its own buffers until the end of an epoch."""
    names = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return distributed.wrap(module, world, gradient_as_bucket_view=True, **{sync: False})


class RankBuffers:
    """Every rank's batch norm statistics, as a part of a checkpoint.

    They differ between ranks within an epoch and are averaged at its end; a run that is stopped in
    between continues as if it had not been.
    """

    def __init__(self, module: nn.Module, world: World) -> None:
        self._buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self._world = world
        self._rows = self._own()[None].cpu()

    def average(self) -> None:
        """Give every rank the mean over the ranks."""
        if self._buffers and self._world.size > 1:
            self._put(distributed.mean(self._own(), self._world))

    def collect(self) -> None:
        """Note the statistics of all ranks; every rank, before each save."""
        if self._buffers:
            with torch.no_grad():
                self._rows = gather_with_grad(self._own()[None], self._world).cpu()

    def state_dict(self) -> dict[str, Any]:
        """Of every rank a row, as `collect` found them."""
        return {"rows": self._rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's row or, of another number of ranks, the mean."""
        rows = state["rows"]
        if not self._buffers:
            return
        fits = len(rows) == self._world.size
        self._put((rows[self._world.rank] if fits else rows.mean(0)).to(self._world.device))

    def _own(self) -> Tensor:
        flat = [buffer.detach().flatten() for buffer in self._buffers]
        return torch.cat(flat) if flat else torch.zeros(0, device=self._world.device)

    def _put(self, row: Tensor) -> None:
        sizes = [buffer.numel() for buffer in self._buffers]
        with torch.no_grad():
            for buffer, values in zip(self._buffers, row.split(sizes), strict=True):
                buffer.copy_(values.view_as(buffer))
