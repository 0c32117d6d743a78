"""The rules of the house, kept by reading the sources."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ["face_distill", "lavic", "vasevqa", "multimodal", "arcface"]
ROOMS = ["shared", *RECIPES]
LIGHT = {
    *("shared.launch", "shared.outcome", "shared.config", "shared.errors", "shared.files"),
    *("shared.child", "shared.stages", "shared.program", "shared.run_text", "shared.report"),
    *("shared.replay", "shared.tools.about"),
}
FOREIGN_TO_SHARED = {"transformers", "peft", "swift", "open_clip"}
# Who in shared may talk to the process and its user, beside the entry scripts and shared/tools.
OWNERS = {
    "argparse": set[str](),
    "tyro": {"shared.config"},
    "environment": {
        *("shared.launch", "shared.outcome", "shared.supervisor", "shared.stop"),
        *("shared.distributed", "shared.run_directory", "shared.hub", "shared.prove"),
        "shared.terminal",  # NO_COLOR
        "shared.fit",  # the launcher's choice, for its processes
    },
    "processes": {
        "shared.child",
        "shared.device",  # nvidia-smi, free memory
        "shared.outcome",  # the report is written by a process of its own
        "shared.loader",  # its workers look at the process that forked them
        "shared.tools.doctor_checks",  # whether torchaudio imports, whether torch sees the GPU
    },
    "print": set[str](),
}
BOOTSTRAP = re.compile(
    r"sys\.path\.insert\(0, str\(Path\(__file__\)\.resolve\(\)\.parents\[(\d)\]\)\)"
    r"  # repository root, for shared"
)
# Second line of multimodal's entry scripts: its datasets.py must not hide Hugging Face's package.
OWN_DIRECTORY_LAST = (
    "sys.path.sort(key=lambda path: path == str(Path(__file__).resolve().parent))"
    "  # datasets.py last"
)
# A tutorial in plain torch: nothing of shared in it, and none of the forms of its entry scripts.
SERIES = Path("shared/ddp_series")


@cache
def tracked() -> list[Path]:
    """The repository's files, below its root; without git all files but hidden directories'."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run([*command, "-z"], capture_output=True, text=True, check=False)
    names = [name for name in listed.stdout.split("\0") if name]
    if not names:
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
        names = [name for name in names if not name.startswith((".venv", ".git/"))]
    return [Path(name) for name in names if (ROOT / name).exists()]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def sources(*rooms: str) -> list[Path]:
    found = [path for path in tracked() if path.suffix == ".py" and path.parts[0] in rooms]
    assert found, f"no Python file in {rooms}"
    return found


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_entry(path: Path) -> bool:
    """Whether the file is run as a script."""
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in tree_of(path).body
    )


def names_imported(node: ast.stmt) -> Iterator[str]:
    """The full names of what an import statement takes: modules, or module.attribute."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module or ""
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def all_imports(path: Path) -> set[str]:
    """What the file imports anywhere, functions and type-checking blocks included."""
    return {
        name
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in names_imported(node)
    }


def top_imports(path: Path) -> set[str]:
    """What importing the file imports: all outside functions and `if TYPE_CHECKING`."""
    found: set[str] = set()
    todo: list[ast.AST] = list(tree_of(path).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.update(names_imported(node))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo.extend(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo.extend(ast.iter_child_nodes(node))
    return found


def room_of(name: str) -> str:
    return name.partition(".")[0]


@cache
def ours() -> dict[str, Path]:
    return {module_name(path): path for path in sources(*ROOMS)}


def our_modules(names: set[str]) -> set[str]:
    return {name for name in names if name in ours()}


def importers(room: str, forbidden: set[str]) -> set[tuple[str, str]]:
    """The files of a room that import something of the forbidden rooms, and what."""
    found = ((str(path), name) for path in sources(room) for name in all_imports(path))
    return {(path, name) for path, name in found if room_of(name) in forbidden}


def test_no_room_imports_what_it_must_not():
    assert not importers("shared", {*RECIPES, "tests", *FOREIGN_TO_SHARED})
    for recipe in RECIPES:
        assert not importers(recipe, {*RECIPES, "tests"} - {recipe})
    assert not importers("multimodal", {"datasets"})  # Hugging Face's name of another package


def test_imports_run_in_no_circle():
    edges = {name: our_modules(top_imports(path)) - {name} for name, path in ours().items()}
    graphlib.TopologicalSorter(edges).prepare()  # or its error names the circle


def light_closure() -> set[str]:
    """The light modules and all of ours that importing them imports."""
    reached, todo = set(), set(LIGHT)
    while todo:
        name = todo.pop()
        reached.add(name)
        todo |= our_modules(top_imports(ours()[name])) - reached
    return reached


def test_the_light_modules_need_the_standard_library_alone():
    allowed = set(sys.stdlib_module_names) | {"shared"}
    for name in light_closure():
        assert {room_of(imported) for imported in top_imports(ours()[name])} <= allowed, name


def uses(path: Path) -> set[str]:
    """Which of the entry scripts' rights the file takes for itself."""
    found = {"argparse", "tyro"} & {room_of(name) for name in all_imports(path)}
    if {"subprocess", "multiprocessing"} & {room_of(name) for name in all_imports(path)}:
        found.add("processes")
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            found.add("print")
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
            found.add("environment")
    return found


def test_only_entry_scripts_and_owners_speak_with_user_and_process():
    for path in sources(*ROOMS):
        if not is_entry(path):
            guilty = [right for right in uses(path) if module_name(path) not in OWNERS[right]]
            assert not guilty, path
    for right, names in OWNERS.items():
        assert not [name for name in names if right not in uses(ours()[name])], right


def entry_scripts() -> list[Path]:
    return [path for path in sources(*ROOMS) if is_entry(path) and SERIES not in path.parents]


def test_the_series_is_plain_torch_in_short_scripts():
    scripts = [path for path in sources("shared") if SERIES in path.parents]
    for path in scripts:
        beside = {other.stem for other in scripts if other.parent == path.parent}
        foreign = {room_of(name) for name in all_imports(path)} - set(sys.stdlib_module_names)
        assert foreign <= {"torch", *beside}, path
        assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= 120, path


def test_entry_scripts_reach_shared_by_the_one_bootstrap_line():
    for path in entry_scripts():
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        if module_name(path).startswith("shared.") and "tools" not in path.parts:
            lines = [line.strip() for line in lines]  # those that are imported, too, keep it inside
        lines = [line for line in lines if line.startswith("sys.path")]
        more = [OWN_DIRECTORY_LAST] if path.parts[0] == "multimodal" else []
        assert lines[1:] == more, f"{path}: {lines}"
        match = BOOTSTRAP.fullmatch(lines[0])
        assert match, f"{path}: {lines[0]}"
        assert int(match[1]) == len(path.parts) - 1, f"{path}: {lines[0]}"


def test_no_function_is_above_60_lines_and_no_training_above_100():
    long = {
        f"{path}:{node.name}": length
        for path in sources(*ROOMS, "tests")
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1)
        > (100 if node.name == "train" else 60)
    }
    assert not long


def test_shell_scripts_are_short_make_sure_of_bash_and_never_evaluate_text():
    for path in tracked():
        if path.suffix == ".sh":
            lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
            assert len(lines) <= 100, path
            code = [line for line in lines if not line.startswith("#")]
            if path.parts[:2] != ("shared", "shell"):
                assert code[0] == '[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"', path
            bad = [line for line in code if re.search(r"(^|[;&|(\s])(eval|pkill|killall)\s", line)]
            assert not bad, path


def risky_calls(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                yield f"{path}:{node.lineno} {node.func.id}"
            settings = {f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords}
            risky = settings & {"weights_only=False", "allow_pickle=True", "shell=True"}
            yield from (f"{path}:{node.lineno} {setting}" for setting in risky)


def test_nothing_runs_text_or_unpickles_freely():
    calls = [call for path in sources(*ROOMS) for call in risky_calls(path)]
    # a configuration file is code of the user's own
    assert [re.sub(r":\d+", "", call) for call in calls] == [
        "arcface/inshop_retrieval/config.py exec"
    ]
