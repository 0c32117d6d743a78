"""Image encoders by the words of a configuration: ResNets of torchvision, towers of open_clip.

B batch, S image side, D width of the embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arcface.section import Section
from shared import hub, weights
from shared.errors import UserError, did_you_mean, shown

log = logging.getLogger(__name__)

DEPTHS = (18, 34, 50, 101, 152)
_RESNET = {  # settings of mmpretrain's ResNet that torchvision's has in one way alone
    "num_stages": (4,),
    "out_indices": ((3,), [3]),
    "style": ("pytorch",),
    "frozen_stages": (-1,),
}
_KINDS = ("ResNet", "OpenClip")
_CLASSIFIERS = ("fc.", "head.")  # which an encoder has no use for
# Where the encoder stands in a state dict: of this recipe, mmpretrain, open_clip.
_PREFIXES = ("encoder.backbone", "backbone", "visual")
Find = Callable[[str], Path | None]


class Encoder(nn.Module):
    """Normalised images (B, 3, S, S) → embeddings (B, D), not unit length.

    image_size: (height, width) that the backbone needs; None where any will do.
    """

    def __init__(
        self,
        backbone: nn.Module,
        dim: int,
        *,
        norm_eval: bool = False,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        """`norm_eval` keeps the running statistics of batch norms as they are, in training too."""
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


def build_encoder(settings: Any, init: str, cwd: Path) -> Encoder:
    """The encoder that `model.image_encoder` describes, with its weights.

    init: "pretrained" loads what init_cfg names, "random" leaves it out; an encoder without
    init_cfg is random. cwd: what a relative checkpoint path is relative to.
    Raises UserError for what is not known, and for weights that are missing or do not fit.
    """
    entries = settings if isinstance(settings, list | tuple) else [settings]
    first = Section(entries[0] if entries else None, "model.image_encoder.0")
    kind = first.one_of("type", _KINDS)
    wanted = ["GlobalAveragePooling"] if kind == "ResNet" else []
    behind = [entry.get("type") if isinstance(entry, dict) else entry for entry in entries[1:]]
    if behind != wanted:
        raise UserError(
            f"model.image_encoder has {behind} behind {kind}, expected {wanted}: the embedding is "
            "the pooled feature itself"
        )
    init_cfg = first.get("init_cfg")
    encoder, find = _resnet(first) if kind == "ResNet" else _open_clip(first)
    first.refuse_rest()
    if init != "random" and init_cfg is not None:
        _load(encoder.backbone, Section(init_cfg, f"{first.name}.init_cfg"), cwd, find)
    return encoder


def _resnet(settings: Section) -> tuple[Encoder, Find]:
    """A ResNet without its classifier, random; where torchvision keeps weights by their names."""
    from torchvision import models

    depth = settings.get("depth")
    if depth not in DEPTHS:
        allowed = ", ".join(map(str, DEPTHS))
        raise UserError(f"{settings.name}.depth is {shown(depth)}; allowed: {allowed}")
    for key, allowed in _RESNET.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{settings.name}.{key} is {shown(settings.get(key))}, only {allowed[0]} is"
            )
    norm_eval = settings.flag("norm_eval", False)
    backbone = getattr(models, f"resnet{depth}")(weights=None)
    dim = backbone.fc.in_features
    backbone.fc = nn.Identity()  # what is left ends with the pooled feature
    names = models.get_model_weights(f"resnet{depth}")
    urls = {member.name: member.url for member in names}

    def find(name: str) -> Path | None:
        return hub.fetched_weights(urls[name], _torch_cache()) if name in urls else None

    return Encoder(backbone, dim, norm_eval=norm_eval), find


def _open_clip(settings: Section) -> tuple[Encoder, Find]:
    """An image tower, random; where open_clip keeps the weights of its tags."""
    import open_clip
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    name = str(settings.text("model_name", None))
    known = open_clip.list_models()
    if name not in known:
        raise UserError(
            f"{settings.name}.model_name is {shown(name)}, which open_clip does not have"
            f"{did_you_mean(name, known)}"
        )
    config: dict[str, Any] = open_clip.get_model_config(name) or {}
    vision, dim = CLIPVisionCfg(**config["vision_cfg"]), int(config["embed_dim"])
    # the image tower alone: a text tower may want files from the Hub
    tower = _build_vision_tower(dim, vision, quick_gelu=bool(config.get("quick_gelu")))
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size

    def find(tag: str) -> Path | None:
        found = open_clip.get_pretrained_cfg(name, tag)
        if found and bool(found.get("quick_gelu")) != bool(config.get("quick_gelu")):
            raise UserError(
                f"the weights {tag} need QuickGELU {'on' if found.get('quick_gelu') else 'off'}: "
                f"{settings.name}.model_name with or without -quickgelu"
            )
        return hub.clip_weights(found) if found else None

    return Encoder(tower, dim, image_size=(height, width)), find


def _load(backbone: nn.Module, init_cfg: Section, cwd: Path, find: Find) -> None:
    """Fill `backbone` as `init_cfg` says. find: the file of a name, None for what is no name."""
    init_cfg.one_of("type", ("Pretrained",))
    prefix, name = init_cfg.text("prefix", None), init_cfg.text("checkpoint", None)
    init_cfg.get("map_location")
    init_cfg.refuse_rest()
    if not name:
        raise UserError(f"{init_cfg.name}.checkpoint is missing: a weight file's path or name")
    try:
        path = find(name) or _place_of(name, cwd)
    except hub.NoWeightsError as error:
        raise UserError(_missing(name, str(error), init_cfg.name)) from None
    if not path.exists():
        raise UserError(_missing(name, f"looked for {path}", init_cfg.name))
    fill_backbone(backbone, weights.read(path), path, prefix)
    log.info("the encoder starts from %s", path)


def _missing(name: str, reason: str, section: str) -> str:
    return (
        f"the encoder's weights {name} are missing ({reason}): put the file there, name another "
        f"with --cfg-options {section}.checkpoint=PATH, or begin with random ones by --init random"
    )


def _place_of(name: str, cwd: Path) -> Path:
    """The file of a path or, of an address, in torch's cache."""
    if name.startswith(("http://", "https://")):
        return hub.fetched_weights(name, _torch_cache())
    return cwd / Path(name).expanduser()


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
