"""Blocks of a text as codes of its characters, and how well a model without context can do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset


class CharDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pairs (block_size,), (block_size,) of codes: characters, and the character after each.

    There is a block for every `block_size` characters. `shift` moves each to the right by a random
    part of its length, so that no two epochs cut the text at the same places.
    """

    def __init__(self, codes: Tensor, block_size: int, *, shift: bool) -> None:
        self.codes, self.block_size, self.shift = codes, block_size, shift

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.block_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.block_size
        if self.shift:
            start += int(torch.randint(self.block_size, ()))
        start = min(start, len(self.codes) - 1 - self.block_size)
        block = self.codes[start : start + self.block_size + 1]
        return block[:-1], block[1:]


class Text(NamedTuple):
    """A text in codes: nine tenths to learn from, the last one held out."""

    alphabet: list[str]
    learned: CharDataset
    held_out: CharDataset
    entropy: float  # see unigram_entropy


def encode(text: str, block_size: int) -> Text:
    """`text` with a code for every character that occurs in it, in order of the characters."""
    alphabet = sorted(set(text))
    code_of = {character: code for code, character in enumerate(alphabet)}
    codes = torch.tensor([code_of[character] for character in text])
    cut = len(codes) * 9 // 10
    learned = CharDataset(codes[:cut], block_size, shift=True)
    held_out = CharDataset(codes[cut:], block_size, shift=False)
    return Text(alphabet, learned, held_out, unigram_entropy(codes))


def unigram_entropy(codes: Tensor) -> float:
    """Nats a character: the loss of the best guess that knows how often each character occurs."""
    share = torch.bincount(codes).double() / len(codes)
    return float(-(share * share.clamp_min(1e-300).log()).sum())
