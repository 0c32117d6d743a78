"""Rewards for GRPO, for `--external_plugins plugin/plugin.py --reward_funcs NAME …`.

    external_vase_acc       how much of the reference the answer has, from 0 to 1
    external_vase_format    1 for <answer>…</answer>, with <think>…</think> before it or without

A reward of your own is a function beside these: `def my_reward(responses, references)` returns one
number for each response and is registered under its name (plugin/adapt.py). references are the
rows' solution, else the assistant's answer, else caption.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # repository root, for vasevqa

from vasevqa.model import rewards


def external_vase_acc(responses: Sequence[str], references: Sequence[str]) -> list[float]:
    """For each response, how much of its reference it has, from 0 to 1 (model/rewards.py).

    The answer is what stands inside <answer>, else all but <think>…</think>.
    """
    return [
        rewards.credit(rewards.answer_in(response), reference)
        for response, reference in zip(responses, references, strict=True)
    ]


def external_vase_format(responses: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for each response in the form that prompt.txt asks for, 0 for any other."""
    return [float(rewards.has_format(response)) for response in responses]
