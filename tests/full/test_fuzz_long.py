"""Ten thousand damaged copies of every reader's input; see tests/fuzzing.py."""

import pytest

from tests import fuzz_readers, fuzz_recipes, fuzz_state, fuzzing

READERS = {**fuzz_readers.READERS, **fuzz_recipes.READERS, **fuzz_state.READERS}


@pytest.mark.full
@pytest.mark.limit(900)
@pytest.mark.parametrize("name", READERS)
def test_damage_ends_in_a_result_or_in_one_line(name):
    cases = 10_000 // READERS[name].slowness
    campaign = fuzzing.run(name, READERS[name], cases=cases, timeout=850)
    assert campaign.faults == []
    assert campaign.cases == cases
