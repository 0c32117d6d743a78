"""A text as blocks of tokens, one token per character."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset


class CharDataset(Dataset[tuple[Tensor, Tensor]]):
    """Pairs of blocks (block_size,), (block_size,): characters, and the character after each.

    There is a block for every `block_size` characters. `shift` moves each to the right by a random
    part of its length, so that no two epochs cut the text at the same places.
    """

    def __init__(self, tokens: Tensor, block_size: int, *, shift: bool) -> None:
        self.tokens, self.block_size, self.shift = tokens, block_size, shift

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.block_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.block_size
        if self.shift:
            start += int(torch.randint(self.block_size, ()))
        start = min(start, len(self.tokens) - 1 - self.block_size)
        block = self.tokens[start : start + self.block_size + 1]
        return block[:-1], block[1:]


class Text(NamedTuple):
    """A text in tokens: nine tenths to train on, the last tenth held out."""

    vocabulary: list[str]
    train: CharDataset
    held_out: CharDataset
    entropy: float  # nats per character of the best guess that does not look at the context


def encode(text: str, block_size: int) -> Text:
    """`text` with a token for every character that occurs in it, in order of the characters."""
    vocabulary = sorted(set(text))
    token_of = {character: token for token, character in enumerate(vocabulary)}
    tokens = torch.tensor([token_of[character] for character in text])
    cut = len(tokens) * 9 // 10
    train = CharDataset(tokens[:cut], block_size, shift=True)
    held_out = CharDataset(tokens[cut:], block_size, shift=False)
    return Text(vocabulary, train, held_out, unigram_entropy(tokens))


def unigram_entropy(tokens: Tensor) -> float:
    """The entropy of the characters' frequencies, in nats per character."""
    frequency = torch.bincount(tokens).double() / len(tokens)
    return float(-(frequency * frequency.clamp_min(1e-300).log()).sum())
