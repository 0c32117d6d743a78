"""What learns, and its losses: over pairs, over labels, over hidden parts of sounds.

Pairs: rows i of `one` and `other` belong together, every other row of the global batch is a
negative. The features have unit norm; `scale` is the inverse temperature, the model's own and
learnable. Legend: b rows of this process, W processes, D width, C classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from multimodal.datasets import Batch, Task
from multimodal.model import FRAMES_A_TOKEN, MEL_BINS, MultimodalModel
from multimodal.training.grad_cache import Outputs
from shared.distributed import World, gather_with_grad


def info_nce(
    one: Tensor, other: Tensor, scale: Tensor, world: World, *, local: bool = False
) -> Tensor:
    """The mean cross-entropy of finding each row's partner among W·b, both ways; a scalar.

    one, other: (b, D). With `local` each process scores its own rows against all (b × W·b scores
    in place of W·b × W·b); averaged over the processes, value and gradients are the same.
    ln(W·b) is the value at chance. Source: Radford et al. 2021 (arXiv:2103.00020), figure 3.
    """
    all_one, all_other = gather_with_grad(one, world), gather_with_grad(other, world)
    if local:
        forth, back = scale * one @ all_other.T, scale * other @ all_one.T
        truth = world.rank * len(one) + torch.arange(len(one), device=one.device)
    else:
        forth = scale * all_one @ all_other.T
        back = forth.T
        truth = torch.arange(len(all_one), device=one.device)
    return (functional.cross_entropy(forth, truth) + functional.cross_entropy(back, truth)) / 2


def sigmoid(one: Tensor, other: Tensor, scale: Tensor, bias: Tensor, world: World) -> Tensor:
    """Every pair of the global batch judged alone: partners or not; summed, over W·b; a scalar.

    Each process judges its own rows of `one` with all of `other`; the mean over the processes is
    the loss of the whole batch. Source: Zhai et al. 2023 (arXiv:2303.15343), algorithm 1.
    """
    scores = scale * one @ gather_with_grad(other, world).T + bias
    partners = torch.full_like(scores, -1.0)
    partners[:, world.rank * len(one) : (world.rank + 1) * len(one)].fill_diagonal_(1.0)
    return -functional.logsigmoid(partners * scores).sum() / len(one)


def multi_label(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the classes and averaged over rows; a scalar.

    logits: (b, C). labels: (b, C), 1 where a class is there. A mean over 80 classes, most of which
    are absent, would leave gradients so small that Adam's epsilon stifles them.
    """
    exact = logits.float() if logits.dtype.itemsize < 4 else logits
    each = functional.binary_cross_entropy_with_logits(
        exact, labels.to(exact.dtype), reduction="none"
    )
    return each.sum(dim=1).mean()


# --- what learns ----------------------------------------------------------------------------------

INPUTS = {
    "image": ("images",),
    "text": ("input_ids", "attention_mask"),
    "audio": ("audio", "audio_mask"),
    "audio_2": ("audio_2", "audio_mask_2"),  # another sound of the same voice
}
_RARE = -3.0  # first bias of labels: 3 of 80 are there, as in COCO


@dataclass(frozen=True)
class LossOptions:
    """How losses are taken."""

    kind: Literal["infonce", "sigmoid"] = "infonce"
    local: bool = False
    label_weight: float = 0.2  # of the labels' loss beside a contrastive one


def _tower(view: str) -> str:
    return view.removesuffix("_2")


class Learner(nn.Module):
    """The model and what training needs beside it."""

    def __init__(
        self,
        model: MultimodalModel,
        num_keywords: int,
        kind: str = "infonce",
        *,
        fills_in: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.kind = kind
        width = model.classifier.in_features
        self.keyword_head = nn.Linear(width, num_keywords) if num_keywords else nn.Identity()
        sound = nn.Linear(model.size.audio.width, FRAMES_A_TOKEN * MEL_BINS)
        self.mel_head = sound if fills_in else nn.Identity()
        for head in (model.classifier, self.keyword_head):
            if isinstance(head, nn.Linear):
                nn.init.constant_(head.bias, _RARE)
        if kind == "sigmoid":  # where the sigmoid loss begins: most pairs are none
            for scale in model.logit_scale.values():
                nn.init.constant_(scale, math.log(10.0))
            for bias in model.logit_bias.values():
                nn.init.constant_(bias, -10.0)

    def forward(self, batch: Batch, task: Task) -> Outputs:
        """The outputs that `task`'s loss uses: features, scale, bias, logits, keywords, errors."""
        if task.target == "spectrogram":
            return {"errors": self._fill_in(**batch)}
        inputs = {name: batch[name] for one in task.modalities for name in INPUTS[one]}
        if task.target:
            found = self.model(**inputs, modality_mask=batch.get("modality_mask"))
        else:
            found = self._features(inputs, task)
        outputs: Outputs = {}
        if task.contrasts:
            names = [f"{one}_features" for one in task.modalities]
            outputs |= {name: found[name] for name in names}
            outputs["scale"] = self.model.logit_scale[task.pair].exp()
            if self.kind == "sigmoid":
                outputs["bias"] = self.model.logit_bias[task.pair] * 1.0
        if task.target == "classes":
            outputs["logits"] = found["logits"]
        elif task.target == "keywords":
            outputs["keywords"] = self.keyword_head(found["fused_features"])
        return outputs

    def _fill_in(self, audio: Tensor, audio_mask: Tensor, hidden: Tensor) -> Tensor:
        """(b,) the mean squared error of each sound's hidden frames, filled in from the others."""
        spare = hidden.shape[1] * FRAMES_A_TOKEN - audio.shape[1]
        frames = hidden.repeat_interleave(FRAMES_A_TOKEN, dim=1)
        whole = nn.functional.pad(audio, (0, 0, 0, spare))
        found = self.model.audio(
            whole.masked_fill(frames[:, :, None], 0.0), nn.functional.pad(audio_mask, (0, spare))
        )
        guessed = self.mel_head(found.tokens).float().unflatten(2, (FRAMES_A_TOKEN, MEL_BINS))
        squares = (guessed.flatten(1, 2) - whole).square().mean(dim=2)
        counted = frames & nn.functional.pad(audio_mask.bool(), (0, spare))
        return (squares * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)

    def _features(self, inputs: Batch, task: Task) -> Outputs:
        """The towers alone."""
        features = {}
        for one in task.modalities:
            tower = getattr(self.model, _tower(one))
            features[f"{one}_features"] = tower(*(inputs[name] for name in INPUTS[one])).features
        return features


def of_rows(task: Task, outputs: Outputs, labels: Tensor | None) -> dict[str, Tensor]:
    """The parts of the loss, as `loss_of` names them, for each row: (b,).

    A contrast is that of finding the partner among these rows, whatever the kind of the loss.
    """
    found: dict[str, Tensor] = {}
    if task.contrasts:
        one, other = (outputs[f"{name}_features"] for name in task.modalities)
        scores, truth = outputs["scale"] * one @ other.T, torch.arange(len(one), device=one.device)
        ways = [
            functional.cross_entropy(way, truth, reduction="none") for way in (scores, scores.T)
        ]
        found["contrast"] = (ways[0] + ways[1]) / 2
    if task.target == "spectrogram":
        found["spectrogram"] = outputs["errors"]
    elif task.target and labels is not None:
        logits = outputs["logits" if task.target == "classes" else "keywords"]
        rows = zip(logits, labels, strict=True)
        found[task.target] = torch.stack([multi_label(one[None], own[None]) for one, own in rows])
    return found


def loss_of(
    task: Task, outputs: Outputs, labels: Tensor | None, options: LossOptions, world: World
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a batch's outputs, a scalar, and its parts by name, without gradients.

    outputs: features (B, D) and logits (B, classes) of this process; labels: (B, classes).
    """
    parts: dict[str, Tensor] = {}
    if task.contrasts:
        one, other = (outputs[f"{name}_features"] for name in task.modalities)
        if options.kind == "sigmoid":
            parts["contrast"] = sigmoid(one, other, outputs["scale"], outputs["bias"], world)
        else:
            parts["contrast"] = info_nce(one, other, outputs["scale"], world, local=options.local)
    if task.target == "spectrogram":
        parts["spectrogram"] = outputs["errors"].mean()
    elif task.target and labels is not None:
        logits = outputs["logits" if task.target == "classes" else "keywords"]
        parts[task.target] = multi_label(logits, labels)
    weights = {"contrast": 1.0}
    weighted = [
        value * weights.get(name, options.label_weight if task.contrasts else 1.0)
        for name, value in parts.items()
    ]
    return torch.stack(weighted).sum(), {name: part.detach() for name, part in parts.items()}
