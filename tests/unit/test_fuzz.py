"""Damaged copies of every reader's input, in the full tier thousands; see tests/fuzzing.py."""

import os

import pytest

from tests import fuzz_readers, fuzz_recipes, fuzz_state, fuzzing
from tests.fuzzing import Reader

READERS = {**fuzz_readers.READERS, **fuzz_recipes.READERS, **fuzz_state.READERS}


@pytest.mark.parametrize(
    ("cases", "timeout"),
    [(200, 100), pytest.param(10_000, 850, marks=(pytest.mark.full, pytest.mark.limit(900)))],
)
@pytest.mark.parametrize("name", READERS)
def test_damage_ends_in_a_result_or_in_one_line(name, cases, timeout):
    """A pipe and a device in place of each file, too."""
    campaign = fuzzing.run(name, READERS[name], cases=cases, timeout=timeout)
    assert campaign.faults == []
    assert campaign.cases >= cases // READERS[name].slowness


def that_does(what):
    """A reader that does this with a damaged file."""

    def read(directory):
        if (directory / "file").read_bytes() != b"good":
            what()

    return Reader(fuzz_readers.put("file", b"good"), read, opens=False)


@pytest.mark.parametrize(
    ("what", "found"), [(lambda: {}["a"], "KeyError"), (lambda: os.system("true"), "os.system")]
)
def test_the_harness_notices_a_foreign_error_and_a_program(what, found):
    campaign = fuzzing.run("bad", that_does(what), cases=20, timeout=60)
    assert len(campaign.faults) > 10 and found in campaign.faults[0]


def test_the_harness_notices_a_process_that_dies():
    with pytest.raises(AssertionError, match="exit code 7"):
        fuzzing.run("bad", that_does(lambda: os._exit(7)), cases=20, timeout=60)
