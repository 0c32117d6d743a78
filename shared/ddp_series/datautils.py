"""The data of the series: seeded points, each with a number to be predicted from it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

NUM_INPUTS = 20
_NOISE = 0.01  # standard deviation; its square is the lowest loss that there is to reach


class MyTrainDataset(Dataset[tuple[Tensor, Tensor]]):
    """`size` pairs: a point (20,) in [-1, 1) and its target (1,): a slope, a bend, some noise."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)  # the same data in every process
        self.points = 2 * torch.rand(size, NUM_INPUTS, generator=generator) - 1
        slope = torch.randn(NUM_INPUTS, 1, generator=generator) / NUM_INPUTS**0.5
        bend = self.points[:, :1] * self.points[:, 1:2]
        noise = torch.randn(size, 1, generator=generator)
        self.targets = self.points @ slope + bend + _NOISE * noise

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.points[index], self.targets[index]
