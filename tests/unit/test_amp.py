"""Steps in mixed precision, what is not finite, early stopping, means."""

import math

import pytest
import torch
from torch import Tensor, nn

from shared.amp import Amp, EarlyStopping, Mean, NonFiniteError, has_stalled
from shared.distributed import World
from shared.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def weight() -> nn.Parameter:
    return nn.Parameter(torch.tensor([1.0, 2.0]))


def take_step(amp: Amp, weight: nn.Parameter, gradient: list[float], **options: float) -> float:
    """One step of SGD with learning rate 1 whose gradient is given; the norm it reports."""
    optimizer = torch.optim.SGD([weight], lr=1.0)
    amp.backward((weight * torch.tensor(gradient)).sum())
    return amp.step(optimizer, [weight], **options)


@pytest.mark.parametrize(
    ("gradient", "limit", "norm", "after"),
    [
        ([3.0, 4.0], math.inf, 5.0, [-2.0, -2.0]),
        ([3.0, 4.0], 1.0, 5.0, [0.4, 1.2]),  # (3, 4) at length 1 is (0.6, 0.8)
        ([0.3, 0.4], 1.0, 0.5, [0.7, 1.6]),  # shorter than the limit
    ],
)
def test_a_step_is_clipped_and_reports_the_norm_before(weight, gradient, limit, norm, after):
    assert take_step(Amp("off", CPU), weight, gradient, clip_norm=limit) == pytest.approx(norm)
    torch.testing.assert_close(weight.data, torch.tensor(after), rtol=0, atol=1e-5)
    assert weight.grad is None


def test_micro_batches_add_up_and_what_has_no_gradient_is_passed_over(weight):
    unused = nn.Parameter(torch.zeros(3))
    amp, optimizer = Amp("off", CPU), torch.optim.SGD([weight, unused], lr=1.0)
    for gradient in ([1.0, 0.0], [2.0, 4.0]):
        amp.backward((weight * torch.tensor(gradient)).sum())
    assert amp.step(optimizer, iter([weight, unused])) == 5.0
    assert weight.tolist() == [-2.0, -2.0] and unused.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_neither_weights_nor_the_optimizers_memory(weight, bad):
    amp, optimizer = Amp("off", CPU), torch.optim.AdamW([weight], lr=0.1)
    amp.backward(weight.sum())
    amp.step(optimizer, [weight])
    before = weight.tolist()
    amp.backward((weight * torch.tensor([bad, 1.0])).sum())
    assert not math.isfinite(amp.step(optimizer, [weight], clip_norm=1.0))
    assert weight.tolist() == before and weight.grad is None
    assert float(optimizer.state[weight]["step"]) == 1
    assert optimizer.state[weight]["exp_avg"].isfinite().all()


def test_bad_steps_in_a_row_raise_and_a_good_one_between_starts_the_count_anew(weight):
    amp = Amp("off", CPU, max_bad_steps=3)
    for value in (math.nan, math.nan, 1.0, math.nan, math.nan):
        take_step(amp, weight, [value, value])
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        take_step(amp, weight, [math.nan, 0.0])


def product() -> Tensor:
    return torch.ones(2, 2) @ torch.ones(2, 2)


def test_bf16_computes_in_bfloat16_off_and_full_precision_in_float32():
    amp = Amp("bf16", CPU)
    with amp.autocast():
        assert product().dtype is torch.bfloat16
        with amp.full_precision():
            assert product().dtype is torch.float32
    with Amp("off", CPU).autocast():
        assert product().dtype is torch.float32


def test_auto_is_off_on_the_cpu_and_fp16_is_refused_there():
    assert Amp("auto", CPU).mode == "off"
    with pytest.raises(UserError, match="--amp fp16 needs a GPU; allowed on the CPU: off, bf16"):
        Amp("fp16", CPU)


@pytest.mark.parametrize(("supported", "mode"), [(True, "bf16"), (False, "fp16")])
def test_auto_takes_bf16_on_gpus_that_compute_in_it_and_fp16_on_others(
    monkeypatch, supported, mode
):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: None)
    assert Amp("auto", torch.device("cuda", 0)).mode == mode


# --- early stopping and means ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patience", "values", "improved", "stops"),
    [
        (2, [1.0, 0.9, 0.9, 0.95], [True, True, False, False], True),
        (2, [1.0, 0.9, 0.95], [True, True, False], False),
        (2, [1.0, 1.1, 0.5, 0.6], [True, False, True, False], False),
        (1, [1.0, math.nan], [True, False], True),
        (1, [1.0, -math.inf], [True, False], True),
        (3, [math.nan, 2.0], [False, True], False),
    ],
)
def test_it_stops_after_as_many_updates_without_a_new_low_as_it_has_patience(
    patience, values, improved, stops, caplog
):
    """Continued, half way, in another instance."""
    first, second = EarlyStopping(patience), EarlyStopping(patience)
    found = [first.update(value) for value in values[:2]]
    second.load_state_dict(first.state_dict())
    found += [second.update(value) for value in values[2:]]
    assert found == improved
    assert second.should_stop == stops
    assert all(str(value) in caplog.text for value in values if not math.isfinite(value))
    second.reset()
    assert not second.should_stop and second.update(5.0)


@pytest.mark.parametrize(
    ("best_epoch", "epoch", "patience", "stalled"),
    [(3, 3, 1, False), (3, 4, 1, True), (3, 4, 2, False), (0, 2, 2, True), (1, 99, None, False)],
)
def test_epochs_behind_the_best_one_are_counted(best_epoch, epoch, patience, stalled):
    assert has_stalled(best_epoch, epoch, patience) == stalled


def test_a_mean_weighs_its_values_continues_from_its_state_and_forgets():
    value = torch.tensor(1.0, requires_grad=True)
    mean, other = Mean(World()), Mean(World())
    mean.add(value, weight=3)
    assert not mean.state_dict()["sums"].requires_grad
    other.load_state_dict(mean.state_dict())
    mean.add(torch.tensor(100.0))  # the state is a copy
    other.add(torch.tensor(5.0), weight=1)
    assert other.value() == 2.0
    other.reset()
    assert math.isnan(other.value())


def test_a_long_mean_of_small_numbers_stays_exact():
    mean = Mean(World())
    mean.add(torch.tensor(1.0), weight=2**25)
    for _ in range(100):
        mean.add(torch.tensor(1.0))  # in float32 2**25 + 1 is 2**25
    assert float(mean.state_dict()["sums"][1]) == 2**25 + 100
