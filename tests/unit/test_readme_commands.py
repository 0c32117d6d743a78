"""No command of any page is without a test that runs it, or a word on what it needs.

The tables are in the tests that run the commands, most of them in tests/full.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable

import pytest

from tests.pages import IN_BOTH_LANGUAGES, ROOT, chinese, commands, text_of

pytestmark = pytest.mark.slow  # the tests' modules import torch

OF_MANY, OF_FILTERS = (
    "tests.full.test_documented_commands",
    "tests.full.test_vasevqa_filter_commands",
)
OWN = {  # page -> the modules with its tables, and the tables' names
    "lavic/README.md": {"tests.full.test_lavic_commands": ("IN_RECIPE", "IN_SRC", "NEEDS")},
    "multimodal/README.md": {"tests.full.test_multimodal_commands": ("HERE", "ELSEWHERE", "NEEDS")},
    "vasevqa/README.md": {
        "tests.full.test_vasevqa_commands": ("HERE", "ELSEWHERE", "NEEDS"),
        OF_FILTERS: ("COMMANDS",),
    },
}
OTHERS = {OF_MANY: ("HERE", "ELSEWHERE", "NEEDS")}
SERIES = "shared/ddp_series/README.md"  # its own test takes what it runs from the page itself


def in_tests(page: str) -> set[str]:
    """The commands that the tests of the page run, or give a reason for."""
    found: set[str] = set()
    for module, names in OWN.get(page, OTHERS).items():
        for name in names:
            table: Iterable[str] = getattr(importlib.import_module(module), name)
            found |= set(table)
    return found


WITHOUT = "shared/README.md"  # for those who write a training: no commands


@pytest.mark.parametrize("page", [p for p in IN_BOTH_LANGUAGES if p not in (SERIES, WITHOUT)])
def test_every_command_of_a_page_is_in_a_test(page: str):
    assert commands(text_of(page))
    assert set(commands(text_of(page))) <= in_tests(page)
    assert set(commands(text_of(chinese(page)))) <= in_tests(page)


def test_the_series_runs_what_its_page_has_but_for_what_needs_more_than_one_machine():
    from tests.unit import test_ddp_series_readme as series

    left = [line for line in series.commands() if line.startswith(series.ELSEWHERE)]
    assert len(series.commands()) - len(left) == 10
    for line in left:
        assert re.match(r"torchrun .*(gpu|nnodes=2) |sbatch |cd |source ", line), line


def test_commands_for_contributors_are_there():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    for command in commands(text_of("CONTRIBUTING.md")):
        program, *words = command.split()
        if program == "make":
            assert set(words) <= set(targets), command
        else:
            assert [w for w in words if "/" in w and not (ROOT / w).is_file()] == [], command
            assert (ROOT / program).is_file(), command
