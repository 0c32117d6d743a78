"""A GPT over characters: blocks of causal self-attention and a feed-forward network."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# B batch, T characters of a block, D width, V vocabulary


class Block(nn.Module):
    """Pre-norm transformer block: attention to earlier characters, then a feed-forward network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D); position t sees positions 0 to t."""
        heads = self.query_key_value(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each (B, heads, T, D / heads)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.norm2(x))


class GPT(nn.Module):
    """Token and position embeddings, `layers` blocks, a linear head."""

    def __init__(
        self, vocab_size: int, block_size: int, layers: int, heads: int, width: int
    ) -> None:
        super().__init__()
        self.block_size = block_size
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(block_size, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size)
        for module in (self.token_embedding, self.position_embedding, self.head):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), T ≤ block_size → logits (B, T, V) of the character after each."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def cross_entropy(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """Nats per character: tokens (B, T), the characters after them (B, T) → scalar."""
    return functional.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: weight decay for matrices, none for biases and norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    decayed: dict[str, Any] = {"params": matrices, "weight_decay": weight_decay}
    return [decayed, {"params": vectors, "weight_decay": 0.0}]


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """Mean cross-entropy, in nats per character."""
    total, blocks = 0.0, 0
    for tokens, targets in batches:
        total += float(cross_entropy(model, tokens.to(device), targets.to(device))) * len(tokens)
        blocks += len(tokens)
    return total / blocks


@torch.no_grad()
def generate(model: GPT, tokens: Tensor, length: int) -> Tensor:
    """`tokens` (T,) and `length` more, each sampled from the model's distribution of the next."""
    for _ in range(length):
        logits = model(tokens[None, -model.block_size :])[0, -1].float()
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)])
    return tokens
