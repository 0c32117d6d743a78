"""How good recommendations are, and the files that say so. Standard library only."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lavic.src.recommend.data import Conversation
from shared.errors import UserError
from shared.files import write_text

SUMMARY = "results_summary.csv"
_COLUMNS = (
    *("model_dir", "candidate_type", "lr", "weight_decay", "num_epochs"),
    *("recall@1", "validity@1", "output_file"),  # up to here as documented
    *("category", "hit_ratio@1", "recall_ceiling@1", "hit_ratio_ceiling@1", "hit_if_reachable"),
    *(
        "recall_distinct@1",
        "recall_before@1",
        "val_loss",
        "conversations",
        "gt_items",
        "without_picture",
        "seed",
    ),
)
_WORD = re.compile(r"[^\s,;:.!?\"'()\[\]<>]+")
_ID = re.compile(r"[A-Z0-9]{10}")


def recommended_in(response: str, candidates: Sequence[str]) -> str:
    """The first word of a response that is a candidate or has the form of an id; '' without one."""
    for word in _WORD.findall(response):
        if word in candidates or _ID.fullmatch(word):
            return word
    return ""


def metrics_of(conversations: Sequence[Conversation], said: Sequence[str]) -> dict[str, float]:
    """The figures of one recommended id ('' for none) a conversation; shares from 0 to 1.

    recall@1             true ids that were recommended, of all true ids as listed: one that a line
                         lists twice counts twice, as in the original
    hit_ratio@1          conversations with a true id recommended, of those that have one
    validity@1           recommendations that are candidates, of all conversations
    recall_ceiling@1, hit_ratio_ceiling@1    the first two for whoever recommends the best of the
                         candidates everywhere
    hit_if_reachable     conversations with a hit, of those where one was possible
    recall_distinct@1    as recall@1, each true id of a conversation counted once
    """
    pairs = list(zip(conversations, said, strict=True))
    asked = sum(bool(talk.gt_items) for talk in conversations)
    listed = sum(len(talk.gt_items) for talk in conversations)
    hits = sum(item in talk.gt_items for talk, item in pairs)
    reachable = sum(talk.reachable for talk in conversations)
    valid = sum(item in talk.candidates for talk, item in pairs)
    best = sum(max(map(talk.gt_items.count, talk.candidates)) for talk in conversations)
    return {
        "recall@1": _share(sum(talk.gt_items.count(item) for talk, item in pairs), listed),
        "hit_ratio@1": _share(hits, asked),
        "validity@1": _share(valid, len(pairs)),
        "recall_ceiling@1": _share(best, listed),
        "hit_ratio_ceiling@1": _share(reachable, asked),
        "hit_if_reachable": _share(
            sum(talk.reachable and item in talk.gt_items for talk, item in pairs), reachable
        ),
        "recall_distinct@1": _share(hits, sum(len(set(talk.gt_items)) for talk in conversations)),
    }


def references(conversations: Sequence[Conversation], answers: Sequence[str]) -> dict[str, float]:
    """recall@1 of two that read neither conversation nor pictures.

    chance    expected of a candidate drawn at random: one by the number of candidates, where a true
              id is among them
    majority  of the candidate that most often is among `answers`, the training's; the first of
              those that are as often
    """
    popular = Counter(answers)
    listed = sum(len(talk.gt_items) for talk in conversations)
    drawn = sum(
        sum(map(talk.gt_items.count, talk.candidates)) / len(talk.candidates)
        for talk in conversations
    )
    picked = [(talk, max(talk.candidates, key=popular.__getitem__)) for talk in conversations]
    right = sum(talk.gt_items.count(item) for talk, item in picked)
    return {"chance": drawn / listed if listed else 0.0, "majority": _share(right, listed)}


def counts_of(conversations: Sequence[Conversation]) -> dict[str, int]:
    """How much the figures stand on."""
    return {
        "conversations": len(conversations),
        "gt_items": sum(len(talk.gt_items) for talk in conversations),
        "reachable": sum(talk.reachable for talk in conversations),
    }


@dataclass(frozen=True)
class Outcome:
    """What was said in a test, and the figures of it."""

    conversations: Sequence[Conversation]
    responses: Sequence[str]
    recommended: Sequence[str]
    metrics: dict[str, float]
    counts: dict[str, int]

    def line(self) -> str:
        """The figures for people."""
        shown = {name: f"{value:.4f}" for name, value in self.metrics.items()}
        return (
            f"Recall@1 {shown['recall@1']} (at most {shown['recall_ceiling@1']}) | "
            f"HitRatio@1 {shown['hit_ratio@1']} (at most {shown['hit_ratio_ceiling@1']}; "
            f"{shown['hit_if_reachable']} where possible) | Validity {shown['validity@1']} | "
            f"{self.counts['conversations']} conversations, {self.counts['gt_items']} true items"
        )


def outcome_of(conversations: Sequence[Conversation], responses: Sequence[str]) -> Outcome:
    """The outcome of one response a conversation, in order."""
    pairs = zip(responses, conversations, strict=True)
    said = [recommended_in(response, talk.candidates) for response, talk in pairs]
    metrics, counts = metrics_of(conversations, said), counts_of(conversations)
    return Outcome(conversations, responses, said, metrics, counts)


def write_answers(path: Path, candidate_type: str, found: Outcome) -> None:
    """The test conversations, each as in its file, with recommended_… and response_…,
    the dots being the candidates' type: recommended_st for candidates_st.
    """
    kind = candidate_type.removeprefix("candidates_")
    lines = []
    for talk, response, item in zip(
        found.conversations, found.responses, found.recommended, strict=True
    ):
        row = talk.row | {f"recommended_{kind}": item, f"response_{kind}": response}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def read_summary(directory: Path) -> list[dict[str, Any]]:
    """The rows of a directory's results_summary.csv; [] without one."""
    path = directory / SUMMARY
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace", newline="") as lines:
        try:
            return list(csv.DictReader(lines))
        except csv.Error as error:
            raise UserError(f"{path} is damaged ({error}): mend it or move it away") from None


def write_summary(directory: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows as results_summary.csv: a line a run, the documented columns first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(directory / SUMMARY, text.getvalue())


def keep_summary(directory: Path, earlier: Sequence[dict[str, Any]]) -> None:
    """Have the rows of earlier runs at hand, also after these were moved aside."""
    if earlier and not (directory / SUMMARY).exists():
        write_summary(directory, earlier)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
