"""Registers the plain reward functions of the run's plugins as ORMs, which swift calls.

./grpo.sh names this file after the plugins. A function `def f(responses, references)` becomes
`orms['f']`; what a plugin registers by itself stays as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from swift.rewards import ORM, orms
from swift.utils import import_external_file

Reward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
_PARAMETERS = ({"responses", "completions"}, {"references", "solutions", "solution"})


def as_orm(function: Reward) -> type[ORM]:
    """A class, named as the function, whose instances call it with responses and references."""

    def call(self: ORM, completions: Sequence[str], **columns: Any) -> list[float]:
        scores = [float(score) for score in function(completions, references_of(columns))]
        if len(scores) != len(completions):
            raise ValueError(
                f"{function.__name__} returned {len(scores)} scores for {len(completions)} answers"
            )
        return scores

    return type(function.__name__, (ORM,), {"__call__": call, "__doc__": function.__doc__})


def references_of(columns: dict[str, Any]) -> list[str]:
    """Each row's solution, or else its caption. Raises ValueError when there are neither."""
    for name in ("solution", "caption"):
        if columns.get(name) is not None:
            return [str(text) for text in columns[name]]
    raise ValueError("rows have neither solution nor caption: nothing to reward by")


def plain_rewards(module: ModuleType) -> Iterator[Reward]:
    """The functions of a plugin that take (responses, references)."""
    for name, function in vars(module).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            words = list(inspect.signature(function).parameters)
            pairs = zip(words, _PARAMETERS, strict=False)
            if len(words) == 2 and all(word in allowed for word, allowed in pairs):
                yield function


def _plugins() -> Iterator[str]:
    """The files that this command line names as plugins, but this one."""
    if "--external_plugins" in sys.argv:
        for word in sys.argv[sys.argv.index("--external_plugins") + 1 :]:
            if word.startswith("--"):
                return
            if Path(word).resolve() != Path(__file__).resolve():
                yield word


for plugin in _plugins():
    for reward in plain_rewards(import_external_file(plugin)):
        orms.setdefault(reward.__name__, as_orm(reward))
