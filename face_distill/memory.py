"""--estimate and --fit: the memory of one step of the distillation, its tensors without values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from face_distill.distill import losses, model
from shared import fit, memory
from shared.amp import Amp
from shared.files import read_json

if TYPE_CHECKING:
    from transformers import Blip2VisionConfig

    from face_distill.train_distill import Config

_IMAGES = 12_000  # of teacher_features_12k: no more identities than images


def text(cfg: Config, processes: int) -> str:
    """The table for one of `processes`, whether it fits on the GPUs here, and what saves most."""
    others = {name: plan(other, processes) for name, other in _smaller(cfg, processes).items()}
    exact = next((name for name in others if name.startswith("--micro-batch")), "")
    return memory.report(plan(cfg, processes), others, exact)


def fitted(cfg: Config, processes: int) -> Config:
    """`cfg` with the pieces and the checkpointing that --fit has room for. Raises UserError."""
    ways = [
        {"gradient_checkpointing": again, "micro_batch": piece}
        for again in (False, True)
        for piece in fit.halves(cfg.batch_size // processes)
    ]
    tried = ((other, plan(other, processes)) for other in fit.variants(cfg, ways))
    return fit.first(cfg, tried, "--amp auto, --image-size 112, a smaller --batch-size")


def plan(cfg: Config, processes: int) -> memory.Plan:
    """What one of `processes` holds at the peak of a step."""
    batch = max(2, cfg.batch_size // processes)
    kind = "features" if cfg.at_mode == "zagoruyko" else "probability"
    criterion = losses.Distillation(
        {"ArcFace": 1.0, "AT": 1.0, "RKD": 1.0}, losses.at_mode_for(cfg.at_mode, kind),
        cfg.rkd_norm, cfg.rkd_angle_weight,
    )  # fmt: skip
    with memory.counted() as live:
        student = _student(cfg)
        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay)
        amp = Amp(memory.mode_of(cfg.run.amp), memory.CPU)
        images, labels, embeddings, maps = _faces(batch, student.image_size, kind)
        _pass_over_equal_pieces(student, images)
        live.begin(student, optimizer)
        with amp.autocast():
            terms = criterion.terms(student(images, labels), (embeddings, maps, kind))
        amp.backward(criterion.total(terms))
        amp.step(optimizer, trained, clip_norm=cfg.largest_norm)
    size, recomputed = student.image_size, ", recomputed" * cfg.gradient_checkpointing
    at_a_time = f", {cfg.micro_batch} at a time" if cfg.micro_batch else ""
    what = f"{batch} images a process of {size} x {size}{at_a_time}"
    title = f"face_distill: {what}, {cfg.adapter_layers}, amp {cfg.run.amp}"
    return live.plan(
        title,
        f"images and all that is kept of them{recomputed}",
        wrapped=student,
        processes=processes,
    )


def _student(cfg: Config) -> model.FaceStudent:
    from transformers import Blip2VisionModel

    tower = Blip2VisionModel(_vision(cfg)).eval()
    classes = _IMAGES if cfg.num_classes == "auto" else int(cfg.num_classes)
    return model.build_student(
        tower, cfg.adapter_layers, classes, scale=cfg.arc_scale, margin=cfg.arc_margin,
        image_size=cfg.image_size, checkpointing=cfg.gradient_checkpointing,
        micro_batch=cfg.micro_batch,
    )  # fmt: skip


def _pass_over_equal_pieces(student: model.FaceStudent, images: Tensor) -> None:
    """Have the first piece and the last computed alone: those between take what the first takes."""
    encode, like = student._tokens, dict[str, Any]()
    *before, _ = images.split(student.micro_batch or len(images))
    between = {piece.storage_offset() for piece in before[1:]}

    def tokens(images: Tensor) -> Tensor:
        if images.storage_offset() in between:
            return torch.empty(**like)
        found = encode(images)
        like.update(size=found.shape, dtype=found.dtype)
        return found

    student._tokens = tokens


def _vision(cfg: Config) -> Blip2VisionConfig:
    """The tower's settings; without a file transformers' own, those of download_weight.py's."""
    from transformers import Blip2VisionConfig

    written: Any = read_json(Path(cfg.blip_path) / "config.json")
    found = written.get("vision_config", written) if isinstance(written, dict) else {}
    return Blip2VisionConfig.from_dict(found)


def _faces(batch: int, size: int, kind: str) -> tuple[Tensor, ...]:
    """A batch: images, labels, the teacher's embeddings and maps."""
    maps = (batch, 512, 7, 7) if kind == "features" else (batch, 49)
    labels = torch.zeros(batch, dtype=torch.long)
    return torch.empty(batch, 3, size, size), labels, torch.empty(batch, 512), torch.empty(maps)


def _smaller(cfg: Config, processes: int) -> dict[str, Config]:
    """Settings that may save memory, as they would be typed."""
    others: dict[str, Config] = {}
    piece = max(cfg.batch_size // processes // 4, 1)
    if piece < (cfg.micro_batch or cfg.batch_size // processes):  # changes no number: comes first
        others[f"--micro-batch {piece}"] = replace(cfg, micro_batch=piece)
    half = cfg.batch_size // 2
    if half >= 2 * processes:
        others[f"--batch-size {half}"] = replace(cfg, batch_size=half)
    if not cfg.gradient_checkpointing:
        others["--gradient-checkpointing"] = replace(cfg, gradient_checkpointing=True)
    if cfg.run.amp == "off":
        others["--amp bf16"] = replace(cfg, run=replace(cfg.run, amp="bf16"))
    if cfg.adapter_layers.startswith("spread:"):
        last = "last:" + cfg.adapter_layers.partition(":")[2]
        others[f"--adapter-layers {last}"] = replace(cfg, adapter_layers=last)
    patch = _vision(cfg).patch_size
    if cfg.image_size is None and isinstance(patch, int) and 112 % patch == 0:
        others["--image-size 112"] = replace(cfg, image_size=112)
    return others
