"""The READMEs tell the truth about defaults, and say the same in both languages."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LANGUAGES = ("README.md", "README.zh-CN.md")
SCRIPTS = {
    "face_distill": "train_distill.py",
    "arcface": "run_scripts/run_arcface.py",
    "lavic": "src/knowledge_distillation.py",
    "multimodal": "run_training.py",
}


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def code_blocks(text: str) -> list[str]:
    """The fenced blocks, without comments, which are translated."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return ["\n".join(re.sub(r"\s+#.*", "", line) for line in b.splitlines()) for b in blocks]


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


def test_both_languages_have_the_same_commands():
    english, chinese = (code_blocks(text_of(page)) for page in LANGUAGES)
    assert english
    assert english == chinese


def test_both_languages_have_the_same_tables():
    english, chinese = (tables(text_of(page)) for page in LANGUAGES)
    assert english

    def skeleton(rows: list[list[list[str]]]) -> list[list[list[list[str]]]]:
        return [[[sorted(spans(cell)) for cell in row] for row in table] for table in rows]

    assert skeleton(english) == skeleton(chinese)


def test_both_languages_have_the_same_chapters_and_links():
    english, chinese = (text_of(page) for page in LANGUAGES)
    levels = [re.findall(r"^#+", text, re.M) for text in (english, chinese)]
    assert levels[0] == levels[1]
    assert links(english) == links(chinese)


@pytest.mark.parametrize(
    "page", ["README.md", "README.zh-CN.md", *(f"{recipe}/README.md" for recipe in SCRIPTS)]
)
def test_links_and_scripts_of_a_readme_exist(page: str):
    folder = (ROOT / page).parent
    for link in links(text_of(page)):
        if "://" not in link:
            target, _, chapter = link.partition("#")
            assert (folder / target).exists(), link
            headings = re.findall(r"^#+ (.*)$", (folder / target).read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
            assert not chapter or chapter in slugs, link
    for command in re.findall(r"(?:^|[\s'`])(\.{1,2}/[\w/]+\.sh)", text_of(page)):
        assert (folder / command).exists(), command
