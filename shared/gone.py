"""Flags of earlier versions, and what to type instead. Standard library only."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise

from shared.errors import UserError

INSTEAD = {  # a flag, a flag with one of its values, a command with one of its words
    "--notify": "to act on the end of a run, type python shared/tools/monitor.py --follow; COMMAND",
    "--shard-head": "leave it out; every process holds the whole head",
    "--sample-rate": "leave it out; every step compares with all identities",
    "--attention": "leave it out; attention is torch's fused one, with the same numbers",
    "--at-mode cosine": "type zagoruyko, equal but for a factor; kl_minmax for probability maps",
    "report.py compare": "to compare runs, type tensorboard --logdir with the directory above them",
}


def refuse(argv: list[str], known: Collection[str] = ()) -> None:
    """Raise UserError for a flag of `argv` that is gone and not among the `known` ones."""
    for word, following in pairwise([*argv, ""]):
        name, equals, value = word.partition("=")
        for flag in (name, f"{name} {value if equals else following}"):
            if flag in INSTEAD and flag not in known:
                raise UserError(f"{flag} is gone: {INSTEAD[flag]}")
