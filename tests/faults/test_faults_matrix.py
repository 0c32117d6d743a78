"""README.md names every row of the fault matrix, and only tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_matrix_has_every_row_once():
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)]
    assert rows == list(range(1, 49))


def test_matrix_and_test_files_name_the_same_tests():
    files = [*HERE.glob("test_faults_*.py"), HERE.parent / "full" / "test_kill_campaigns.py"]
    defined = {
        name
        for path in files
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named <= defined, "README.md names tests that are gone"
    numbered = {name for name in defined if name.startswith("test_fault_")}
    assert numbered <= named, "README.md does not name these tests"


def test_each_test_stands_in_the_row_of_its_number():
    for number, row in re.findall(r"^\| (\d+) \|(.*)$", README, re.MULTILINE):
        for found in re.findall(r"`test_fault_(\d\d)_", row):
            assert int(found) == int(number) or number == "34", f"row {number}: {row}"
