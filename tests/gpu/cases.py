"""The training step of four recipes on random weights and data: real shapes, or tiny ones.

Each maker gives a `Case`: the recipe's own model, optimizer and loss, the same loss written by
hand, and the words after which its entry script's --estimate speaks of this step. Nothing is read
from a disk or a network. A maker imports what its recipe needs, so that a missing package is
one recipe's ImportError.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.amp import Amp

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Case:
    """A recipe's step. `samples`: of one step. `script`: the module whose main has --estimate."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]  # the recipe's
    by_hand: Callable[[], Tensor]  # the same, as anybody would write it
    samples: int
    script: str
    words: list[str] = field(default_factory=list)
    clip_norm: float = float("inf")
    amp: str | None = None  # where one mode alone makes sense

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimizer changes."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, amp: Amp) -> Tensor:
        """One step of the recipe; its loss, detached."""
        with amp.autocast():
            loss = self.loss()
        amp.backward(loss)
        amp.step(self.optimizer, self.trained, clip_norm=self.clip_norm)
        return loss.detach()

    def step_by_hand(self, amp: str, scaler: torch.amp.GradScaler) -> Tensor:
        """One step of the loop that everyone writes first; amp: off, bf16 or fp16."""
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        device = self.trained[0].device.type
        with torch.autocast(device, dtype=dtype, enabled=amp != "off"):
            loss = self.by_hand()
        scaler.scale(loss).backward()
        scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trained, self.clip_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def face_distill(device: torch.device, folder: Path, *, tiny: bool) -> Case:
    """BLIP-2's ViT-g with 12 adapters, batch 32; tiny: 4 layers, batch 4."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    from face_distill.distill import losses
    from face_distill.distill.model import build_student

    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    small |= {"num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    # transformers' own 1e-10 makes all embeddings alike: their distances would be zero
    config = Blip2VisionConfig(initializer_range=0.02, **small if tiny else {})
    batch, layers, classes = (4, "spread:4", 50) if tiny else (32, "spread:12", 12_000)
    path = folder / "blip2"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    with device:
        tower = Blip2VisionModel(config).requires_grad_(False).eval()
        student = build_student(tower, layers, classes, scale=64.0, margin=0.5)
        images = torch.randn(batch, 3, config.image_size, config.image_size)
        labels = torch.arange(batch) % classes
        embeddings, maps = torch.randn(batch, 512), torch.rand(batch, 49).softmax(1)
    student = student.to(device)
    weights = {"ArcFace": 1.0, "AT": 1.0, "RKD": 1.0}
    mode = losses.at_mode_for("auto", "probability")
    criterion = losses.Distillation(weights, mode, "offdiag", 0.0)

    def loss() -> Tensor:
        wanted = (embeddings, maps, "probability")
        return criterion.total(criterion.terms(student(images, labels), wanted))

    def by_hand() -> Tensor:
        own, tokens, arc = student(images, labels)
        with torch.autocast(device.type, enabled=False):
            apart = torch.cdist(own.float(), own.float())
            wanted = torch.cdist(embeddings, embeddings)
            off = ~torch.eye(batch, dtype=torch.bool, device=device)
            relations = functional.smooth_l1_loss(
                apart / apart[off].mean(), wanted / wanted[off].mean()
            )
            attention = losses.attention_transfer(tokens.float(), maps, mode, "probability")
        return arc + attention + relations

    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    words = ["--blip-path", str(path), "--batch-size", str(batch), "--adapter-layers", layers]
    words += ["--num-classes", str(classes)]
    return Case("face_distill", student, optimizer, loss, by_hand, batch,
                "face_distill.train_distill", words)  # fmt: skip


def lavic(device: torch.device, folder: Path, *, tiny: bool) -> Case:
    """LLaVA-v1.6's vision tower, the language model cut to two layers; tiny: a small model."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    from lavic.src.vision import model as parts
    from lavic.src.vision.adapters import adapter_parameters, add_adapter
    from lavic.src.vision.caption_loss import FixedStart, caption_nll
    from tests.benchmarks.lavic_step import plain_loss

    path = ROOT / "lavic" / "src" / "vision" / "llava_v16_mistral_7b.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["text_config"]["num_hidden_layers"] = 2
    if tiny:
        settings["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128}
        settings["vision_config"] |= {"num_hidden_layers": 3, "num_attention_heads": 4}
        settings["vision_config"] |= {"image_size": 56, "projection_dim": 64}
        settings["text_config"] |= {"hidden_size": 64, "intermediate_size": 128}
        settings["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        settings["text_config"] |= {"vocab_size": 1000, "head_dim": 16}
        settings["image_token_index"] = 999
    (folder / "llava").mkdir(exist_ok=True)
    (folder / "llava" / "config.json").write_text(json.dumps(settings))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config: Any = LlavaNextConfig(**settings)
    with device:
        base: Any = LlavaNextForConditionalGeneration(config)
    base.requires_grad_(False).eval().to(dtype)
    llava = add_adapter(base, parts.VISION_TARGETS, dropout=0.0).to(device)
    parts.train_vision(llava)
    batch = _product(config.vision_config.image_size).to(device)
    start, items = FixedStart(llava, [0] * 85), list(range(1, 6))

    def loss() -> Tensor:
        return caption_nll(llava, batch, items, start) / batch.num_labels

    def by_hand() -> Tensor:
        views = batch._replace(views=batch.views.to(dtype))
        return plain_loss(llava, views, items) / batch.num_labels

    optimizer = torch.optim.AdamW(adapter_parameters(llava).values(), lr=5e-5)
    words = ["--model_name", str(folder / "llava"), "--batch_size", "1", "--grad-accum", "1"]
    words += ["--gradient-checkpointing", "off", "--lora_dropout", "0.0"]
    words += ["--dtype", "bfloat16" if device.type == "cuda" else "float32"]
    return Case("lavic, stage 1", llava, optimizer, loss, by_hand, 1,
                "lavic.src.knowledge_distillation", words, clip_norm=1.0, amp="off")  # fmt: skip


def _product(side: int) -> Any:
    """One product of five views, with as many tokens as the real ones."""
    from lavic.src.vision.captions import NO_LABEL, Batch

    asked = [*[0] * 120, *range(1, 6), *[0] * 4]
    tokens = torch.tensor([[*asked, *[7] * 115]])
    labels = torch.tensor([[*[NO_LABEL] * len(asked), *[7] * 115]])
    views = torch.randn(5, 3, side, side)
    return Batch(tokens, torch.ones_like(tokens), labels, views, torch.tensor([5]), 120, True, 115)


def arcface(device: torch.device, folder: Path, *, tiny: bool) -> Case:
    """ResNet-50 on 32 pictures of 448 x 448; tiny: the demo's ResNet-18 on 4 pictures."""
    from arcface.inshop_retrieval.config import read_config
    from arcface.inshop_retrieval.encoders import build_encoder
    from arcface.inshop_retrieval.pipeline import build_pipeline
    from arcface.inshop_retrieval.recipe import Overrides, without_data
    from arcface.inshop_retrieval.schedule import build_optimizers
    from arcface.run_scripts.run_arcface import build_head
    from shared.distributed import World

    name = "resnet18-arcface_demo.py" if tiny else "resnet50-arcface_8xb32_inshop.py"
    file = ROOT / "arcface" / "config" / "arcface" / name
    batch = 4 if tiny else 32
    option = f"train_dataloader.batch_size={batch}"
    recipe = without_data(read_config(file), Overrides((option,)), folder).recipe
    pipeline = build_pipeline(recipe.train.pipeline)
    margin, scale = float(recipe.margins), recipe.scale
    world = World(device=device)
    with device:
        encoder = build_encoder(recipe.encoder, "random")
        pictures = torch.randn(batch, 3, pipeline.height, pipeline.width)
        labels = torch.arange(batch) % recipe.num_classes
    encoder = encoder.to(device).to(memory_format=torch.channels_last)
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    head = build_head(recipe, torch.tensor(margin), world, seed=0)
    both = nn.ModuleList([encoder, head]).train()
    optimizer, _ = build_optimizers(recipe, encoder.backbone, head, recipe.lr_for(batch))

    def by_hand() -> Tensor:
        embeddings = encoder(pictures)
        with torch.autocast(device.type, enabled=False):
            rows = functional.normalize(embeddings.float())
            cosines = rows @ functional.normalize(head.weight).T
            own = cosines.gather(1, labels[:, None])
            angle = own.clamp(-1 + 1e-7, 1 - 1e-7).acos() + margin
            return functional.cross_entropy(
                scale * cosines.scatter(1, labels[:, None], angle.cos()), labels
            )

    words = ["--config", str(file), "--cfg-options", option]
    return Case("arcface", both, optimizer, lambda: head(encoder(pictures), labels), by_hand, batch,
                "arcface.run_scripts.run_arcface", words)  # fmt: skip


def multimodal(device: torch.device, folder: Path, *, tiny: bool) -> Case:
    """The base model on 8 pairs of picture and text in the last stage; tiny: the nano model."""
    del folder
    from multimodal.datasets import Task
    from multimodal.model import CONTEXT, SIZES, create_model
    from multimodal.training import schedule
    from multimodal.training.losses import Learner, LossOptions, loss_of
    from shared.distributed import World

    size, batch, num_labels = ("nano" if tiny else "base"), 8, 80
    side = SIZES[size].image_size
    with device:
        learner = Learner(create_model(size, num_classes=num_labels), num_labels, "infonce")
        inputs = {
            "images": torch.randn(batch, 3, side, side),
            "input_ids": torch.randint(1, 40_000, (batch, CONTEXT)),
            "attention_mask": torch.ones(batch, CONTEXT, dtype=torch.bool),
            "modality_mask": torch.ones(batch, 3, dtype=torch.bool),
        }
        labels = (torch.rand(batch, num_labels) < 0.04).float()
    learner = learner.to(device)
    task, options = Task("coco", ("image", "text"), True, "classes"), LossOptions()

    def loss() -> Tensor:
        return loss_of(task, learner(inputs, task), labels, options, World(device=device))[0]

    def by_hand() -> Tensor:
        found = learner(inputs, task)
        scores = found["scale"] * found["image_features"] @ found["text_features"].T
        truth = torch.arange(batch, device=device)
        both_ways = [functional.cross_entropy(one, truth) for one in (scores, scores.T)]
        named = functional.binary_cross_entropy_with_logits(found["logits"], labels)
        return (both_ways[0] + both_ways[1]) / 2 + options.label_weight * num_labels * named

    optimizer = schedule.optimizer_for(learner, 1e-4, 0.1)
    words = ["--model-size", size, "--batch-size", str(batch), "--datasets", "coco"]
    words += ["--gradient-accumulation-steps", "1", "--amp", "off", "--no-use-amp"]
    return Case("multimodal", learner, optimizer, loss, by_hand, batch,
                "multimodal.run_training", words, clip_norm=1.0)  # fmt: skip


MAKERS: dict[str, Callable[..., Case]] = {
    "face_distill": face_distill,
    "lavic": lavic,
    "arcface": arcface,
    "multimodal": multimodal,
}
