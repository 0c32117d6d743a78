"""Answers of a vision-language model to questions about pictures, and how many are right."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from shared.errors import UserError, one_line
from vasevqa.model import rewards
from vasevqa.model.rewards import ATTRIBUTES
from vasevqa.model.rows import TAG, Row

log = logging.getLogger(__name__)

OTHER = "other"  # questions about none of the attributes
KINDS = ("exact", "normalised", "contained", "credit")
_FEWEST_PIXELS = 4 * 28 * 28  # what swift scales small pictures up to


@dataclass(frozen=True)
class Settings:
    """How answers are made: greedily, so that they are the same every time."""

    batch_size: int
    max_new_tokens: int
    max_pixels: int
    system: str | None
    dtype: torch.dtype
    device: torch.device


class Answerer:
    """A model that answers rows. Raises UserError when the directory holds no such model."""

    def __init__(self, directory: Path, settings: Settings) -> None:
        self._settings = settings
        size = {"shortest_edge": _FEWEST_PIXELS, "longest_edge": settings.max_pixels}
        try:
            self._processor: Any = AutoProcessor.from_pretrained(directory, size=size)
            model: Any = AutoModelForImageTextToText.from_pretrained(
                directory, dtype=settings.dtype
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{directory} cannot be loaded: {one_line(error)}") from None
        self._processor.tokenizer.padding_side = "left"  # answers begin where questions end
        self._model = model.to(settings.device).eval()

    def answer(self, rows: Sequence[Row], root: Path) -> Iterator[str]:
        """The answer to each row, in order; pictures lie below `root`."""
        size = self._settings.batch_size
        for start in range(0, len(rows), size):
            yield from self._batch(rows[start : start + size], root)
            log.info("answered %d of %d", min(start + size, len(rows)), len(rows))

    @torch.inference_mode()
    def _batch(self, rows: Sequence[Row], root: Path) -> list[str]:
        texts = [
            self._processor.apply_chat_template(
                messages(row, self._settings.system), tokenize=False, add_generation_prompt=True
            )
            for row in rows
        ]
        pictures = [Image.open(root / image).convert("RGB") for row in rows for image in row.images]
        inputs = self._processor(
            text=texts, images=pictures or None, padding=True, return_tensors="pt"
        ).to(self._settings.device)
        made = self._model.generate(
            **inputs, do_sample=False, max_new_tokens=self._settings.max_new_tokens
        )
        new = made[:, inputs["input_ids"].shape[1] :]
        return self._processor.tokenizer.batch_decode(new, skip_special_tokens=True)


def messages(row: Row, system: str | None) -> list[dict[str, Any]]:
    """The conversation up to the last question, as chat templates take it."""
    turns = row.turns[:-1] if row.answer else row.turns
    found: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    untagged = len(row.images) if not any(TAG in turn.text for turn in turns) else 0
    for turn in turns:
        parts: list[dict[str, str]] = [{"type": "image"}] * untagged
        untagged = 0
        for number, text in enumerate(turn.text.split(TAG)):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        found.append({"role": turn.role, "content": parts if turn.role == "user" else turn.text})
    return found


def attribute_of(row: Row) -> str:
    """What the row asks about: its `attribute`, else the attribute that its question names."""
    named = str(row.source.get("attribute", "")).lower()
    asked = row.question.lower()
    return next(
        (name for name in ATTRIBUTES if name == named),
        next((name for name in ATTRIBUTES if not named and name in asked), named or OTHER),
    )


def score(rows: Sequence[Row], answers: Sequence[str]) -> tuple[dict[str, float], dict[str, int]]:
    """Accuracy over all rows and for each attribute, and the number of rows behind each.

    exact: the same text; normalised: the same after normalising; contained: the reference is in the
    answer, among whatever other words; credit: the reward, from 0 to 1.
    """
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for row, text in zip(rows, answers, strict=True):
        answer, name = rewards.answer_in(text), attribute_of(row)
        values = (
            float(rewards.is_exact(answer, row.reference)),
            float(rewards.is_same(answer, row.reference)),
            float(rewards.holds(answer, row.reference)),
            rewards.credit(answer, row.reference),
        )
        for kind, value in zip(KINDS, values, strict=True):
            sums[kind] += value
            sums[f"{kind}/{name}"] += value
        counts["questions"] += 1
        counts[name] += 1
    metrics = {
        key: round(value / counts[key.partition("/")[2] or "questions"], 6)
        for key, value in sums.items()
    }
    return metrics, dict(counts)


def majority(rows: Sequence[Row]) -> float:
    """The accuracy of a model that sees nothing: each attribute's most frequent answer."""
    return sum(max(counted.values()) for counted in _references(rows)) / len(rows)


def chance(rows: Sequence[Row]) -> float:
    """The accuracy of a model that guesses among the answers that there are to each attribute."""
    return sum(counted.total() / len(counted) for counted in _references(rows)) / len(rows)


def _references(rows: Sequence[Row]) -> list[Counter[str]]:
    """How often each answer is right, for each attribute."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        answers[attribute_of(row)][rewards.normalise(row.reference)] += 1
    return list(answers.values())


def table(metrics: dict[str, dict[str, float]], counts: dict[str, int]) -> str:
    """Accuracy of each model, exact, normalised and contained; a row for each attribute."""
    names = [name for name in (*ATTRIBUTES, OTHER) if name in counts]
    names += sorted(counts.keys() - {*names, "questions"})
    models = list(metrics)
    head = ["asked about", "questions", *(f"{m} {k}" for k in KINDS[:3] for m in models)]
    lines = [head]
    for name in ["questions", *names]:
        suffix = "" if name == "questions" else f"/{name}"
        values = [f"{metrics[m][k + suffix]:.3f}" for k in KINDS[:3] for m in models]
        lines.append(["all" if not suffix else name, str(counts[name]), *values])
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
