"""README.md names every row of the fault matrix, and only tests that exist."""

import re
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ["F", "A", "L1", "L2", "LC", "VF", "VM", "M", "D"]
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_matrix_has_every_row_once():
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)]
    assert rows == list(range(1, 49))


def test_every_recipe_stands_once_in_every_row():
    rows = re.findall(r"^\| (\d+)\. \|(.*)$", README, re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(range(1, 49))
    for number, row in rows:
        own, shared, none = (cell.strip() for cell in row.strip("| ").split(" | "))
        words = [re.sub(r"`\w+`", "", own), shared, re.sub(r":[^;]*", "", none)]
        # a recipe may have several tests of its own
        places = [set(re.findall(r"\b[A-Z]+\d?\b", text)) for text in words]
        assert sorted(part for place in places for part in place) == sorted(PARTS), f"row {number}"
        assert len(re.findall(r"`test_\w+`", own)) == (own.count(";") + 1 if own != "–" else 0)


def names_in(paths: Iterable[Path]) -> set[str]:
    return {
        name
        for path in paths
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_matrix_and_test_files_name_the_same_tests():
    named = set(re.findall(r"`(test_\w+)`", README))
    assert named <= names_in(HERE.parent.rglob("test_*.py")), "README.md names tests that are gone"
    defined = names_in(HERE.glob("test_faults_*.py"))
    numbered = {name for name in defined if name.startswith("test_fault_")}
    assert numbered <= named, "README.md does not name these tests"


def test_each_test_stands_in_the_row_of_its_number():
    for number, row in re.findall(r"^\| (\d+) \|(.*)$", README, re.MULTILINE):
        for found in re.findall(r"`test_fault_(\d\d)_", row):
            assert int(found) == int(number) or number == "34", f"row {number}: {row}"
