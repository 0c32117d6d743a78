"""The memory that shared/docs/scaling.md names is what the recipes' pages name.

Those figures are held against --estimate by test_readme_memory.py.
"""

import re

from tests.pages import ROOT
from tests.unit.test_readme_memory import stated

ROWS = {  # of the recipe's page, in the order of the table
    "face_distill": (0, 2, 3, 4),
    "lavic": (0, 1, 2, 3),
    "vasevqa": (1, 2),
    "multimodal": (2,),
    "arcface": (0, 1),
}


def test_the_table_of_memory_repeats_the_recipes_pages():
    page = (ROOT / "shared/docs/scaling.md").read_text(encoding="utf-8")
    named = re.findall(r"^\|.*\| (\d+\.\d) GB \|$", page, re.M)
    figures = [stated(recipe)[row] for recipe, rows in ROWS.items() for row in rows]
    assert [float(number) for number in named] == figures
