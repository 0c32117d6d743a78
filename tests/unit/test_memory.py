"""Memory plans: a step's bytes by hand, without values; whether a device holds them."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shared.memory import CUDA_CONTEXT, Plan, counted, explained_out_of_memory

F = 4  # bytes of a float32


class Tied(nn.Module):
    """An embedding whose matrix is the output's too, and a buffer of whole numbers."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.output = nn.Linear(4, 10)
        self.output.weight = self.embedding.weight
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))


def beginning(build: Callable[[], nn.Module]) -> dict[str, int]:
    """What is there before a step with AdamW. Call it in `counted`."""
    with counted() as live:
        model = build()
        trained = [p for p in model.parameters() if p.requires_grad]
        live.begin(model, torch.optim.AdamW(trained))
    return {kind: size for kind, size in live.peak.items() if size}


def test_a_tied_matrix_counts_once_and_a_buffer_keeps_its_type():
    assert beginning(Tied) == {"weights": 50 * F + 3 * 8, "optimizer": 2 * 50 * F}
    half = beginning(lambda: Tied().to(torch.float16))
    assert half == {"weights": 50 * 2 + 3 * 8, "optimizer": 2 * 50 * 2}


def test_only_what_is_trained_has_moments_and_a_terabyte_needs_no_memory():
    def frozen() -> nn.Module:
        model = nn.Linear(500_000, 500_000)
        model.weight.requires_grad_(False)
        return model

    size = 500_000 * F
    assert beginning(frozen) == {"weights": 10**12 + size, "optimizer": 2 * size}


def step_of(layers: int, *, recomputed: bool = False, half: bool = False) -> dict[str, int]:
    """The peak of a step of SGD: square layers of 64 with a ReLU each, on 1000 rows."""
    with counted() as live:
        model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(layers))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        rows = torch.empty(1000, 64)
        live.begin(model, optimizer)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            for layer in model:
                inside = nn.Sequential(layer, nn.ReLU())
                rows = checkpoint(inside, rows, use_reentrant=False) if recomputed else inside(rows)
            loss = rows.float().sum()
        loss.backward()
        optimizer.step()
    return dict(live.peak)


def test_a_step_by_hand():
    matrix, rows = 64 * 64 * F, 1000 * 64 * F
    found = step_of(5)
    assert found["weights"] == 5 * matrix and not found.get("optimizer")
    # The backward pass of the last layer: the input and five ReLUs are there, the gradients of the
    # layer's two sides, and that of its matrix.
    held = found["activations"] + found.get("gradients", 0)
    assert held == pytest.approx(8 * rows + matrix, abs=100)


def test_the_largest_moment_counts_not_the_last():
    with counted() as live:
        model = nn.Linear(1, 1)
        live.begin(model)
        first = torch.empty(1000)
        del first
        torch.empty(10)
    assert live.peak["activations"] == 1000 * F


def test_dropout_keeps_a_byte_of_each_value_as_on_a_gpu():
    def kept(dropout: float) -> int:
        with counted() as live:
            model = nn.Linear(8, 8)
            rows = torch.empty(1000, 8, requires_grad=True)
            live.begin(model)
            out = nn.functional.dropout(model(rows), dropout, training=True)
            out = nn.functional.dropout(out, 0.5, training=False)
        assert out.shape == (1000, 8)
        return live.peak["activations"]

    assert kept(0.1) - kept(0.0) == 1000 * 8 * (F + 1)


def test_the_table_names_what_each_process_holds_beside_the_step():
    with counted() as live:
        model = nn.Linear(1000, 1000)
        live.begin(model, torch.optim.SGD(model.parameters(), momentum=0.9))
    rows = {
        what: size for what, size, _ in live.plan("a step", "rows", wrapped=model, processes=4).rows
    }
    size = 1000 * 1001 * F
    assert (rows["weights"], rows["optimizer"], rows["DDP"]) == (size, size, size)
    assert rows["CUDA"] == CUDA_CONTEXT
    alone = live.plan("a step", "rows", wrapped=model, processes=1)
    assert "DDP" not in [what for what, _, _ in alone.rows]
    assert "1.00 M parameters, all trained" in alone.text() and "SGD" in alone.text()


def plan():
    made = Plan("probe, batch 1")
    made.add("weights", 15_130_000_000, "7.57 billion parameters in float16")
    made.add("activations", 2_000_000_000, "of one batch")
    return made


def test_the_table_adds_up_and_what_is_small_is_in_megabytes():
    small = Plan("demo")
    small.add("weights", 2_640_000, "0.66 M parameters")
    assert small.text().splitlines()[1] == "  weights  2.6 MB  0.66 M parameters"
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


def other(num_bytes: int) -> Plan:
    made = Plan("other")
    made.add("all", num_bytes, "")
    return made


def test_the_three_best_settings_are_advised_and_none_that_saves_nothing():
    sizes = {"--a": 16.9e9, "--b": 10e9, "--c": 17.13e9, "--d": 17.0e9, "--e": 16e9}
    alternatives = {name: other(int(size)) for name, size in sizes.items()}
    assert plan().advice(alternatives) == [
        "--b (saves 7.13 GB)",
        "--e (saves 1.13 GB)",
        "--a (saves 0.23 GB)",
    ]
    assert plan().advice(alternatives, "--a")[:2] == ["--a (saves 0.23 GB)", "--b (saves 7.13 GB)"]
    assert plan().advice({"--c": other(17_130_000_000)}) == []


@pytest.mark.parametrize(
    ("error", "explained"),
    [
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
