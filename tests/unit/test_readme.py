"""The pages say the same in both languages, lead somewhere, and name only what is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests import pages
from tests.full import figures
from tests.pages import DOCS, IN_BOTH_LANGUAGES, RECIPES, ROOT, chinese, links, spans, text_of

ORIGINAL = ["In the original", "Here"]
OF_A_RUN = ("status.json", "metrics.jsonl", "report.html", "log")


def amounts(cell: str) -> list[float]:
    """The numbers in digits, in order of size; 580 万 is 5.8 million, stage 1 第一阶段."""
    units = {"million": 1e6, "M": 1e6, "万": 1e4, "": 1.0}
    found = re.findall(
        r"(\d[\d,]*(?:\.\d+)?)\s?(million\b|M\b|万)?", re.sub(r"[Ss]tage \d", "", cell)
    )
    return sorted(float(digits.replace(",", "")) * units[unit] for digits, unit in found)


def skeleton(text: str) -> list[list[list[Any]]]:
    """Of every cell of the tables what no translation changes: code and numbers."""
    return [
        [[(sorted(spans(cell)), amounts(cell)) for cell in row] for row in table.rows]
        for table in pages.tables(text)
    ]


def targets(text: str, folder: Path) -> set[str]:
    """What the links lead to: addresses, and pages without chapter and language."""
    found = {link if "://" in link else link.partition("#")[0] for link in links(text)}
    inside = {str((folder / link).resolve()) for link in found if link and "://" not in link}
    return {re.sub(r"\.zh-CN\.md$", ".md", link) for link in inside} | {
        link for link in found if "://" in link
    }


def names_in(text: str) -> set[str]:
    return set(spans(re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)))


@pytest.mark.parametrize("page", IN_BOTH_LANGUAGES)
def test_both_languages_have_the_same_commands_tables_names_chapters_and_links(page: str):
    english, translated = text_of(page), text_of(chinese(page))
    for what in (pages.code_blocks, skeleton, names_in):
        assert what(english) == what(translated)
    levels = [re.findall(r"^#+", text, re.M) for text in (english, translated)]
    assert levels[0] == levels[1]
    folder = (ROOT / page).parent
    assert targets(english, folder) == targets(translated, folder)
    assert f"]({Path(chinese(page)).name})" in english
    assert f"]({Path(page).name})" in translated


@pytest.mark.parametrize(
    "page", [*IN_BOTH_LANGUAGES, *(chinese(page) for page in IN_BOTH_LANGUAGES)]
)
def test_links_and_scripts_of_a_readme_exist(page: str):
    folder = (ROOT / page).parent
    for link in links(text_of(page)):
        if "://" not in link:
            target, _, chapter = link.partition("#")
            goal = folder / target if target else ROOT / page
            assert goal.exists(), link
            headings = re.findall(r"^#+ (.*)$", goal.read_text("utf-8") if chapter else "", re.M)
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
            assert not chapter or chapter in slugs, link
    rooms = [ROOT / recipe for recipe in RECIPES] if folder.name == "docs" else [folder]
    places = [ROOT, *rooms, *(path for room in rooms for path in room.iterdir() if path.is_dir())]
    for command in re.findall(r"(?:^|[\s'`])(\.{1,2}/[\w/]+\.sh)", text_of(page)):
        assert any((place / command).exists() for place in places), command


def test_pages_beside_the_readmes_have_only_commands_of_theirs():
    readmes = [page for page in IN_BOTH_LANGUAGES if page not in DOCS]
    known = {line for page in readmes for line in pages.commands(text_of(page))}
    for page in DOCS:
        found = pages.commands(text_of(page))
        assert found, page
        assert set(found) <= known, page


def test_every_message_on_the_page_of_faults_is_one_that_is_said():
    files = [ROOT / "setup.sh", *(ROOT / "shared").rglob("*.*"), *(ROOT / "vasevqa").rglob("*.py")]
    said = " ".join(f.read_text(encoding="utf-8") for f in files if f.suffix in (".py", ".sh"))
    said = re.sub(r"\s+", " ", re.sub(r'"\s*f?"', "", said)).lower()
    seen = [
        row[0] for table in pages.tables(text_of("shared/docs/faults.md"))[1:] for row in table.rows
    ]
    quoted = [span for cell in seen for span in spans(cell)]
    assert len(quoted) > 30
    assert [span for span in quoted if span.lower() not in said] == []


@pytest.mark.parametrize("language", figures.PAGES)
def test_the_table_of_figures_is_what_the_recorded_results_say(language: str):
    page = text_of(figures.PAGES[language])
    assert figures.BEGIN in page
    assert figures.written(page, language) == page, "run tests/full/figures.py"


def test_what_contributors_are_sent_to_is_there():
    requests, plan = pages.tables(text_of("CONTRIBUTING.md"))
    assert len(requests.rows) == 10
    named = {span for row in requests.rows for span in spans(" ".join(row)) if "/" in span[1:]}
    paths = {name for name in named if not name.startswith(("./", "-"))}
    assert len(paths) > 10
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    for room, inside in plan.rows:
        folder = ROOT / room.strip("`")
        for name in spans(inside):
            places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
            assert any((place / name).exists() for place in places), (room, name)


def test_every_page_is_one_that_these_tests_read():
    rooms = ("README.md", "[!.]*/README.md", "shared/*/*.md")  # a run writes its own further below
    found = {str(path.relative_to(ROOT)) for room in rooms for path in ROOT.glob(room)}
    assert found - {chinese(page) for page in IN_BOTH_LANGUAGES} == set(IN_BOTH_LANGUAGES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_one_table_from_the_original_to_here(recipe: str):
    """The page's last chapter; its last row is what the document left open."""
    text = text_of(f"{recipe}/README.md")
    found = [table for table in pages.tables(text) if table.head == ORIGINAL]
    assert len(found) == 1
    assert re.match(r"left open by the documents?$", found[0].rows[-1][0])
    chapters = re.findall(r"^#+ (?:\d+\. )?(.*)$", text, re.M)
    assert chapters[-1] == "From the original to here"
    assert [c for c in chapters if "riginal" in c] == chapters[-1:]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_page_names_what_a_run_leaves(recipe: str):
    text = text_of(f"{recipe}/README.md")
    assert [name for name in OF_A_RUN if name not in text] == []
