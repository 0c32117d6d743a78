"""Torch's optimizers as the recipe's `optim_wrapper` describes them, and the rate of each step."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import nn

from arcface.recipe import Optimizer
from arcface.schedule import Factor

log = logging.getLogger(__name__)

_NORMS = (
    *(nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm),
    nn.modules.instancenorm._InstanceNorm,
)
Named = Iterable[tuple[str, nn.Module]]


def build_optimizer(settings: Optimizer, parts: Named, lr: float) -> torch.optim.Optimizer:
    """The optimizer of all parameters of `parts`, pairs of a name and a module.

    A key of paramwise_cfg.custom_keys acts on the parameters whose name holds it, the longest key
    first; norm_decay_mult and bias_decay_mult on those that no key has. Names are those of the
    configuration: image_encoder.0.layer1.0.conv1.weight, head.weight.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter, kind in _named_parameters(parts):
        groups.setdefault(_multipliers(settings, name, kind), []).append(parameter)
    decay = settings.options["weight_decay"]
    entries = [
        {"params": members, "lr": lr * lr_mult, "weight_decay": decay * decay_mult}
        for (lr_mult, decay_mult), members in groups.items()
    ]
    kind = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[settings.kind]
    return kind(entries, lr=lr, fused=True, **settings.options)


def unused_keys(settings: Optimizer, parts: Named) -> list[str]:
    """The custom keys that no parameter's name holds."""
    names = [name for name, _, _ in _named_parameters(parts)]
    keys = [key for key, _, _ in settings.custom_keys]
    return [key for key in keys if not any(key in name for name in names)]


def _named_parameters(parts: Named) -> Iterable[tuple[str, nn.Parameter, str]]:
    """Every parameter with its name and kind: norm, bias or weight."""
    for prefix, part in parts:
        for place, module in part.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                kind = "norm" if isinstance(module, _NORMS) else name
                yield ".".join(filter(None, (prefix, place, name))), parameter, kind


def _multipliers(settings: Optimizer, name: str, kind: str) -> tuple[float, float]:
    """What multiplies the learning rate and the weight decay of a parameter."""
    for key, lr_mult, decay_mult in sorted(settings.custom_keys, key=lambda entry: -len(entry[0])):
        if key in name:
            return lr_mult, decay_mult
    return 1.0, {"norm": settings.norm_decay_mult, "bias": settings.bias_decay_mult}.get(kind, 1.0)


class LearningRate:
    """Sets the learning rate of every step; what it was when the optimizers were built is 1."""

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer], factor: Factor) -> None:
        self._factor = factor
        self._bases = [(one, [group["lr"] for group in one.param_groups]) for one in optimizers]

    def set(self, step: int) -> float:
        """Set the rates for the step after `step` steps; returns the first one."""
        factor = self._factor(step)
        for optimizer, bases in self._bases:  # a restored optimizer has other group objects
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base * factor
        return float(self._bases[0][0].param_groups[0]["lr"])
