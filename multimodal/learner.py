"""What learns: the model, a head for the keywords of sounds, and the tasks that each stage sets.

A task names the modalities that a batch brings, whether they are to find each other, and which
labels they are to predict from the fused features; or it has sounds filled in where parts of them
were hidden. A learner's outputs for a task are those that
its loss uses, and no others: DDP waits for the gradient of everything it finds behind them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from multimodal import losses
from multimodal.grad_cache import Outputs
from multimodal.model import FRAMES_A_TOKEN, MEL_BINS, MODALITIES, MultimodalModel
from shared.distributed import World

INPUTS = {
    "image": ("images",),
    "text": ("input_ids", "attention_mask"),
    "audio": ("audio", "audio_mask"),
    "audio_2": ("audio_2", "audio_mask_2"),  # another sound of the same voice
}
_HIDDEN = 0.8  # share of a sound
_RARE = -3.0  # first bias of labels: 3 of 80 are there, as in COCO
Batch = dict[str, Tensor]
Target = Literal["classes", "keywords", "spectrogram"]


@dataclass(frozen=True)
class Task:
    """What one kind of batch is for."""

    name: str  # in charts and reports
    modalities: tuple[str, ...]  # one, or two in the order of a name in PAIRS
    contrasts: bool  # the two modalities of a pair find each other
    target: Target | None = None  # labels to predict, or the hidden parts of a sound

    @property
    def pair(self) -> str:
        """Whose temperature it uses."""
        return "_".join(_tower(name) for name in self.modalities)


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
            parts["contrast"] = losses.sigmoid(one, other, outputs["scale"], outputs["bias"], world)
        else:
            parts["contrast"] = losses.info_nce(
                one, other, outputs["scale"], world, local=options.local
            )
    if task.target == "spectrogram":
        parts["spectrogram"] = outputs["errors"].mean()
    elif task.target and labels is not None:
        logits = outputs["logits" if task.target == "classes" else "keywords"]
        parts[task.target] = losses.multi_label(logits, labels)
    weights = {"contrast": 1.0}
    weighted = [
        value * weights.get(name, options.label_weight if task.contrasts else 1.0)
        for name, value in parts.items()
    ]
    return torch.stack(weighted).sum(), {name: part.detach() for name, part in parts.items()}


def modality_dropout(
    task: Task, rows: int, world: World, generator: torch.Generator, share: float
) -> Tensor:
    """(rows, 3) bool: the modalities that each sample of this process shows to the fusion.

    Of `share` of the samples one of the two is left out, either with the same chance. Drawn for all
    processes at once, so that the global batch is the same whoever holds which part.
    """
    shown = torch.tensor([name in task.modalities for name in MODALITIES])
    drawn = torch.rand(world.size * rows, 2, generator=generator)
    own = drawn[world.rank * rows : (world.rank + 1) * rows]
    mask = shown.repeat(rows, 1)
    if len(task.modalities) == 2:
        columns = torch.tensor([MODALITIES.index(name) for name in task.modalities])
        leaves = own[:, 0] < share
        which = columns[(own[:, 1] < 0.5).long()]
        mask[leaves.nonzero().flatten(), which[leaves]] = False
    return mask


def hidden_parts(rows: int, tokens: int, world: World, generator: torch.Generator) -> Tensor:
    """(rows, tokens) bool: the parts of each sound of this process that it does not get to hear.

    4 of 5, as in AudioMAE (Huang et al. 2022, arXiv:2207.06405); drawn for all processes at once.
    """
    drawn = torch.rand(world.size * rows, tokens, generator=generator)
    return drawn[world.rank * rows : (world.rank + 1) * rows] < _HIDDEN
