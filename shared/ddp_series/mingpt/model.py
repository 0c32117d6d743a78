"""A GPT over characters: causal self-attention and a feed-forward net, one block after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """Attention to what came before, then a feed-forward net; both are added to their input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before_attention, self.before_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D); position t sees positions 0 to t."""
        parts = self.query_key_value(self.before_attention(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        share = self.dropout if self.training else 0.0
        seen = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=share, is_causal=True
        )
        x = x + self.mix(seen.transpose(1, 2).flatten(2))
        return x + self.feed(self.before_feed(x))


class GPT(nn.Module):
    """Characters and places as vectors, `layers` blocks, a score for every next character."""

    def __init__(
        self, characters: int, block_size: int, layers: int, heads: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.scores = nn.LayerNorm(width), nn.Linear(width, characters)
        for table in (self.characters, self.places, self.scores):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes (B, T) of characters, T ≤ block_size → logits (B, T, characters)."""
        x = self.characters(codes) + self.places(torch.arange(codes.shape[1], device=codes.device))
        for block in self.blocks:
            x = block(x)
        return self.scores(self.norm(x))


def loss_of(model: nn.Module, codes: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy, in nats a character, of what follows: (B, T) and (B, T) → ()."""
    return functional.cross_entropy(model(codes).flatten(0, 1).float(), following.flatten())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: decay for matrices; none for biases and norms, which have one dimension."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    decayed: dict[str, Any] = {"params": matrices, "weight_decay": weight_decay}
    return [decayed, {"params": vectors, "weight_decay": 0}]


@torch.no_grad()
def generate(model: GPT, codes: Tensor, length: int) -> Tensor:
    """`codes` (T,) and `length` more, each drawn from the model's distribution of the next."""
    model.eval()
    for _ in range(length):
        logits = model(codes[None, -model.block_size :])[0, -1].float()
        codes = torch.cat([codes, torch.multinomial(logits.softmax(-1), 1)])
    return codes
