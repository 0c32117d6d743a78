"""One step of lavic's stage 1: as plain loops do it, and with its shortcuts, at equal loss.

    python tests/benchmarks/lavic_step.py --repeats 7

Plain: every prompt run as a whole with gradients, logits at every place, the tower's last layer for
all tokens. Ours: the prompts' common start kept, logits where something is said, the last layer for
the CLS row. Two more sides have a picture of three views: the plain one fills them up to five with
zeros, as a batch's processor does. The model has about the proportions of LLaVA-v1.6-Mistral-7B
(tower to language model, prompt to description) at a size for one core. Batch size 1; forward and
backward pass; times are of the processor. Losses and gradients of both sides are compared before
anything is timed.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from lavic.src.vision.adapters import adapter_parameters, add_adapter
from lavic.src.vision.caption_loss import FixedStart, caption_nll
from lavic.src.vision.captions import NO_LABEL, Batch
from lavic.src.vision.model import VISION_TARGETS, core_of, filled_slots, head_of
from tests.benchmarks.measure import compare, conclude, in_turn

FIXED, TITLE, MARK, ANSWER = 95, 25, 4, 115  # tokens of the real prompts and descriptions
SIDE, PATCH, VOCABULARY = 84, 14, 1000
ITEM_IDS = list(range(VOCABULARY - 5, VOCABULARY))


def make_model() -> Any:
    torch.manual_seed(0)
    settings = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=320, intermediate_size=1280, num_hidden_layers=16, num_attention_heads=5,
            image_size=SIDE, patch_size=PATCH, projection_dim=320,
        ),
        text_config=MistralConfig(
            vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2688, num_hidden_layers=4,
            num_attention_heads=12, num_key_value_heads=3, sliding_window=None,
        ),
        image_token_index=1,
    )  # fmt: skip
    base = LlavaNextForConditionalGeneration(settings).requires_grad_(False).eval()
    model = add_adapter(base, VISION_TARGETS, dropout=0.0)
    for parameter in adapter_parameters(model).values():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def make_batch(num_views: int, *, zeros: bool = False) -> Batch:
    """One sample; zeros: with the views up to five that a batch's processor would fill in."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(10, VOCABULARY - 10, (FIXED + TITLE + MARK + ANSWER,), generator=generator)
    head = FIXED + TITLE
    tokens = torch.cat([text[:head], torch.tensor(ITEM_IDS), text[head:]])[None]
    labels = torch.full_like(tokens, NO_LABEL)
    labels[:, -ANSWER:] = tokens[:, -ANSWER:]
    views = torch.randn(num_views, 3, SIDE, SIDE, generator=generator)
    if zeros:
        views = torch.cat([views, torch.zeros(5 - num_views, 3, SIDE, SIDE)])
    counts = torch.tensor([num_views])
    return Batch(tokens, torch.ones_like(tokens), labels, views, counts, head, True, ANSWER)


def plain_loss(model: Any, batch: Batch, items: Sequence[int] = ITEM_IDS) -> Tensor:
    """The loss the plain way; vectors of views that fill no slot are computed and left."""
    core = core_of(model)
    cls = core.vision_tower(batch.views).last_hidden_state[:, 0]
    vectors = core.multi_modal_projector(cls)[: int(batch.num_views)]
    embeds = core.language_model.embed_tokens(batch.tokens)
    filled = filled_slots(batch.tokens, list(items), batch.num_views)
    embeds = embeds.masked_scatter(filled.unsqueeze(-1), vectors)
    hidden = core.language_model(
        inputs_embeds=embeds, attention_mask=batch.mask, use_cache=False
    ).last_hidden_state
    logits = head_of(model)(hidden).float()[:, :-1].flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch.labels[:, 1:].flatten(), reduction="sum")


def gradients(model: Any, loss: Tensor) -> Tensor:
    trained = list(adapter_parameters(model).values())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def agreement(model: Any, plain: Tensor, ours: Tensor) -> dict[str, float]:
    """Relative differences of loss and gradients. Raises SystemExit above 1e-5."""
    first, second = gradients(model, plain), gradients(model, ours)
    found = {
        "loss": abs(float(plain.detach() - ours.detach())) / abs(float(plain.detach())),
        "gradients": float((first - second).norm() / first.norm()),
    }
    if max(found.values()) > 1e-5:
        raise SystemExit(f"the two sides are not equal: {found}")
    return found


def timed(model: Any, loss: Callable[[], Tensor], steps: int) -> Callable[[], float]:
    """Milliseconds of processor time a step."""

    def side() -> float:
        begin = time.process_time()
        for _ in range(steps):
            gradients(model, loss())
        return 1000 * (time.process_time() - begin) / steps

    return side


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model()
    five, three, padded = make_batch(5), make_batch(3), make_batch(3, zeros=True)
    start = FixedStart(model, five.tokens[0, :FIXED].tolist())

    def ours(batch: Batch) -> Tensor:
        return caption_nll(model, batch, ITEM_IDS, start)

    equal = {
        "5 views": agreement(model, plain_loss(model, five), ours(five)),
        "3 views": agreement(model, plain_loss(model, padded), ours(three)),
    }
    sides = {
        "plain, 5 views": timed(model, lambda: plain_loss(model, five), args.steps),
        "ours, 5 views": timed(model, lambda: ours(five), args.steps),
        "plain, 3 views and zeros": timed(model, lambda: plain_loss(model, padded), args.steps),
        "ours, 3 views": timed(model, lambda: ours(three), args.steps),
    }
    figures = in_turn(sides, args.repeats)
    found = compare("stage 1, one step", "ms", figures, "plain, 5 views")
    faster = {
        name: round(found[f"plain, {plain}"]["median"] / found[f"ours, {name}"]["median"], 3)
        for name, plain in (("5 views", "5 views"), ("3 views", "3 views and zeros"))
    }
    print(f"  times as fast: {faster}; relative differences: {equal}")
    conclude("lavic_step", "ms", sides=found, times_as_fast=faster, differences=equal)


if __name__ == "__main__":
    main()
