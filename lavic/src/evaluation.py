"""What evaluate.py measures: a vision adapter's validation loss, a recommender's test figures."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from lavic.src import recommend_results
from lavic.src.adapter_files import ABOUT, VISION, base_of
from lavic.src.adapters import load_adapter
from lavic.src.caption_loss import caption_nll
from lavic.src.captions import Captions, Collate, fixed_tokens
from lavic.src.catalogue import read_samples, read_titles
from lavic.src.conversations import read_conversations
from lavic.src.distillation_setup import precision
from lavic.src.llava import add_item_tokens, load_base
from lavic.src.recommend_data import Talks, test_batches
from lavic.src.recommend_evaluation import answer
from lavic.src.recommend_setup import Sources, assemble
from shared.distributed import World
from shared.errors import UserError
from shared.files import read_object
from shared.images import Skipped
from shared.loader import make_eval_loader
from shared.precision import Amp

if TYPE_CHECKING:
    from lavic.src.evaluate import Config

log = logging.getLogger(__name__)

Results = tuple[dict[str, float], dict[str, int], dict[str, Any]]


@torch.no_grad()
def of_vision(cfg: Config, adapter: Path, device: torch.device) -> Results:
    """val_loss and val_perplexity of stage 1's adapter over data_root's validation pictures."""
    found = read_samples(cfg.data_root / "item2meta_valid.jsonl", cfg.data_root / "valid_images")
    samples = found.usable[: cfg.limit]
    dtype, amp = _precision(cfg, device)
    base_name = base_of(adapter, cfg.model_name)
    base, processor = load_base(base_name, device, dtype)
    item_ids = add_item_tokens(base, processor.tokenizer)
    model = load_adapter(base, adapter)
    trained = read_object(adapter.parent / "config.json").get("settings", {})
    slots, longest = trained.get("slots", "fixed5"), trained.get("max_length", 2048)
    pad = processor.tokenizer.pad_token_id or processor.tokenizer.eos_token_id
    loader = make_eval_loader(
        Captions(samples, processor, slots, longest),
        cfg.batch_size,
        World(device=device),
        workers=cfg.num_workers,
        collate=Collate(cfg.batch_size, pad, fixed_tokens(processor.tokenizer)),
    )
    skipped, total, tokens = Skipped("samples"), 0.0, 0
    for step in loader:
        for name, reason in step.left_out:
            skipped.add(name, reason)
        for batch in step.batches:
            with amp.autocast():
                total += float(caption_nll(model, batch.to(device), item_ids, None))
            tokens += batch.num_labels
    if not tokens:
        raise UserError("no validation sample could be used: see the reasons above")
    loss = total / tokens
    metrics = {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}
    counts = {"samples": len(samples) - skipped.count, "tokens": tokens, "left_out": skipped.count}
    return metrics, counts, {"model_name": base_name, "slots": slots}


def of_recommender(cfg: Config, adapter: Path, device: torch.device, out: Path) -> Results:
    """The test figures of stage 2's adapter; every answer goes to `out` as in a training."""
    about = read_object(adapter / ABOUT)
    if not {"candidate_type", "category", "max_length", "slots"} <= about.keys():
        raise UserError(f"{adapter / ABOUT} is damaged: copy the adapter's directory again")
    kind = cfg.candidate_type or about["candidate_type"]
    category = cfg.category or about["category"]
    test = read_conversations(cfg.data_root / category / "test.jsonl", kind)[: cfg.limit]
    talks = Talks([], [], test, read_titles(cfg.data_root / "item2meta_train.json"))
    dtype, _ = _precision(cfg, device)
    world = World(device=device)
    sources = Sources(
        base_of(adapter, cfg.model_name),
        adapter / VISION,
        cfg.data_root / "train_images",
        cfg.cache,
        cfg.num_workers,
        dtype,
        about["max_length"],
        about["slots"],
    )
    built = assemble(sources, talks, world)
    built.recommender.model = load_adapter(built.recommender.model, adapter)
    batches = test_batches(cfg.batch_size, talks.asked, built.encoder, built.pad_id, world)
    outcome = answer(built.recommender, test, batches, built.processor.tokenizer, world)
    assert outcome
    log.info(outcome.line())
    path = out / f"test_results_{kind}.jsonl"
    recommend_results.write_answers(path, kind, test, outcome.responses, outcome.recommended)
    counts = outcome.counts | {"without_picture": len(built.vectors.without)}
    described = {"category": category, "candidate_type": kind, "model_name": sources.model_name}
    return outcome.metrics, counts, described


def _precision(cfg: Config, device: torch.device) -> tuple[torch.dtype, Amp]:
    like_a_run = cast(Any, _Like(cfg.dtype, cfg.tool))
    dtype, mode = precision(like_a_run, device)
    return dtype, Amp(mode, device)


class _Like:
    """The settings that decide about precision, by the names that they have in a run."""

    def __init__(self, dtype: str, run: Any) -> None:
        self.dtype, self.run = dtype, run
