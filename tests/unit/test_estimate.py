"""Memory plans: bytes by hand, models without memory, and whether a device holds them."""

import pytest
import torch
from torch import nn

from shared.estimate import (
    MemoryPlan,
    adamw_bytes,
    count,
    explained_out_of_memory,
    gradient_bytes,
    on_meta,
    parameter_bytes,
    saved_bytes,
    saved_bytes_in_half,
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
    "size, verdict",
    [
        (20_000_000_000, "card, 20.00 GB: fits, with 2.87 GB to spare"),
        (16_000_000_000, "card, 16.00 GB: does not fit: it is short of 1.13 GB"),
    ],
)
def test_a_device_is_told_whether_it_fits(size, verdict):
    lines = plan().text([("card", size)], ["--batch-size 1", "--amp bf16"]).splitlines()
    assert lines[4] == verdict
    assert lines[-1] == "what helps most: --batch-size 1; --amp bf16"


class Block(nn.Module):
    """Attention and a norm: what towers are made of. Sizes at which no two shapes are alike."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project = nn.LayerNorm(24), nn.Linear(24, 72)
        self.frozen = nn.Linear(24, 40).requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project(self.norm(tokens)).view(5, 11, 3, 2, 12).unbind(2)
        heads = [part.transpose(1, 2) for part in (query, key, value)]
        mixed = nn.functional.scaled_dot_product_attention(*heads)
        return self.frozen(torch.relu(mixed.transpose(1, 2).reshape(5, 11, 24)))


def bytes_kept_on_the_cpu(module: nn.Module, *inputs: torch.Tensor) -> int:
    """What autograd holds in a real forward pass, beside the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = module(*inputs)
    results = result if isinstance(result, tuple) else (result,)
    assert all(part.requires_grad for part in results)
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in parameters)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_kept_for_the_backward_pass_equals_a_real_pass(frozen):
    real, meta = Block(), on_meta(Block)
    if frozen:
        real.norm.requires_grad_(False), meta.norm.requires_grad_(False)
    expected = bytes_kept_on_the_cpu(real, torch.randn(5, 11, 24))
    assert saved_bytes(meta, lambda: meta(torch.empty(5, 11, 24, device="meta"))) == expected > 0


def test_under_autocast_too_with_the_copies_of_weights():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = bytes_kept_on_the_cpu(Block(), torch.randn(5, 11, 24))
    found = saved_bytes_in_half(Block, lambda m: m(torch.empty(5, 11, 24)), torch.bfloat16)
    assert found == expected


def other(num_bytes: int) -> MemoryPlan:
    made = MemoryPlan("other")
    made.add("all", num_bytes, "")
    return made


def test_the_three_best_settings_are_advised_and_none_that_saves_nothing():
    sizes = {"--a": 16.9e9, "--b": 10e9, "--c": 17.13e9, "--d": 17.0e9, "--e": 16e9}
    alternatives = {name: other(int(size)) for name, size in sizes.items()}
    assert plan().advised(alternatives) == [
        "--b (saves 7.13 GB)",
        "--e (saves 1.13 GB)",
        "--a (saves 0.23 GB)",
    ]
    assert plan().advised({"--c": other(17_130_000_000)}) == []


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate: out of memory"), True),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_an_error_for_want_of_memory_is_explained_and_goes_on(caplog, error, explained):
    with pytest.raises(RuntimeError) as caught, explained_out_of_memory(lambda: "the plan"):
        raise error
    assert caught.value is error
    assert ("the plan" in caplog.text) is explained


def test_a_plan_that_cannot_be_made_hides_no_error(caplog):
    with pytest.raises(torch.OutOfMemoryError), explained_out_of_memory(lambda: str(1 / 0)):
        raise torch.OutOfMemoryError("out of memory")
    assert "no memory plan: division by zero" in caplog.text
