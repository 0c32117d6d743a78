"""The CLIP that filters score with: loaded whole or not at all, and with a name of its own.

B images, P texts, D dimensions.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from shared import hub, weights
from shared.errors import UserError, one_line
from shared.precision import Amp
from vasevqa.filter import clip_convert
from vasevqa.filter.clip_source import OPEN_CLIP_CONFIG, Source, looked_up

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Clip:
    """A CLIP on its device. `identity` changes with its weights and with how images reach it."""

    model: nn.Module
    tokenize: Callable[[list[str]], Tensor]
    prepare: Callable[[Image.Image], Tensor]  # a picture of any size → (3, S, S), normalised
    identity: str
    dim: int
    amp: Amp
    device: torch.device

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Prepared images (B, 3, S, S) → their embeddings (B, D), of unit length, on the CPU."""
        with torch.inference_mode(), self.amp.autocast():
            found = self.model.encode_image(pixels.to(self.device))  # type: ignore[operator]
        return normalize(found.float(), dim=-1).cpu()

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Texts → their embeddings (P, D), as the text tower gives them, on the CPU."""
        with torch.inference_mode():
            tokens = self.tokenize(list(texts)).to(self.device)
            return self.model.encode_text(tokens).float().cpu()  # type: ignore[operator]

    def prepare_tensor(self, image: Tensor) -> Tensor:
        """`prepare` for a decoded image, uint8 (3, H, W)."""
        return self.prepare(Image.fromarray(image.permute(1, 2, 0).numpy()))


def load(source: Source, device: torch.device, amp: str = "off") -> Clip:
    """The CLIP of `source`, ready to encode. Raises UserError when its weights cannot be had."""
    log.info("CLIP: %s", source)
    chatter = logging.root.manager.disable
    logging.disable(logging.INFO)  # open_clip tells the root logger of every step
    try:
        model, prepare_cfg = _OPENERS[source.kind](source)
    finally:
        logging.disable(chatter)
    model.requires_grad_(False).eval().to(device)
    precision = Amp(amp, device)
    made_of = {"weights": _hash_of(model), "prepare": asdict(prepare_cfg), "amp": precision.mode}
    return Clip(
        model,
        _tokenizer(source, model),
        image_transform_v2(prepare_cfg, is_train=False),  # type: ignore[arg-type]
        hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:24],
        int(model.visual.output_dim),  # type: ignore[arg-type, union-attr]
        precision,
        device,
    )


def _open_folder(source: Source) -> tuple[nn.Module, PreprocessCfg]:
    return _create(source, f"local-dir:{source.path}")


def _open_file(source: Source) -> tuple[nn.Module, PreprocessCfg]:
    weights.read(source.path)  # says in words what is wrong with the file
    return _create(source, source.arch, pretrained=str(source.path))


def _open_hub(source: Source) -> tuple[nn.Module, PreprocessCfg]:
    tag = open_clip.get_pretrained_cfg(source.arch, source.tag)
    if not tag:
        raise UserError(_why_not(source, f"open_clip knows no weights {source.tag} of it"))
    try:
        path = hub.clip_weights(tag, source.path)
    except hub.NoWeightsError as error:
        raise UserError(_why_not(source, one_line(error))) from None
    prepare = {key: tag[key] for key in asdict(PreprocessCfg()) if key in tag}
    return _create(source, source.arch, pretrained=str(path), force_preprocess_cfg=prepare)


def _create(source: Source, name: str, **options: Any) -> tuple[nn.Module, PreprocessCfg]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = open_clip.create_model(name, require_pretrained=True, **options)
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(_why_not(source, one_line(error))) from None
    return model, PreprocessCfg(**model.visual.preprocess_cfg)  # type: ignore[union-attr]


def _why_not(source: Source, reason: str) -> str:
    if source.kind != "hub":
        return f"no CLIP could be loaded from the {source}: {reason[:300]}"
    place = source.path
    return (
        f"no CLIP weights: looked for {looked_up(place, source.arch)}, which failed: {reason}; put "
        f"a CLIP into {place}, or type --model_cache_dir PATH"
    )


def _open_transformers(source: Source) -> tuple[nn.Module, PreprocessCfg]:
    model_cfg, prepare, state = clip_convert.read_folder(source.path)
    with torch.device("meta"):  # no random numbers for weights that come from the file
        model = open_clip.model.CLIP(**model_cfg)
    length = model_cfg["text_cfg"]["context_length"]
    model.attn_mask = torch.full((length, length), -torch.inf).triu_(1)  # which no file holds
    weights.load_strict(model, state, source=source.path)
    return model, PreprocessCfg(size=model_cfg["vision_cfg"]["image_size"], **prepare)


_OPENERS = {
    "open_clip": _open_folder,
    "transformers": _open_transformers,
    "file": _open_file,
    "hub": _open_hub,
}


def _tokenizer(source: Source, model: nn.Module) -> Callable[[list[str]], Tensor]:
    if source.kind == "transformers":  # the vocabulary that ships with open_clip is the same
        return open_clip.SimpleTokenizer(context_length=int(model.context_length))  # type: ignore
    name = f"local-dir:{source.path}" if source.kind == "open_clip" else source.arch
    chatter = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        return open_clip.get_tokenizer(name)
    finally:
        logging.disable(chatter)


def _hash_of(model: nn.Module) -> str:
    """A hash of every weight and buffer, its name and its shape."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def write_folder(model: nn.Module, folder: Path, cfg: dict[str, Any], mean: Any, std: Any) -> None:
    """Keep a model as a folder that open_clip (`local-dir:`) and `load` read."""
    from safetensors.torch import save

    from shared.files import write_atomic, write_json

    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    content = save(state)
    path = folder / "open_clip_model.safetensors"
    write_atomic(path, lambda stream: (stream.write(content), None)[1])
    write_json(
        folder / OPEN_CLIP_CONFIG,
        {"model_cfg": cfg, "preprocess_cfg": {"mean": list(mean), "std": list(std)}},
    )
