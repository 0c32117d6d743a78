"""The learning rate over training, as a configuration's `param_scheduler` list describes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from arcface.section import Section
from shared.errors import UserError

Factor = Callable[[int], float]
Shape = Callable[[float], float]
_KINDS = ("LinearLR", "CosineAnnealingLR", "ConstantLR", "MultiStepLR")


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
        _factor(Section(entry, f"param_scheduler.{number}"), steps_per_epoch, base_lr)
        for number, entry in enumerate(entries)
    ]
    return lambda step: math.prod(part(step) for part in parts)


def _factor(entry: Section, steps_per_epoch: int, base_lr: float) -> Factor:
    """The factor of one entry, by steps done."""
    kind = entry.one_of("type", _KINDS)
    by_epoch = entry.flag("by_epoch", True)
    every_step = entry.flag("convert_to_iter_based", False) or not by_epoch
    unit = steps_per_epoch if by_epoch and every_step else 1  # of begin, end and T_max, in ticks
    begin = entry.number("begin", 0.0, low=0) * unit
    end = entry.number("end", math.inf, low=0) * unit
    shape = {
        "LinearLR": _linear,
        "CosineAnnealingLR": _cosine,
        "ConstantLR": _constant,
        "MultiStepLR": _multi_step,
    }[kind](entry, end - begin, unit, base_lr)
    entry.refuse_rest()

    def factor(step: int) -> float:
        tick = step if every_step else step // steps_per_epoch
        return shape(min(tick, end - 1) - begin) if tick >= begin else 1.0

    return factor


def _linear(entry: Section, length: float, _unit: int, _base: float) -> Shape:
    first, last = entry.number("start_factor", 1 / 3, low=0), entry.number("end_factor", 1.0, low=0)
    span = max(1.0, length - 1)
    return lambda done: first + (last - first) * done / span


def _cosine(entry: Section, length: float, unit: int, base_lr: float) -> Shape:
    given = entry.number("T_max", None, above=0)
    period = length if given is None else given * unit
    if not 0 < period < math.inf:
        raise UserError(f"{entry.name}.T_max is missing: give it, or begin and end")
    lowest = entry.number("eta_min", 0.0, low=0) / base_lr
    return lambda done: lowest + (1 - lowest) * (1 + math.cos(math.pi * done / period)) / 2


def _constant(entry: Section, length: float, _unit: int, _base: float) -> Shape:
    factor = entry.number("factor", 1 / 3, low=0)
    return lambda done: factor if done < length - 1 else 1.0


def _multi_step(entry: Section, _length: float, unit: int, _base: float) -> Shape:
    milestones = [number * unit for number in entry.numbers("milestones")]
    gamma = entry.number("gamma", 0.1, low=0)
    return lambda done: gamma ** sum(milestone <= done for milestone in milestones)
