"""The demo's questions and answers about vases, as rows in the documented format.

    rows = list(make_rows(make_vases(4, seed=0), Path("images"), seed=0))
    rows[0]    {"images": ["images/….jpg"], "caption": "…", "attribute": "fabric",
                "conversations": [{"from": "human", "value": "<image> …"}, …]}

Standard library and vases.py alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vasevqa.demo_data.vases import VIEWS, Vase

QUESTIONS = {
    "fabric": "What is the fabric of this vase?",
    "technique": "What is the technique of this vase?",
    "shape": "What is the shape of this vase?",
    "provenance": "What is the provenance of this vase?",
    "date": "What is the date of this vase?",
    "attribution": "What is the attribution of this vase?",
    "decoration": "What is the decoration of this vase?",
}
# How things look, in words that are no archaeologist's.
COLOURS = {"Attic": "orange", "Corinthian": "cream", "Apulian": "dark red", "Etruscan": "grey"}
FORMS = {
    "amphora": "a jar with a neck",
    "hydria": "a broad jar",
    "krater": "a deep bowl",
    "kylix": "a shallow bowl",
    "lekythos": "a slim bottle",
    "oinochoe": "a pitcher",
}


def lessons(vases: Sequence[Vase], seed: int) -> Iterator[tuple[str, str, int | None]]:
    """What the tiny model has learnt before it is fine-tuned: question, answer, number of a vase.

    From pictures it says in everyday words what it sees, and the technique. From a catalogue, where
    the number is None, it knows which answers the other questions have; what they look like is new.
    """
    rng = random.Random(f"catalogue {seed}")
    for number, vase in enumerate(vases):
        yield "What colour is the clay?", COLOURS[vase.fabric], number
        yield "What form does it have?", FORMS[vase.shape], number
        yield QUESTIONS["technique"], vase.technique, number
        name = rng.choice(sorted(QUESTIONS))
        yield QUESTIONS[name], vase.attributes[name], None


def caption(vase: Vase) -> str:
    """What can be seen, in words."""
    return f"{vase.technique} {vase.shape} of {vase.fabric} clay with {vase.decoration}"


def make_rows(
    vases: Sequence[Vase], images: Path, seed: int, each: int = len(QUESTIONS)
) -> Iterator[dict[str, Any]]:
    """`each` questions a vase, about one of its views, in rows whose pictures are in `images`."""
    rng = random.Random(f"questions {seed}")
    for vase in vases:
        view = rng.choice(VIEWS)
        for attribute in rng.sample(sorted(QUESTIONS), each):
            yield {
                "images": [str(images / vase.file_name(view))],
                "caption": caption(vase),
                "attribute": attribute,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{QUESTIONS[attribute]}"},
                    {"from": "gpt", "value": vase.attributes[attribute]},
                ],
            }


def with_solutions(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows for GRPO: the answer as `solution`, the question alone as conversation."""
    return [
        {
            **row,
            "solution": row["conversations"][1]["value"],
            "conversations": row["conversations"][:1],
        }
        for row in rows
    ]
