"""The student: BLIP-2's frozen vision tower with small trainable adapters beside its MLPs.

B batch, S image side in pixels, L tokens, D width of the tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed

from face_distill.distill.images import Preprocess
from face_distill.distill.losses import ArcFaceHead
from face_distill.distill.student_files import adapter_shape, read_trained, settings_of
from shared import weights
from shared.amp import Amp
from shared.errors import UserError, one_line
from shared.files import read_json

if TYPE_CHECKING:  # importing transformers' models takes seconds; only load_tower needs them
    from transformers import Blip2VisionConfig, Blip2VisionModel

TOWER_PREFIX = "vision_model."  # the tower's name inside a whole BLIP-2 checkpoint
BOTTLENECK_DIVISOR = 4  # width of the tower over width of an adapter
INITIAL_SCALE = 0.1


def load_tower(path: Path) -> Blip2VisionModel:
    """BLIP-2's vision tower from a checkpoint directory: float32, on the CPU, frozen, in eval mode.

    path: a directory with config.json (of the whole BLIP-2 or of the tower alone) and the weights;
    of a sharded checkpoint only the shards that hold the tower are opened.
    Every parameter comes from the files. The tower is built without memory of its own, so loading
    takes the size of the tower once.
    Raises UserError when a file is missing or damaged, or does not hold this tower.
    """
    from transformers import Blip2VisionModel

    config = _vision_config(path)
    with torch.device("meta"):
        tower = Blip2VisionModel(config)
    state = _tower_state(path)
    # Where names do not match, from_pretrained would only warn and leave the tower random.
    weights.load_strict(tower, state, source=path)
    return tower.requires_grad_(False).eval()


def _vision_config(path: Path) -> Blip2VisionConfig:
    """The tower's configuration out of `path`/config.json."""
    from transformers import Blip2VisionConfig

    file = path / "config.json"
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(
            f"{file} is missing or not JSON: {path} must be a BLIP-2 checkpoint directory; "
            "fetch it with download_weight.py or give its path"
        )
    vision = content.get("vision_config", content)
    if vision.get("model_type") != Blip2VisionConfig.model_type:
        raise UserError(
            f"{file} describes {content.get('model_type')!r}, not BLIP-2 (model_type 'blip-2' or "
            f"{Blip2VisionConfig.model_type!r}): give the directory that download_weight.py wrote"
        )
    try:
        return Blip2VisionConfig.from_dict(vision)
    except Exception as error:  # transformers' own and others: a value may be wrong in many ways
        raise UserError(f"{file} describes no vision tower: {one_line(error)}") from None


def _tower_state(path: Path) -> dict[str, Tensor]:
    """The tower's tensors, whether `path` holds a whole BLIP-2 or the tower alone."""
    if "vision_config" in (read_json(path / "config.json") or {}):
        return weights.read(path, TOWER_PREFIX)
    return {name.removeprefix(TOWER_PREFIX): t for name, t in weights.read(path).items()}


def adapter_layers(num_layers: int, spec: str) -> list[int]:
    """Indices of the layers that get an adapter, ascending.

    spec: `spread:N` spaces N layers evenly from the first to the last (12 of 39 layers are
    0 3 6 10 13 17 20 24 27 31 34 38); `last:N` takes the N layers nearest to the output.
    Raises UserError for another form, or for N outside 1 … num_layers.
    """
    kind, _, count = spec.partition(":")
    if kind not in ("spread", "last") or not count.isdecimal():
        raise UserError(
            f"adapter layers {spec!r}: expected spread:N or last:N, for example spread:12"
        )
    number = int(count)
    if not 1 <= number <= num_layers:
        raise UserError(
            f"adapter layers {spec!r}: N must be from 1 to {num_layers}, the layers of this tower"
        )
    if kind == "last":
        return list(range(num_layers - number, num_layers))
    return np.linspace(0, num_layers - 1, number, dtype=int).tolist()


class Adapter(nn.Module):
    """A bottleneck beside a frozen MLP: scale · up(GELU(down(x))).

    `up_proj` starts at zero, so a new adapter adds exactly nothing; `scale` is learned.
    Source: Chen et al. 2022, AdaptFormer, eq. 3 and 4 (arXiv:2205.13535), with GELU for ReLU.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, bottleneck)
        self.up_proj = nn.Linear(bottleneck, width)
        self.scale = nn.Parameter(torch.tensor(INITIAL_SCALE))
        nn.init.zeros_(self.up_proj.weight)
        nn.init.zeros_(self.up_proj.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """What to add to the MLP's output, (B, L, D); `hidden` is its input (B, L, D)."""
        return self.scale * self.up_proj(functional.gelu(self.down_proj(hidden)))


class MLPWithAdapter(nn.Module):
    """A frozen MLP and an adapter that read the same input; their outputs are added."""

    def __init__(self, original_mlp: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.original_mlp = original_mlp
        self.adapter = adapter

    def forward(self, hidden_states: Tensor) -> Tensor:
        """MLP plus adapter, (B, L, D) → (B, L, D)."""
        return self.original_mlp(hidden_states) + self.adapter(hidden_states)


class FaceStudent(nn.Module):
    """A frozen vision tower with adapters in `layers`, and the head that trains its embedding.

    The tower is changed in place. Names in the state dict: `vit.…` with
    `vit.encoder.layers.{i}.mlp.{original_mlp,adapter}.…`, and `head.…`.
    """

    def __init__(
        self,
        tower: Blip2VisionModel,
        layers: Sequence[int],
        head: nn.Module | None = None,
        *,
        bottleneck: int | None = None,
        image_size: int | None = None,
        checkpointing: bool = False,
        micro_batch: int | None = None,
    ) -> None:
        """Put the adapters in.

        head: the loss head; the embedding needs none, so leave it out for evaluation.
        bottleneck: width of an adapter; a quarter of the tower's width unless given.
        image_size: side of the images; another than the tower's own interpolates its position
            embedding (other tokens, another model input; 112 costs a quarter of 224).
        checkpointing: recompute each layer in the backward pass instead of storing it: about a
            third more time for a fraction of the memory, the same gradients.
        micro_batch: images that are computed at a time. Only a piece's output is kept, the loss
            sees the whole batch, and the backward pass computes the piece again (cached
            gradients): the memory of a piece, the gradients of the whole.
        Raises UserError for an image size that the tower's patches do not divide.
        """
        super().__init__()
        self.embedding_dim = int(tower.config.hidden_size)
        self.image_size = _checked_size(image_size, tower.config)
        self.checkpointing, self.micro_batch = checkpointing, micro_batch
        self.vit = tower.requires_grad_(False)
        self.head = head
        width = bottleneck or self.embedding_dim // BOTTLENECK_DIVISOR
        for index in layers:
            layer = self.vit.encoder.layers[index]
            layer.mlp = MLPWithAdapter(
                layer.get_submodule("mlp"), Adapter(self.embedding_dim, width)
            )
        if checkpointing:
            self.vit.gradient_checkpointing_enable()
        self.train()

    def forward(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        """Embeddings (B, D) and patch tokens (B, L, D) of normalised `images` (B, 3, S, S).

        With `labels` (B,) the head's mean loss comes third.

        The embedding is the class token after the last layer norm, not unit length; the tokens
        are the patches row by row. Raises ValueError when S is not the student's image size: the
        tower itself takes smaller images silently and gives them wrong positions.
        """
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"images must be (B, 3, {self.image_size}, {self.image_size}), got "
                f"{tuple(images.shape)}: resize them, or build the student with their image_size"
            )
        *before, last = images.split(self.micro_batch or len(images))
        outputs = [
            recomputed(self._tokens, piece, use_reentrant=False, preserve_rng_state=False)
            for piece in before
        ]
        # The last piece comes first in the backward pass: what it keeps is gone before the others.
        output = torch.cat([*outputs, self._tokens(last)])
        embeddings, tokens = output[:, 0], output[:, 1:]
        if labels is None:
            return embeddings, tokens
        assert self.head is not None
        return embeddings, tokens, self.head(embeddings, labels)

    def _tokens(self, images: Tensor) -> Tensor:
        """Class token and patch tokens after the last norm, (B, 1 + L, D)."""
        interpolate = self.image_size != self.vit.config.image_size
        return self.vit(images, interpolate_pos_encoding=interpolate).last_hidden_state

    def train(self, mode: bool = True) -> FaceStudent:
        """Set training mode for the head; the frozen tower stays in eval mode, without dropout."""
        super().train(mode)
        self.vit.eval()
        for layer in self.vit.encoder.layers:
            # transformers recomputes only layers that call themselves in training; the flag of the
            # layer alone turns no dropout on, that belongs to its parts.
            layer.training = mode and self.checkpointing
        return self


def _checked_size(image_size: int | None, config: Blip2VisionConfig) -> int:
    """The side of the images, the tower's own when None. Raises UserError for a part of a patch."""
    native, patch = config.image_size, config.patch_size
    if not (isinstance(native, int) and isinstance(patch, int)):
        raise UserError(
            f"the tower takes images of {native} in patches of {patch}: give a square one"
        )
    size = native if image_size is None else image_size
    if size < patch or size % patch:
        near = max(size // patch, 1) * patch
        raise UserError(
            f"image size {size}: must be a multiple of the tower's {patch}-pixel patches, "
            f"for example {near} or {near + patch}"
        )
    return size


def build_student(
    tower: Blip2VisionModel,
    layers: str,
    num_classes: int,
    *,
    scale: float,
    margin: float,
    image_size: int | None = None,
    checkpointing: bool = False,
    micro_batch: int | None = None,
) -> FaceStudent:
    """A student with its ArcFace head around `tower`, ready to train.

    layers: as for `adapter_layers`; the rest as for FaceStudent.
    """
    chosen = adapter_layers(len(tower.encoder.layers), layers)
    head = ArcFaceHead(tower.config.hidden_size, num_classes, scale, margin)
    return FaceStudent(
        tower, chosen, head,
        image_size=image_size, checkpointing=checkpointing, micro_batch=micro_batch,
    )  # fmt: skip


def adapters(student: FaceStudent) -> list[Tensor]:
    """What all terms of the loss train: the adapters, without the head."""
    named = student.vit.named_parameters()
    return [parameter for _, parameter in named if parameter.requires_grad]


def summary(student: FaceStudent) -> str:
    """Where the adapters are, and how much of the student trains."""
    layers = student.vit.encoder.layers
    chosen = [str(n) for n, layer in enumerate(layers) if isinstance(layer.mlp, MLPWithAdapter)]
    parameters = list(student.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad) / 1e6
    total = sum(p.numel() for p in parameters) / 1e6
    where = f"adapters in layers {' '.join(chosen)}"
    return f"{where} | {trained:.2f} M of {total:.1f} M parameters train"


def trainable_state(student: FaceStudent) -> dict[str, Tensor]:
    """Copies of what training changes (adapters and head) on the CPU, by name: tens of MB."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in student.named_parameters()
        if parameter.requires_grad
    }


def load_student(student: FaceStudent, path: Path) -> None:
    """Fill `student` from `path`: a trainable-only or a full checkpoint, every name of it.

    Names may carry the `module.` and `_orig_mod.` of a wrapped model. A student without a head
    passes over the checkpoint's. Raises UserError when names or shapes differ; the student is
    then untouched.
    """
    state = weights.strip_wrappers(weights.read(path))
    if student.head is None:
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    frozen = student.state_dict().keys() - trainable
    is_full = not frozen.isdisjoint(state)
    weights.load_strict(student, state, only=None if is_full else trainable, source=path)


class Trainable:
    """The trained part of a student, as a part of a checkpoint."""

    def __init__(self, student: FaceStudent) -> None:
        self._student = student

    def state_dict(self) -> dict[str, Tensor]:
        """Adapters and head, on the CPU."""
        return trainable_state(self._student)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put them back. Raises UserError when they do not fit."""
        weights.load_strict(self._student, state, only=self.state_dict().keys(), source="last.pth")


# --- a trained student out of its files -----------------------------------------------------------


def open_student(
    blip_path: Path, checkpoint: Path | None = None, *, image_size: int | None = None
) -> FaceStudent:
    """The student without its head, on the CPU, frozen; untrained without a `checkpoint`.

    checkpoint: adapters alone or the whole student, as training writes them; or an adapter that
    an earlier version exported.
    image_size: side of the input; by default that of the run, or else the tower's own.
    Raises UserError when a file is missing, damaged or of another tower.
    """
    if checkpoint is None:
        student = FaceStudent(load_tower(blip_path), [], image_size=image_size)
        return student.requires_grad_(False).eval()
    shape = adapter_shape(read_trained(checkpoint), checkpoint)
    tower = load_tower(blip_path)
    if shape.layers[-1] >= len(tower.encoder.layers):
        raise UserError(
            f"{checkpoint} has an adapter in layer {shape.layers[-1]}, the tower in {blip_path} "
            f"has {len(tower.encoder.layers)}: give the tower it was trained on (--blip-path)"
        )
    student = FaceStudent(
        tower,
        shape.layers,
        bottleneck=shape.bottleneck,
        image_size=image_size or stored_image_size(checkpoint),
    )
    load_student(student, checkpoint)
    return student.requires_grad_(False).eval()


def stored_image_size(checkpoint: Path) -> int | None:
    """The side of the input that the run or export beside `checkpoint` notes, if it notes one."""
    size = settings_of(checkpoint).get("image_size")
    if size is None or (type(size) is int and size > 0):
        return size
    raise UserError(f"the settings beside {checkpoint} give image_size {size!r}: expected a number")


class FaceEmbedder(nn.Module):
    """uint8 faces (B, 3, H, W) on any device → embeddings (B, D), float32, on `device`.

    Not unit length; wrap it in `verification.flip_embeddings` for the usual protocol.
    """

    def __init__(self, student: FaceStudent, device: torch.device, amp: str = "off") -> None:
        super().__init__()
        self.student = student.to(device).eval()
        self._preprocess = Preprocess(student.image_size).to(device)
        self._device, self._amp = device, Amp(amp, device)

    @torch.inference_mode()
    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        with self._amp.autocast():
            return self.student(self._preprocess(images.to(self._device)))[0].float()
