"""A nano checkpoint, a vision adapter and conversations for stage 2 of lavic, in the real formats.

The language model is random: what is tested is the machinery; the demo shows that it learns.
"""

from __future__ import annotations

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavic.demo_data import model as demo_model
from lavic.demo_data.products import SIZES, Item, all_looks, draw, make_items
from lavic.src.vision.adapters import adapter_parameters, add_adapter, save_adapter
from lavic.src.vision.model import VISION_TARGETS, add_item_tokens, load_base

MISSING, DAMAGED = 0, 1  # the items without a usable picture


class Nano:
    """Where everything is, and the products."""

    def __init__(self, root: Path, items: list[Item]) -> None:
        self.root, self.items = root, items
        self.model, self.adapter = root / "model", root / "vision_lora_adapter_best"
        self.images = root / "data" / "train_images"
        self.meta = root / "data" / "item2meta_train.json"

    def talks(self, split: str) -> Path:
        return self.root / "data" / "all_beauty" / f"{split}.jsonl"

    def flags(self, run_dir: Path, cache: Path | None = None) -> list[object]:
        """prompt_tuning.py's flags for a quick run of 9 steps; caches of tests do not mix."""
        return [
            *("--model_dir", self.adapter, "--data-root", self.root / "data"),
            *("--item_meta_path", self.meta, "--image_dir", self.images),
            *("--finetune_output_dir", run_dir, "--cache", cache or run_dir.parent / "vectors"),
            *("--num_workers", 0, "--lr", 0.01, "--num_epochs", 3, "--batch_size", 4),
            *("--log-every", 1, "--eval_batch_size", 3, "--device", "cpu"),
        ]


_kept: list[tempfile.TemporaryDirectory[str]] = []


@cache
def nano() -> Nano:
    """One for all tests of a process, which leave it as it is."""
    _kept.append(tempfile.TemporaryDirectory(prefix="lavic-"))
    rng = np.random.default_rng(0)
    made = Nano(Path(_kept[-1].name), make_items(all_looks()[:24], rng))
    _write_model(made)
    _write_products(made, rng)
    _write_validation(made, rng)
    for split, count in {"train": 12, "valid": 4, "test": 7}.items():
        made.talks(split).parent.mkdir(exist_ok=True)
        talks = [_talk(made.items, random.Random(f"0{split}{n}")) for n in range(count)]
        _write_lines(made.talks(split), talks)
    return made


def load(nano: Nano) -> tuple[Any, Any, list[int]]:
    """The base model, the processor and the item tokens' ids."""
    model, processor = load_base(nano.model, torch.device("cpu"), torch.float32)
    return model, processor, add_item_tokens(model, processor.tokenizer)


def shake(model: Any, seed: int, size: float = 0.05) -> None:
    """Give an adapter, fresh ones being without effect, random weights."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_(0, size, generator=generator)


def _write_model(nano: Nano) -> None:
    torch.manual_seed(0)
    processor = demo_model.make_processor(demo_model.make_tokenizer(nano.items))
    model = demo_model.make_model(processor.tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "embed" not in name:
                parameter.mul_(3.0)  # 0.02 is nearly linear: let pictures and words matter
    model.save_pretrained(nano.model)
    processor.save_pretrained(nano.model)
    base, processor, _ = load(nano)
    wrapped = add_adapter(base, VISION_TARGETS)
    shake(wrapped, 0)
    save_adapter(wrapped, processor, nano.adapter)


def _write_products(nano: Nano, rng: np.random.Generator) -> None:
    nano.images.mkdir(parents=True)
    for number, item in enumerate(nano.items):
        path = nano.images / f"{item.id}_0.jpg"
        if number != MISSING:
            draw(item.look, SIZES[number % len(SIZES)], rng).save(path)
        if number == DAMAGED:
            path.write_bytes(path.read_bytes()[:300])
    meta = {item.id: {"title": item.title, "images": []} for item in nano.items}
    nano.meta.write_text(json.dumps(meta, ensure_ascii=False), encoding="utf-8")


def _write_validation(nano: Nano, rng: np.random.Generator) -> None:
    """Stage 1's validation: five pictures of other items, the last of them damaged."""
    lines, folder = [], nano.root / "data" / "valid_images"
    folder.mkdir()
    for number, look in enumerate(all_looks()[-5:]):
        name = f"B1DEMO{number:04d}_0.jpg"
        draw(look, SIZES[number % len(SIZES)], rng).save(folder / name)
        row = {"title": f"Sign {number}", "image_name": name, "image": "http://127.0.0.1/x"}
        lines.append(row | {"image_description_llava_cleaned": look.description})
    (folder / name).write_bytes(b"no picture")
    _write_lines(nano.root / "data" / "item2meta_valid.jsonl", lines)


def _talk(items: list[Item], rng: random.Random) -> dict[str, Any]:
    chosen = [item.id for item in rng.sample(items, 5)]
    return {
        "context": f"<submission>I want a {rng.choice('abcd')}. 谢谢 🙂</submission>\n",
        "context_items": [],
        "gt": "this one",
        "gt_items": chosen[: rng.choice((1, 1, 2))],
        "candidates_st": rng.sample(chosen, 4),
        "candidates_gpt_large": rng.sample(chosen, 5),
    }


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
