"""Damaged copies of every reader's input, in the full tier thousands; see tests/fuzzing.py."""

import pytest

from tests import fuzz_readers, fuzz_recipes, fuzz_state, fuzzing
from tests.fuzzing import Reader

READERS = {**fuzz_readers.READERS, **fuzz_recipes.READERS, **fuzz_state.READERS}


@pytest.mark.parametrize(
    ("cases", "timeout"),
    [(500, 100), pytest.param(10_000, 850, marks=(pytest.mark.full, pytest.mark.limit(900)))],
)
@pytest.mark.parametrize("name", READERS)
def test_damage_ends_in_a_result_or_in_one_line(name, cases, timeout):
    cases //= READERS[name].slowness
    campaign = fuzzing.run(name, READERS[name], cases=cases, timeout=timeout)
    assert campaign.faults == []
    assert campaign.cases == cases


# Of these it is the test that opens or copies the files.
NOT_OPENED = {
    *("cfg-options", "teacher parts", "swift's log", "ModelScope's listing", "Hub's index"),
    "foreign HTML",
}


@pytest.mark.parametrize("name", [name for name in READERS if name not in NOT_OPENED])
def test_a_pipe_or_a_device_in_place_of_a_file_ends_in_a_result_or_in_one_line(name):
    campaign = fuzzing.run_without_files(name, READERS[name], timeout=100)
    assert campaign.faults == []
    assert campaign.cases


def read_badly(directory):
    content = (directory / "file").read_bytes()
    if content != b"good":
        raise KeyError("not ours")


def read_by_running(directory):
    import os

    if (directory / "file").read_bytes() != b"good":
        os.system("true")


@pytest.mark.parametrize(
    ("read", "found"), [(read_badly, "KeyError"), (read_by_running, "os.system")]
)
def test_the_harness_notices_a_foreign_error_and_a_program(read, found):
    def make(directory):
        (directory / "file").write_bytes(b"good")

    campaign = fuzzing.run("bad", Reader(make, read), cases=20, timeout=60)
    assert len(campaign.faults) > 10 and found in campaign.faults[0]


def test_the_harness_notices_a_process_that_dies():
    import os

    def read(directory):
        if (directory / "file").read_bytes() != b"good":
            os._exit(7)

    def make(directory):
        (directory / "file").write_bytes(b"good")

    with pytest.raises(AssertionError, match="exit code 7"):
        fuzzing.run("bad", Reader(make, read), cases=20, timeout=60)
