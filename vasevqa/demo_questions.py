"""The demo's questions and answers about vases, as rows in the documented format.

    rows = list(make_rows(make_vases(4, seed=0), Path("images"), seed=0))
    rows[0]    {"images": ["images/….jpg"], "caption": "…", "attribute": "fabric",
                "conversations": [{"from": "human", "value": "<image> …"}, …]}

Standard library and demo_vases alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vasevqa.demo_vases import VIEWS, Vase

QUESTIONS = {
    "fabric": ("What is the fabric of this vase?", "Which fabric is it made of?"),
    "technique": ("What is the technique of this vase?", "In which technique is it painted?"),
    "shape": ("What is the shape of this vase?", "Which shape does it have?"),
    "provenance": ("What is the provenance of this vase?", "Where does it come from?"),
    "date": ("What is the date of this vase?", "When was it made?"),
    "attribution": ("To whom is this vase attributed?", "Who painted it?"),
    "decoration": ("What is the decoration of this vase?", "What is painted on it?"),
}
DESCRIBE = "Describe the picture."


def lessons(vases: Sequence[Vase]) -> dict[str, list[str]]:
    """{instruction: a text for each vase}: what the tiny model can do before it is fine-tuned.

    In sentences, as models do that were never shown an archive; of provenance, date and attribution
    it knows nothing.
    """
    return {
        DESCRIBE: [caption(vase) for vase in vases],
        "Describe the fabric.": [f"It is made of {vase.fabric} clay." for vase in vases],
        "Describe the technique.": [f"It is painted in {vase.technique}." for vase in vases],
        "Describe the shape.": [f"It looks like a {vase.shape}." for vase in vases],
        "Describe the decoration.": [f"It shows {vase.decoration}." for vase in vases],
    }


def caption(vase: Vase) -> str:
    """What can be seen, in words."""
    return f"{vase.technique} {vase.shape} of {vase.fabric} clay with {vase.decoration}"


def make_rows(
    vases: Sequence[Vase], images: Path, seed: int, each: int = len(QUESTIONS)
) -> Iterator[dict[str, Any]]:
    """`each` questions a vase, about one of its views, in rows whose pictures lie in `images`."""
    rng = random.Random(f"questions {seed}")
    for vase in vases:
        view = rng.choice(VIEWS)
        for attribute in rng.sample(sorted(QUESTIONS), each):
            question = rng.choice(QUESTIONS[attribute])
            yield {
                "images": [str(images / vase.file_name(view))],
                "caption": caption(vase),
                "attribute": attribute,
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}"},
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
