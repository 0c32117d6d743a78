"""Say what a picture shows, in the words of the model before and after its distillation.

python describe.py picture.jpg                           with the best adapter of stage 1
python describe.py a.jpg b.jpg --title "Desk Tag"        a title as products have one
python describe.py a.jpg --checkpoint DIRECTORY          an adapter, or a run of stage 1
python describe.py a.jpg --demo                          with the model of ./run_training.sh --demo

Prints both texts for each picture. Greedy: the same picture and adapter, the same words.
Exit code 1: no picture could be read.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # repository root, for shared

from shared import stop

if __name__ == "__main__":
    stop.listen()

from shared.config import ToolOptions, option, parse
from shared.errors import DONE, FAILED, UserError
from shared.files import read_object
from shared.launch import launch_alone
from shared.settings import Count

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

SRC = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Config:
    """Settings of the description."""

    images: tuple[str, ...] = option((), "picture files", positional=True)
    checkpoint: Path = option(SRC / "out_distilled", "adapter directory, or a run's directory")
    title: str = option("No Title", "title of the product, part of the question")
    max_tokens: Count = option(200, "most tokens of a text")
    model_name: str | None = option(None, "base model; default: the one it was trained on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "of the weights; auto: half on a GPU, float32 on the CPU"
    )
    load_in_4bit: bool = option(False, "language model in NF4, by bitsandbytes")
    device_map: Literal["none", "auto"] = option(
        "none", "auto: the model spread over all visible GPUs, by accelerate"
    )
    tool: ToolOptions = field(default_factory=ToolOptions)


DEMO = {"max_tokens": 7}  # the demo's descriptions have no more, and it does not know its end


def main(argv: list[str] | None = None) -> int:
    """Check the input, then describe; the exit code."""
    cfg = parse(Config, argv, __doc__, DEMO)
    if cfg.tool.demo and "checkpoint" not in cfg.tool.typed:
        cfg = replace(cfg, checkpoint=SRC.parent / "demo" / "runs" / "out_distilled")
    missing = [name for name in cfg.images if not Path(name).is_file()]
    if missing:
        raise UserError(f"{missing[0]} is no file: give pictures")
    from lavic.src.vision.adapter_files import base_of, check_four_bit, stage_of, trained_in

    adapter = trained_in(cfg.checkpoint)
    if adapter is None or stage_of(adapter) != 1:
        raise UserError(
            f"{cfg.checkpoint} holds no adapter of stage 1: train it with ./run_training.sh, or "
            "give --checkpoint PATH"
        )
    base = base_of(adapter, cfg.model_name)
    check_four_bit(cfg.load_in_4bit)
    if cfg.tool.dry_run:
        print(f"{len(cfg.images)} pictures with {adapter} on {base}")
        return DONE
    return _describe(cfg, adapter, base)


def _describe(cfg: Config, adapter: Path, base_name: str) -> int:
    from lavic.src.vision import model
    from lavic.src.vision.adapters import load_adapter
    from shared.amp import Amp
    from shared.device import resolve
    from shared.images import read_rgb

    device = resolve(cfg.tool.device, 0, os.environ)
    dtype, amp_mode = model.precision(cfg.dtype, cfg.tool.amp, device)
    four_bit, spread = cfg.load_in_4bit, cfg.device_map == "auto"
    base, processor = model.load_base(base_name, device, dtype, four_bit=four_bit, spread=spread)
    item_ids = model.add_item_tokens(base, processor.tokenizer)
    llava: Any = load_adapter(base, adapter)
    slots = read_object(adapter.parent / "config.json").get("settings", {}).get("slots", "fixed5")
    amp, num_read = Amp(amp_mode, device), 0
    for name in cfg.images:
        try:
            views = model.picture_views(processor, read_rgb(Path(name)))
        except ValueError as error:
            log.warning("%s is passed over: %s", name, error)
            continue
        asked = _Question(processor.tokenizer, item_ids, cfg.title, slots, cfg.max_tokens)
        with amp.autocast():
            after = asked.answer(llava, views)
            with llava.disable_adapter():
                before = asked.answer(llava, views)
        print(f"{name}\n  before  {before}\n  after   {after}")
        num_read += 1
    return DONE if num_read else FAILED


@dataclass(frozen=True)
class _Question:
    """What the model is asked about a picture, as in stage 1."""

    tokenizer: Any
    item_ids: list[int]
    title: str
    slots: str
    max_tokens: int

    def answer(self, llava: Any, views: Tensor) -> str:
        """What the model says of the picture with these views (V, 3, S, S), on one line."""
        import torch

        from lavic.src.vision import model
        from lavic.src.vision.captions import prompt, without_item_tokens

        count = model.MOST_VIEWS if self.slots == "fixed5" else len(views)
        text = prompt(without_item_tokens(self.title), count)
        core = model.core_of(llava)
        table = core.language_model.embed_tokens
        ids = torch.tensor([self.tokenizer(text)["input_ids"]], device=table.weight.device)
        with torch.no_grad():
            vectors = model.cls_vectors(llava, views.to(table.weight.device))
            filled = model.filled_slots(ids, self.item_ids, [len(views)])
            embeds = model.place_vectors(table(ids), filled, vectors)
        end, mask = self.tokenizer.eos_token_id, torch.ones_like(ids)
        (said,) = model.likeliest(llava, embeds, mask, self.max_tokens, end)
        return " ".join(self.tokenizer.decode(said, skip_special_tokens=True).split())


if __name__ == "__main__":
    sys.exit(launch_alone(main))
