"""Ten thousand damaged copies of every reader's input; see tests/fuzzing.py."""

import pytest

from tests import fuzz_readers, fuzz_recipes, fuzzing

READERS = {**fuzz_readers.READERS, **fuzz_recipes.READERS}


@pytest.mark.full
@pytest.mark.limit(900)
@pytest.mark.parametrize("name", READERS)
def test_damage_ends_in_a_result_or_in_one_line(name):
    campaign = fuzzing.run(name, READERS[name], cases=10_000, timeout=850)
    assert campaign.faults == []
    assert campaign.cases == 10_000
