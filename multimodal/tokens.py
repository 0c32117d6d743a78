"""Captions as the token ids of open_clip's SimpleTokenizer, with the mask that belongs to them."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shared.errors import MissingToolError

CONTEXT = 77  # token ids a caption
VOCABULARY = 49_408
END = VOCABULARY - 1  # ends every caption; the largest id


def tokenise(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids (N, 77) int64 and mask (N, 77) bool of English captions; longer ones are cut at the end.

    The mask is true up to and with the end token. It does not ask for ids other than 0: the padding
    is 0, and so is the token of an exclamation mark.
    """
    ids = _tokenizer()(list(texts), context_length=CONTEXT)
    return ids, mask_of(ids)


def mask_of(ids: Tensor) -> Tensor:
    """Which of the ids (N, L) belong to the caption: bool (N, L), from the place of the end."""
    return torch.arange(ids.shape[1]) <= (ids == END).int().argmax(1, keepdim=True)


@functools.cache
def _tokenizer() -> Any:
    """The tokenizer, from its file alone: the whole of open_clip takes four seconds to import."""
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise MissingToolError("captions need open_clip's tokenizer: pip install open_clip_torch")
    file = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    name = "open_clip_tokenizer_alone"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
