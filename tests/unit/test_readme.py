"""The READMEs tell the truth about defaults, and say the same in both languages."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("README.md", "README.zh-CN.md")
RECIPES = ("face_distill", "lavic", "vasevqa", "multimodal", "arcface")
IN_BOTH_LANGUAGES = (
    "README.md",
    *(f"{room}/README.md" for room in (*RECIPES, "shared/tools", "shared/ddp_series")),
    *("shared/docs/scaling.md", "shared/docs/faults.md"),
)
SCRIPTS = {
    "face_distill": "train_distill.py",
    "arcface": "run_scripts/run_arcface.py",
    "lavic": "src/knowledge_distillation.py",
    "multimodal": "run_training.py",
}


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def chinese(page: str) -> str:
    """The name of a page's twin."""
    return page.removesuffix(".md") + ".zh-CN.md"


def code_blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks, without what is translated: comments, and remarks
    behind the names of a tree of files.
    """
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    remarks = {"bash": r"\s+#.*", "text": r"\s+#.*|(?<=[\w*/])\s{3,}\S.*"}
    return [
        (language, "\n".join(re.sub(remarks.get(language, "$^"), "", t) for t in b.splitlines()))
        for language, b in blocks
    ]


def tables(text: str) -> list[list[list[str]]]:
    """The tables' bodies: rows of cells."""
    found: list[list[list[str]]] = []
    inside = False
    for line in text.splitlines():
        if line.startswith("| :"):
            found.append([])
            inside = True
        elif inside and line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        else:
            inside = False
    return found


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def links(text: str) -> set[str]:
    return set(re.findall(r"\]\(([^)]+)\)", text)) - set(LANGUAGES)


def constants(recipe: str, script: str = "") -> dict[str, Any]:
    """The module-level names in capitals; those that are no literals map to None."""
    found: dict[str, Any] = {}
    for node in ast.parse(text_of(f"{recipe}/{script or SCRIPTS[recipe]}")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:
                found[node.targets[0].id] = None
    return {name: value for name, value in found.items() if name.isupper()}


def config_defaults(script: str, class_name: str) -> dict[str, ast.expr]:
    """Flag -> the default's expression, of the fields of one configuration class."""
    found: dict[str, ast.expr] = {}
    for node in ast.parse(text_of(script)).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    value = field.value
                    names = ["--" + field.target.id.replace("_", "-")]
                    if isinstance(value, ast.Call) and value.args:  # option(default, "what it is")
                        names += aliases_of(value)
                        value = value.args[0]
                    if value is not None:
                        found |= dict.fromkeys(names, value)
                    found |= {f"--{n.replace('_', '-')}": v for n, v in own_run_options(value)}
    return found


def aliases_of(option: ast.Call) -> list[str]:
    """The other spellings of a flag."""
    found = [ast.literal_eval(word.value) for word in option.keywords if word.arg == "aliases"]
    return [alias for aliases in found for alias in aliases]


def own_run_options(value: ast.expr | None) -> list[tuple[str, ast.expr]]:
    """The keywords of a RunOptions(…) with which a recipe changes common defaults."""
    return [
        (keyword.arg, keyword.value)
        for node in ast.walk(value or ast.Module([], []))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "RunOptions"
        for keyword in node.keywords
        if keyword.arg
    ]


def scripts_of(recipe: str) -> list[str]:
    """The recipe's entry scripts with flags, the one that trains first."""
    folder = ROOT / recipe
    others = sorted(
        str(path.relative_to(folder))
        for path in (*folder.glob("*.py"), *folder.glob("src/*.py"))
        if re.search(r"parse(_own)?\(Config", path.read_text(encoding="utf-8"))
    )
    return [SCRIPTS[recipe], *(name for name in others if name != SCRIPTS[recipe])]


def dashed(flag: str) -> str:
    """A flag as the code names it, from either spelling."""
    return "--" + flag.strip("`").removeprefix("--").replace("_", "-")


def flag_defaults(recipe: str) -> dict[str, list[Any]]:
    """Flag -> its defaults, of the recipe's own flags and those of every recipe, by script."""
    values: dict[str, list[Any]] = {}
    for script in scripts_of(recipe):
        own = config_defaults(f"{recipe}/{script}", "Config")
        common = config_defaults("shared/config.py", "RunOptions")
        known = constants(recipe, script)
        for flag, expression in {**common, **own}.items():
            if isinstance(expression, ast.Name) and expression.id in known:
                values.setdefault(flag, []).append(known[expression.id])
            elif isinstance(expression, ast.Constant | ast.Tuple):
                values.setdefault(flag, []).append(ast.literal_eval(expression))
    return values


def parsed(cell: str) -> Any:
    try:
        return ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        return cell


def test_constants_in_the_readme_equal_those_of_the_script():
    recipe = "face_distill"
    rows = [
        row for table in tables(text_of(f"{recipe}/README.md")) for row in table if len(row) == 4
    ]
    assert rows
    known = constants(recipe)
    for name, flag, default, _ in rows:
        assert known[name.strip("`")] == parsed(default), name
        assert flag_defaults(recipe)[flag.strip("`")][0] == parsed(default), flag


@pytest.mark.parametrize("recipe", SCRIPTS)
def test_every_flag_in_a_readme_table_has_the_default_of_the_code(recipe: str):
    rows = [row for table in tables(text_of(f"{recipe}/README.md")) for row in table]
    rows = [row for row in rows if row[0].startswith("`--")]
    assert rows
    for flag, default, *_ in rows:
        assert parsed(default) in flag_defaults(recipe)[dashed(flag)], flag


def test_documented_names_stand_at_the_top_of_the_script():
    recipe = "face_distill"
    named = {
        span for span in spans(text_of(f"{recipe}/README.md")) if re.fullmatch("[A-Z_]+", span)
    }
    named -= {"CUDA_VISIBLE_DEVICES", "HF_ENDPOINT"}
    assert {"BATCH_SIZE", "BLIP_PATH", "PROJECT_ROOT"} <= named
    assert named <= set(constants(recipe))


def test_every_flag_that_a_readme_mentions_exists():
    known = {"--help", "--nproc", "--nnodes", "--node-rank", "--master-addr", "--master-port"}
    for recipe in SCRIPTS:
        for script in scripts_of(recipe):
            known |= set(config_defaults(f"{recipe}/{script}", "Config"))
        known |= set(config_defaults("shared/config.py", "RunOptions"))
    known |= set(config_defaults("shared/tools/monitor.py", "Config"))
    known |= set(config_defaults("shared/stages.py", "StageOptions"))
    foreign = {"--logdir", "--signal"}  # TensorBoard's, …
    foreign |= {"--nproc-per-node", "--nodes", "--ntasks-per-node", "--gpus-per-node"}
    for page in (*LANGUAGES, *(f"{recipe}/README.md" for recipe in SCRIPTS)):
        used = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]*)", text_of(page)))
        used = {dashed(name) for name in used}
        assert used <= known | foreign, page


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
        [[(sorted(spans(cell)), amounts(cell)) for cell in row] for row in table]
        for table in tables(text)
    ]


def targets(text: str, folder: Path) -> set[str]:
    """What the links lead to: addresses, and pages without chapter and language."""
    found = {link if "://" in link else link.partition("#")[0] for link in links(text)}
    inside = {str((folder / link).resolve()) for link in found if link and "://" not in link}
    return {re.sub(r"\.zh-CN\.md$", ".md", link) for link in inside} | {
        link for link in found if "://" in link
    }


@pytest.fixture(params=IN_BOTH_LANGUAGES)
def twins(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A page in English and in Chinese."""
    return text_of(request.param), text_of(chinese(request.param))


def test_both_languages_have_the_same_commands(twins: tuple[str, str]):
    english, chinese = map(code_blocks, twins)
    assert english == chinese


def test_both_languages_have_the_same_tables(twins: tuple[str, str]):
    english, chinese = map(skeleton, twins)
    assert english == chinese


def test_both_languages_have_the_same_names_in_their_text(twins: tuple[str, str]):
    english, chinese = (set(spans(re.sub(r"^```.*?^```", "", t, flags=re.M | re.S))) for t in twins)
    assert english == chinese


@pytest.mark.parametrize("page", IN_BOTH_LANGUAGES)
def test_both_languages_have_the_same_chapters_and_links(page: str):
    english, translated = text_of(page), text_of(chinese(page))
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


def commands(page: str) -> set[str]:
    """The lines of the page's shell blocks, without comments."""
    blocks = [text for language, text in code_blocks(text_of(page)) if language == "bash"]
    return {line for block in blocks for line in block.splitlines() if line}


def test_pages_beside_the_readmes_have_only_commands_of_theirs():
    known = {line for page in IN_BOTH_LANGUAGES if "docs" not in page for line in commands(page)}
    for page in IN_BOTH_LANGUAGES:
        if "docs" in page:
            assert commands(page), page
            assert commands(page) <= known, page


def test_every_message_on_the_page_of_faults_is_one_that_is_said():
    files = [ROOT / "setup.sh", *(ROOT / "shared").rglob("*.*"), *(ROOT / "vasevqa").rglob("*.py")]
    said = " ".join(f.read_text(encoding="utf-8") for f in files if f.suffix in (".py", ".sh"))
    said = re.sub(r"\s+", " ", re.sub(r'"\s*f?"', "", said)).lower()
    seen = [row[0] for table in tables(text_of("shared/docs/faults.md"))[1:] for row in table]
    quoted = [span for cell in seen for span in spans(cell)]
    assert len(quoted) > 30
    assert [span for span in quoted if span.lower() not in said] == []
