"""The README.md of an exported adapter: a Hugging Face model card. Standard library only."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

_CARD = """\
---
license: unknown
library_name: pytorch
pipeline_tag: image-feature-extraction
{base_line}tags:
- face-recognition
- knowledge-distillation
- adapter
- blip-2
- safetensors
---

# {name}

## What it is

Adapters for the frozen vision tower of {tower}, distilled from a face recognition teacher: with \
them the tower's class token is an embedding of the face in the picture. {adapters}

| File | Content |
| :--- | :--- |
| `model.safetensors` | {content} |
| `config.json` | sizes, preprocessing, training settings, SHA-256 of the original checkpoint |

The tower itself is not in here; it comes from {tower}.

## How to use it

Faces are cropped and aligned, RGB, 112 x 112 pixels. With the toolkit that trained it, in its \
directory `face_distill`:

```bash
python embed.py FOLDER_OF_FACES --checkpoint {typed_name}
```

Or in Python, started in the toolkit's root directory:

```python
from pathlib import Path
import torch
from face_distill.FaceDataset import decode
from face_distill.trained import FaceEmbedder, open_student

student = open_student(Path("face_distill/blip2_weights"), Path("face_distill/{name}"))
embed = FaceEmbedder(student, torch.device("cpu"))
faces = torch.stack([decode(Path(name).read_bytes()) for name in ("a.jpg", "b.jpg")])
a, b = torch.nn.functional.normalize(embed(faces))
print(f"cosine similarity {{a @ b:.3f}}")
```

## Training

{training}

## Verification

{verification}

## Limits

- A face embedding is biometric data. Many laws ask for the consent of the people shown before \
their faces are compared; do not use this to identify people who have not agreed.
- The faces it was trained on come with terms of their own (MS1M-ArcFace and its relatives: \
research only), and so do the teacher and {tower}. The `license` above is for whoever publishes \
this to fill in, within those terms.
- Accuracy differs between groups of people, and falls for faces that are not cropped and aligned \
like those of the training data. Measure it on your own data before you rely on it.
{centres}"""

_CENTRES = """\
- `head.weight` holds what the student learned of each single person of the training data. Using \
the embedding does not need it; `export_adapter.py --without-head` leaves it out.
"""


def model_card(facts: dict[str, Any], name: str) -> str:
    """The card as Markdown. facts: the export's config.json; name: of its directory."""
    base = facts["base_model"] or {}
    hub_name = base.get("name")
    relation = f"base_model: {hub_name}\nbase_model_relation: adapter\n" if hub_name else ""
    return _CARD.format(
        name=_plain(name),
        typed_name=shlex.quote(_plain(name)),
        base_line=relation,
        tower=hub_name or "the BLIP-2 checkpoint it was trained on",
        adapters=_adapters(facts, base),
        content=_content(facts["head"]),
        training=_training(facts["training"]),
        verification=_verification(facts["verification"]),
        centres=_CENTRES if facts["head"] else "",
    )


def _adapters(facts: dict[str, Any], base: dict[str, Any]) -> str:
    layers = facts["adapter"]["layers"]
    of = f" of {base['num_hidden_layers']}" if base else ""
    size = f", images of {facts['image_size']} pixels a side" if facts["image_size"] else ""
    return (
        f"{len(layers)} bottleneck adapters of width {facts['adapter']['bottleneck']} beside the "
        f"MLPs of the layers {' '.join(map(str, layers))}{of} (from 0); embeddings of "
        f"{facts['embedding_dim']} numbers{size}."
    )


def _content(head: dict[str, Any] | None) -> str:
    if head is None:
        return "the adapters"
    return f"the adapters, and the ArcFace centres of {head['classes']} identities (`head.weight`)"


def _training(settings: dict[str, Any]) -> str:
    if not settings:
        return "The settings of the run were not beside the checkpoint."
    rows = [f"| `{_plain(name)}` | {_shown(value)} |" for name, value in sorted(settings.items())]
    return "\n".join(["| Setting | Value |", "| :--- | :--- |", *rows])


def _verification(found: dict[str, Any] | None) -> str:
    if found is None:
        return "Not measured during training."
    return (
        f"Ten-fold accuracy on the pairs of `{_plain(found['pairs'])}`: {found['before']:.4f} "
        f"untrained, {found['after']:.4f} trained."
    )


def _shown(value: Any) -> str:
    return _plain(value if isinstance(value, str) else json.dumps(value))


def _plain(text: str) -> str:
    """`text` without what would leave its place in a table, a code span or a string."""
    return re.sub(r"[^\w .,:+/\[\]-]", "_", text)
