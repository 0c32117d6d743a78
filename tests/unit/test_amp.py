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


def test_a_step_is_the_optimizers_and_reports_the_norm(weight: nn.Parameter) -> None:
    assert take_step(Amp("off", CPU), weight, [3.0, 4.0]) == 5.0
    assert weight.tolist() == [-2.0, -2.0]
    assert weight.grad is None


def test_clipping_shortens_the_gradient_and_reports_the_norm_before(weight: nn.Parameter) -> None:
    norm = take_step(Amp("off", CPU), weight, [3.0, 4.0], clip_norm=1.0)
    assert norm == 5.0
    # (3, 4) at length 1 is (0.6, 0.8)
    torch.testing.assert_close(weight.data, torch.tensor([0.4, 1.2]), rtol=0, atol=1e-5)


def test_a_gradient_shorter_than_the_limit_stays(weight: nn.Parameter) -> None:
    take_step(Amp("off", CPU), weight, [0.3, 0.4], clip_norm=1.0)
    torch.testing.assert_close(weight.data, torch.tensor([0.7, 1.6]), rtol=0, atol=1e-6)


def test_micro_batches_add_up(weight: nn.Parameter) -> None:
    amp, optimizer = Amp("off", CPU), torch.optim.SGD([weight], lr=1.0)
    for gradient in ([1.0, 0.0], [2.0, 4.0]):
        amp.backward((weight * torch.tensor(gradient)).sum())
    assert amp.step(optimizer, [weight]) == 5.0
    assert weight.tolist() == [-2.0, -2.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_gradients_that_are_not_finite_is_not_applied(
    weight: nn.Parameter, bad: float
) -> None:
    norm = take_step(Amp("off", CPU), weight, [bad, 1.0], clip_norm=1.0)
    assert not math.isfinite(norm)
    assert weight.tolist() == [1.0, 2.0]
    assert weight.grad is None


def test_a_bad_step_leaves_the_optimizers_memory_alone(weight: nn.Parameter) -> None:
    amp, optimizer = Amp("off", CPU), torch.optim.AdamW([weight], lr=0.1)
    for gradient in (1.0, math.nan):
        amp.backward((weight * gradient).sum())
        amp.step(optimizer, [weight])
    assert float(optimizer.state[weight]["step"]) == 1
    assert optimizer.state[weight]["exp_avg"].isfinite().all()


def test_bad_steps_in_a_row_raise_and_a_good_one_between_starts_the_count_anew(
    weight: nn.Parameter,
) -> None:
    amp = Amp("off", CPU, max_bad_steps=3)
    for value in (math.nan, math.nan, 1.0, math.nan, math.nan):
        take_step(amp, weight, [value, value])
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        take_step(amp, weight, [math.nan, 0.0])


def test_the_count_goes_on_after_a_resume(weight: nn.Parameter) -> None:
    before, after = Amp("off", CPU, max_bad_steps=2), Amp("off", CPU, max_bad_steps=2)
    take_step(before, weight, [math.nan, 0.0])
    after.load_state_dict(before.state_dict())
    with pytest.raises(NonFiniteError):
        take_step(after, weight, [math.nan, 0.0])


def test_parameters_without_gradient_are_passed_over(weight: nn.Parameter) -> None:
    unused = nn.Parameter(torch.zeros(3))
    amp, optimizer = Amp("off", CPU), torch.optim.SGD([weight, unused], lr=1.0)
    amp.backward(weight.sum())
    assert amp.step(optimizer, iter([weight, unused])) == pytest.approx(math.sqrt(2))
    assert unused.tolist() == [0.0, 0.0, 0.0]


def product() -> Tensor:
    return torch.ones(2, 2) @ torch.ones(2, 2)


def test_bf16_computes_in_bfloat16_on_the_cpu_and_full_precision_switches_it_off() -> None:
    amp = Amp("bf16", CPU)
    with amp.autocast():
        assert product().dtype is torch.bfloat16
        with amp.full_precision():
            assert product().dtype is torch.float32
        assert product().dtype is torch.bfloat16


def test_off_computes_in_float32() -> None:
    with Amp("off", CPU).autocast():
        assert product().dtype is torch.float32


def test_auto_is_off_on_the_cpu_and_fp16_is_refused_there() -> None:
    assert Amp("auto", CPU).mode == "off"
    with pytest.raises(UserError, match="--amp fp16 needs a GPU; allowed on the CPU: off, bf16"):
        Amp("fp16", CPU)


@pytest.mark.parametrize(("supported", "mode"), [(True, "bf16"), (False, "fp16")])
def test_auto_takes_bf16_on_gpus_that_compute_in_it_and_fp16_on_others(
    monkeypatch: pytest.MonkeyPatch, supported: bool, mode: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *_, **__: None)
    assert Amp("auto", torch.device("cuda", 0)).mode == mode


def test_the_state_holds_plain_types() -> None:
    assert Amp("bf16", CPU).state_dict() == {"scaler": {}, "bad_steps": 0}


# --- early stopping and means ---------------------------------------------------------------------


def test_it_stops_after_as_many_updates_without_a_new_low_as_it_has_patience() -> None:
    stopping = EarlyStopping(patience=2)
    decisions = []
    for value in (1.0, 0.9, 0.9, 0.95):
        stopping.update(value)
        decisions.append(stopping.should_stop)
    assert decisions == [False, False, False, True]
    assert stopping.best == 0.9


def test_an_improvement_starts_the_count_anew() -> None:
    stopping = EarlyStopping(patience=2)
    assert [stopping.update(value) for value in (1.0, 1.1, 0.5, 0.6)] == [True, False, True, False]
    assert not stopping.should_stop


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_no_improvement(
    value: float, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = EarlyStopping(patience=1)
    stopping.update(1.0)
    assert not stopping.update(value)
    assert stopping.should_stop
    assert stopping.best == 1.0
    assert str(value) in caplog.text


def test_a_first_value_of_nan_does_not_hide_later_improvements() -> None:
    stopping = EarlyStopping(patience=3)
    assert [stopping.update(value) for value in (math.nan, 2.0)] == [False, True]


def test_reset_forgets_best_and_count() -> None:
    stopping = EarlyStopping(patience=1)
    stopping.update(0.1)
    stopping.update(0.2)
    stopping.reset()
    assert not stopping.should_stop
    assert stopping.update(5.0)


def test_the_state_continues_in_another_instance() -> None:
    before = EarlyStopping(patience=3)
    for value in (1.0, 1.2):
        before.update(value)
    after = EarlyStopping(patience=3)
    after.load_state_dict(before.state_dict())
    for value in (1.0, 1.0):
        assert not after.update(value)
    assert after.should_stop


@pytest.mark.parametrize(
    ("best_epoch", "epoch", "patience", "stalled"),
    [(3, 3, 1, False), (3, 4, 1, True), (3, 4, 2, False), (0, 2, 2, True), (1, 99, None, False)],
)
def test_epochs_behind_the_best_one_are_counted(best_epoch, epoch, patience, stalled) -> None:
    assert has_stalled(best_epoch, epoch, patience) == stalled


def test_a_mean_weighs_its_values() -> None:
    mean = Mean(World())
    mean.add(torch.tensor(1.0), weight=3)
    mean.add(torch.tensor(5.0), weight=1)
    assert mean.value() == 2.0


def test_the_mean_of_nothing_is_nan_and_reset_forgets() -> None:
    mean = Mean(World())
    mean.add(torch.tensor(1.0))
    mean.reset()
    assert math.isnan(mean.value())


def test_a_mean_keeps_no_graph_and_continues_from_its_state() -> None:
    value = torch.tensor(2.0, requires_grad=True)
    mean, other = Mean(World()), Mean(World())
    mean.add(value * 2)
    assert not mean.state_dict()["sums"].requires_grad
    other.load_state_dict(mean.state_dict())
    mean.add(torch.tensor(100.0))  # the state is a copy
    other.add(torch.tensor(8.0))
    assert other.value() == 6.0


def test_a_long_mean_of_small_numbers_stays_exact() -> None:
    mean = Mean(World())
    mean.add(torch.tensor(1.0), weight=2**25)
    for _ in range(100):
        mean.add(torch.tensor(1.0))  # in float32 2**25 + 1 is 2**25
    assert float(mean.state_dict()["sums"][1]) == 2**25 + 100
