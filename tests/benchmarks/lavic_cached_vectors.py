"""How much faster stage 2 of lavic is with the pictures' vectors kept than with the tower run anew.

    python tests/benchmarks/lavic_cached_vectors.py [--repeats 7]

A model in the proportions of LLaVA-v1.6-Mistral-7B on a conversation of ten candidates with five
views each: there the tower takes 19 TFLOP for the 50 views, and the language model 23 for the
forward and backward pass of 820 tokens, 11 for the forward pass alone (from the sizes: 0.38 a view;
2 x 7.0 x 10^9 a token and direction). "kept" looks the vectors up, as prompt_tuning.py does;
"recomputed" takes the same step after the frozen tower has encoded the views. Processor time of a
training step and of a test's forward pass, the sides in turn, one thread; the losses are compared.
Decoding and cutting the pictures up, which recomputing needs as well, is timed apart: it does not
shrink with the model. The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root

import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
)

from lavic.src.recommend.item_vectors import ItemVectors
from lavic.src.recommend.model import LANGUAGE_TARGETS, Recommender
from lavic.src.recommend.prompts import IGNORED
from lavic.src.vision.adapters import adapter_parameters, add_adapter
from lavic.src.vision.model import cls_vectors, picture_views
from shared.images import decode_rgb
from tests.benchmarks.measure import compare, conclude, in_turn

CANDIDATES, VIEWS = 10, 5
TOKENS, ANSWER = 350, 10  # half of what they are there, as the views are smaller, too
FIRST_ITEM = 500  # token id


def main() -> None:
    """Print a table of milliseconds for training and for test, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench()
    found, speed_up = {}, {}
    for name, run in (("training step", bench.train), ("test, forward pass", bench.test)):
        figures = in_turn(
            {
                "kept": lambda run=run: run("kept", encode=False),
                "recomputed": lambda run=run: run("recomputed", encode=True),
            },
            options.repeats,
        )
        found[name] = compare(name, "ms", figures, "kept")
        speed_up[name] = found[name]["recomputed"]["ratio"]
    kept, again = bench.losses["kept"], bench.losses["recomputed"]
    extra = {
        "gflop": bench.operations(),
        "loss_difference": abs(kept - again) / kept,
        "preparing_ten_pictures_ms": round(preparing(), 1),
    }
    print(f"\ntimes as fast: {speed_up}; {extra}")
    conclude("lavic_cached_vectors", "ms", sides=found, speed_up=speed_up, **extra)


class Bench:
    """The model, one conversation, and both ways to come by the vectors."""

    def __init__(self) -> None:
        self.model = build()
        self.pictures = {f"B{n}": torch.randn(VIEWS, 3, 112, 112) for n in range(CANDIDATES)}
        self.kept = self.encoded()
        wrapped = add_adapter(self.model, LANGUAGE_TARGETS)
        items = list(range(FIRST_ITEM, FIRST_ITEM + VIEWS))
        self.recommender = Recommender(wrapped, items, self.kept)
        self.optimizer = torch.optim.AdamW(adapter_parameters(wrapped).values(), lr=0.0)
        self.batch = conversation(list(self.pictures))
        self.losses: dict[str, float] = {}

    @torch.no_grad()
    def encoded(self) -> ItemVectors:
        """All candidates' views through the tower, in one forward pass."""
        made = cls_vectors(self.model, torch.cat(list(self.pictures.values())))
        return ItemVectors(dict(zip(self.pictures, made.split(VIEWS), strict=True)), {})

    def train(self, name: str, *, encode: bool) -> float:
        """Milliseconds of a step."""
        began = time.process_time()
        self.recommender._vectors = self.encoded() if encode else self.kept
        loss: Tensor = self.recommender(self.batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses[name] = float(loss.detach())
        return (time.process_time() - began) * 1000

    @torch.no_grad()
    def test(self, _: str, *, encode: bool) -> float:
        """Milliseconds of a forward pass."""
        began = time.process_time()
        self.recommender._vectors = self.encoded() if encode else self.kept
        self.recommender(self.batch)
        return (time.process_time() - began) * 1000

    def operations(self) -> dict[str, float]:
        """Of the tower and of the language model's training step, in 10^9."""
        found = {}
        with FlopCounterMode(display=False) as counter:
            self.encoded()
        found["tower"] = round(counter.get_total_flops() / 1e9, 2)
        with FlopCounterMode(display=False) as counter:
            self.recommender(self.batch).backward()
        found["language model"] = round(counter.get_total_flops() / 1e9, 2)
        return found


def preparing() -> float:
    """Milliseconds to decode ten JPEG files of 500 x 500 and to cut them into five views each."""
    from transformers import LlavaNextImageProcessor

    grids = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]  # LLaVA-v1.6's
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=grids,
    )
    processor = SimpleNamespace(image_processor=images)
    stream = io.BytesIO()
    noise = torch.nn.functional.interpolate(torch.rand(1, 3, 25, 25), 500, mode="bicubic")[0]
    pixels = (noise.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    times = []
    for _ in range(4):
        began = time.process_time()
        for _ in range(CANDIDATES):
            picture_views(processor, decode_rgb(stream.getvalue()))
        times.append((time.process_time() - began) * 1000)
    return sorted(times[1:])[1]


def build() -> Any:
    """A LLaVA-NeXT with random weights: a tower of 8 x 256, a language model of 8 x 512."""
    settings = LlavaNextConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4,
            image_size=112, patch_size=14,
        ),
        text_config=MistralConfig(
            hidden_size=512, intermediate_size=1792, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=2, head_dim=64, vocab_size=1000, sliding_window=None,
        ),
    )  # fmt: skip
    return LlavaNextForConditionalGeneration(settings).requires_grad_(False).eval()


def conversation(items: list[str]) -> dict[str, Any]:
    """One prompt with the item tokens of every candidate, and the answer's labels."""
    ids = torch.randint(0, FIRST_ITEM, (1, TOKENS))
    for number in range(CANDIDATES):
        start = 60 + number * 22
        ids[0, start : start + VIEWS] = torch.arange(FIRST_ITEM, FIRST_ITEM + VIEWS)
    labels = torch.full_like(ids, IGNORED)
    labels[:, -ANSWER:] = ids[:, -ANSWER:]
    return {"ids": ids, "mask": torch.ones_like(ids), "labels": labels, "pictured": items}


if __name__ == "__main__":
    main()
