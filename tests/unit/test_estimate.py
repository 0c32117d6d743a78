"""Memory plans: bytes by hand, models without memory, and whether a device holds them."""

import pytest
import torch
from torch import nn

from shared.estimate import (
    MemoryPlan,
    adamw_bytes,
    count,
    gradient_bytes,
    on_meta,
    parameter_bytes,
)


class Tied(nn.Module):
    """An embedding whose matrix is the output's too, and a buffer of whole numbers."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.output = nn.Linear(4, 10)
        self.output.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))


def test_a_tied_matrix_counts_once_and_a_buffer_keeps_its_type():
    model = on_meta(Tied)
    assert count(model) == 10 * 4 + 10
    assert parameter_bytes(model) == 50 * 4 + 3 * 8
    assert parameter_bytes(model, torch.float16) == 50 * 2 + 3 * 8


def test_only_trained_parameters_have_gradients_and_moments():
    model = on_meta(Tied)
    model.embedding.weight.requires_grad_(False)
    assert gradient_bytes(model.parameters()) == 10 * 4
    assert adamw_bytes(model.parameters()) == 2 * 10 * 4
    assert adamw_bytes(on_meta(lambda: nn.Linear(3, 2).half()).parameters()) == 2 * 8 * 2


def test_a_model_of_a_terabyte_needs_no_memory():
    huge = on_meta(lambda: nn.Linear(500_000, 500_000, bias=False))
    assert parameter_bytes(huge) == 10**12 and huge.weight.is_meta


def plan():
    made = MemoryPlan("probe, batch 1")
    made.add("weights", 15_130_000_000, "7.57 billion parameters in float16")
    made.add("activations", 2_000_000_000, "of one batch")
    return made


def test_the_table_adds_up():
    assert plan().total == 17_130_000_000
    assert plan().text().splitlines() == [
        "probe, batch 1",
        "  weights      15.13 GB  7.57 billion parameters in float16",
        "  activations   2.00 GB  of one batch",
        "  in all       17.13 GB  of each device",
        "no GPU is visible here: the figures are for one that has the memory",
    ]


@pytest.mark.parametrize(
    "size, verdict, advised",
    [
        (20_000_000_000, "card, 20.00 GB: fits, with 2.87 GB to spare", False),
        (16_000_000_000, "card, 16.00 GB: does not fit: it is short of 1.13 GB", True),
    ],
)
def test_a_device_is_told_whether_it_fits(size, verdict, advised):
    lines = plan().text([("card", size)], ["--batch-size 1", "--amp bf16"]).splitlines()
    assert lines[4] == verdict
    assert (lines[-1] == "what helps most: --batch-size 1; --amp bf16") == advised
