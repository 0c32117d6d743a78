"""README.md names every row of the fault matrix, and only tests that exist."""

import re
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text(encoding="utf-8")


def test_matrix_has_every_row_once():
    rows = [int(number) for number in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)]
    assert rows == list(range(1, 49))


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


def test_each_numbered_test_stands_in_its_row():
    rows = {int(number): row for number, row in re.findall(r"^\| (\d+) \|(.*)$", README, re.M)}
    for name in names_in(HERE.glob("test_faults_*.py")):
        if found := re.match(r"test_fault_(\d\d)_", name):
            assert f"`{name}`" in rows[int(found[1])], name
