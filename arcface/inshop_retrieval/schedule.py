"""The learning rate of every step and the optimizers, as a configuration describes them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from arcface.inshop_retrieval.config import checked
from arcface.inshop_retrieval.recipe import Recipe
from shared.errors import UserError, did_you_mean, shown
from shared.settings import Range, number

if TYPE_CHECKING:  # schedules are checked before torch is imported
    from torch import nn
    from torch.optim import Optimizer

log = logging.getLogger(__name__)

Factor = Callable[[int], float]
_KINDS: dict[str, dict[str, Any]] = {  # the settings of each, beside those that all have
    "LinearLR": {"start_factor": 1 / 3, "end_factor": 1.0},
    "CosineAnnealingLR": {"T_max": None, "eta_min": 0.0},
    "ConstantLR": {"factor": 1 / 3},
    "MultiStepLR": {"milestones": (), "gamma": 0.1},
}
_ALL = {"begin": 0.0, "end": math.inf, "by_epoch": True, "convert_to_iter_based": False}


def learning_rate_factor(schedulers: Any, steps_per_epoch: int, base_lr: float) -> Factor:
    """The function from steps done (0, 1, …) to the factor of `base_lr` for the next step.

    The factors of the entries are multiplied. Each acts from `begin` on and stays as it is from
    `end` on (epochs, or steps when by_epoch is False):
    LinearLR from start_factor to end_factor, which its last tick has;
    CosineAnnealingLR over T_max (default: end - begin) from 1 to eta_min;
    ConstantLR with `factor` until its last tick, 1 from there;
    MultiStepLR times `gamma` at each of `milestones`.
    A tick is an epoch, or a step when by_epoch is False or convert_to_iter_based is True.
    Source: the documented semantics of mmengine's parameter schedulers; Loshchilov & Hutter 2017,
    SGDR, eq. 5 (arXiv:1608.03983) for the cosine.
    Raises UserError for an entry that is not known or lacks a number.
    """
    entries = schedulers if isinstance(schedulers, list | tuple) else [schedulers]
    parts = [
        _factor(entry, f"param_scheduler.{place}", steps_per_epoch, base_lr)
        for place, entry in enumerate(entries)
    ]
    return lambda step: math.prod(part(step) for part in parts)


def _factor(entry: Any, name: str, steps_per_epoch: int, base_lr: float) -> Factor:
    """The factor of one entry, by steps done."""
    if not isinstance(entry, dict):
        raise UserError(f"{name} is {shown(entry)}, expected dict(…)")
    kind = entry.get("type")
    if kind not in _KINDS:
        near = did_you_mean(str(kind), _KINDS)
        raise UserError(f"{name}.type is {shown(kind)}, allowed: {', '.join(_KINDS)}{near}")
    settings = _settings(entry, name, kind)
    every_step = settings["convert_to_iter_based"] or not settings["by_epoch"]
    unit = (
        steps_per_epoch if settings["by_epoch"] and every_step else 1
    )  # of begin, end, T_max, in ticks
    begin, end = settings["begin"] * unit, settings["end"] * unit
    shape = _shape(kind, settings, end - begin, unit, base_lr)

    def factor(step: int) -> float:
        tick = step if every_step else step // steps_per_epoch
        return shape(min(tick, end - 1) - begin) if tick >= begin else 1.0

    return factor


def _settings(entry: dict[str, Any], name: str, kind: str) -> dict[str, Any]:
    settings = checked(entry, name, **_ALL, **_KINDS[kind])
    for key, value in settings.items():
        if key in ("by_epoch", "convert_to_iter_based"):
            if not isinstance(value, bool):
                raise UserError(f"{name}.{key} is {shown(value)}, expected True or False")
        elif key == "milestones":
            settings[key] = [
                number(f"{name}.{key}", one, float, Range()) for one in _listed(name, value)
            ]
        elif key in entry and value is not None:
            settings[key] = number(f"{name}.{key}", value, float, Range())
    if kind == "CosineAnnealingLR" and settings["T_max"] is None:
        settings["T_max"] = settings["end"] - settings["begin"]
    if kind == "CosineAnnealingLR" and not 0 < settings["T_max"] < math.inf:
        raise UserError(f"{name}.T_max is missing or 0: give it, or begin and end")
    return settings


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list | tuple):
        raise UserError(f"{name}.milestones is {shown(value)}, expected a list of numbers")
    return list(value)


def _shape(
    kind: str, settings: dict[str, Any], length: float, unit: int, base_lr: float
) -> Callable[[float], float]:
    """The factor by ticks since `begin`."""
    if kind == "LinearLR":
        first, last = settings["start_factor"], settings["end_factor"]
        span = max(1.0, length - 1)
        return lambda done: first + (last - first) * done / span
    if kind == "CosineAnnealingLR":
        period, lowest = settings["T_max"] * unit, settings["eta_min"] / base_lr
        return lambda done: lowest + (1 - lowest) * (1 + math.cos(math.pi * done / period)) / 2
    if kind == "ConstantLR":
        return lambda done: settings["factor"] if done < length - 1 else 1.0
    milestones = [milestone * unit for milestone in settings["milestones"]]
    return lambda done: settings["gamma"] ** sum(milestone <= done for milestone in milestones)


# --- optimizers -----------------------------------------------------------------------------------


def build_optimizers(
    recipe: Recipe, encoder: nn.Module, head: nn.Module, lr: float
) -> tuple[Optimizer, Optimizer | None]:
    """The optimizer of encoder and head; of a sharded head, one for each.

    encoder: the backbone, whose parameters the configuration calls image_encoder.0.….
    """
    parts = {"image_encoder.0": encoder, "head": head}
    _warn_of_unused_keys(recipe, parts)
    if not recipe.is_sharded:
        return _optimizer(recipe, parts, lr), None
    first, second = ({name: part} for name, part in parts.items())
    return _optimizer(recipe, first, lr), _optimizer(recipe, second, lr)


def _optimizer(recipe: Recipe, parts: dict[str, nn.Module], lr: float) -> Optimizer:
    """The optimizer of all parameters of `parts`, by their names in the configuration.

    A key of paramwise_cfg.custom_keys acts on the parameters whose name holds it
    (image_encoder.0.layer1.0.conv1.weight, head.weight), the longest key first; norm_decay_mult and
    bias_decay_mult on those that no key has.
    """
    import torch

    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter, kind in _named_parameters(parts):
        groups.setdefault(_multipliers(recipe, name, kind), []).append(parameter)
    entries = [
        {"params": members, "lr": lr * lr_mult, "weight_decay": recipe.weight_decay * decay_mult}
        for (lr_mult, decay_mult), members in groups.items()
    ]
    options: dict[str, Any] = {"lr": lr, "weight_decay": recipe.weight_decay, "fused": True}
    if recipe.optimizer == "AdamW":
        return torch.optim.AdamW(entries, eps=recipe.eps, betas=tuple(recipe.betas), **options)
    return torch.optim.SGD(
        entries, momentum=recipe.momentum, nesterov=recipe.nesterov, dampening=recipe.dampening,
        **options,
    )  # fmt: skip


def _warn_of_unused_keys(recipe: Recipe, parts: dict[str, nn.Module]) -> None:
    """A warning for each custom key that no parameter's name holds."""
    names = [name for name, _, _ in _named_parameters(parts)]
    for key in dict(recipe.custom_keys or {}):
        if not any(key in name for name in names):
            log.warning("optim_wrapper.paramwise_cfg.custom_keys.%s: no parameter has it", key)


def _named_parameters(parts: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter, str]]:
    """Every parameter with its name and kind: norm, bias or weight."""
    from torch import nn

    norms = (
        *(nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm),
        *(nn.LayerNorm, nn.GroupNorm),
    )
    for prefix, part in parts.items():
        for place, module in part.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                kind = "norm" if isinstance(module, norms) else name
                yield ".".join(filter(None, (prefix, place, name))), parameter, kind


def _multipliers(recipe: Recipe, name: str, kind: str) -> tuple[float, float]:
    """What multiplies the learning rate and the weight decay of a parameter."""
    for key, factors in sorted(
        dict(recipe.custom_keys or {}).items(), key=lambda item: -len(item[0])
    ):
        if key in name:
            return factors.get("lr_mult", 1.0), factors.get("decay_mult", 1.0)
    return 1.0, {"norm": recipe.norm_decay, "bias": recipe.bias_decay}.get(kind, 1.0)


def parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    """What the optimizer trains."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class LearningRate:
    """Sets the learning rate of every step; what it was when the optimizers were built is 1."""

    def __init__(self, optimizers: list[Optimizer], factor: Factor) -> None:
        self._factor = factor
        self._bases = [(one, [group["lr"] for group in one.param_groups]) for one in optimizers]

    def set(self, step: int) -> float:
        """Set the rates for the step after `step` steps; returns the first one."""
        factor = self._factor(step)
        for optimizer, bases in self._bases:  # a restored optimizer has other group objects
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
        return float(self._bases[0][0].param_groups[0]["lr"])
