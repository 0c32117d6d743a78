"""Notes which rows swift's collator sees: `--external_plugins plugin/receipt.py`, beside others.

Every row of a file gets its place there as a column, which goes with it through swift's
preprocessing; where batches for training are put together, the places are written to `.receipt` in
--output_dir, a line a batch. Streamed data have no places. model/receipt.py reads it.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from swift.dataset import LazyLLMDataset, RowPreprocessor, loader
from swift.trainers.mixin import DataLoaderMixin

PLACE = "receipt_place"  # the column: 'N FILE', from 0
_TRAINS = Path(sys.argv[0]).stem in ("sft", "rlhf") and "--output_dir" in sys.argv


def _load(load: Callable[..., Any], kind: str, *, data_files: str, **options: Any) -> Any:
    dataset = load(kind, data_files=data_files, **options)
    if not isinstance(dataset, datasets.Dataset):
        return dataset
    return dataset.add_column(PLACE, [f"{at} {data_files}" for at in range(len(dataset))])


def _encode(encode: Callable[..., Any], row: dict[str, Any], **options: Any) -> Any:
    encoded = encode(row, **options)
    return encoded | {PLACE: row.get(PLACE)} if isinstance(encoded, dict) else encoded


def _collate(collate: Callable[..., Any], batch: Sequence[Any], **options: Any) -> Any:
    rows = [row for item in batch for row in (item if isinstance(item, list) else [item])]
    places = [row.pop(PLACE, None) for row in rows]
    line = json.dumps({"places": places}) + "\n"
    directory = sys.argv[sys.argv.index("--output_dir") + 1]
    with Path(directory, ".receipt").open("ab", buffering=0) as stream:
        stream.write(line.encode())  # whole, beside those of other processes
    return collate(batch, **options)


def _install() -> None:
    """Put the three where swift loads a file, encodes a row and makes a batch for training."""
    RowPreprocessor.standard_keys.append(PLACE)  # those that are kept
    loader.hf_load_dataset = functools.partial(_load, loader.hf_load_dataset)
    begin, batches = LazyLLMDataset.__init__, DataLoaderMixin.get_train_dataloader

    def __init__(self: Any, dataset: Any, encode_func: Any, **options: Any) -> None:  # noqa: N807
        begin(self, dataset, functools.partial(_encode, encode_func), **options)

    def get_train_dataloader(self: Any, *words: Any, **options: Any) -> Any:
        plain = self.data_collator
        self.data_collator = functools.partial(_collate, plain)
        try:
            return batches(self, *words, **options)
        finally:
            self.data_collator = plain

    LazyLLMDataset.__init__ = __init__
    DataLoaderMixin.get_train_dataloader = get_train_dataloader


if _TRAINS and PLACE not in RowPreprocessor.standard_keys:  # adapt.py imports it once more
    _install()
