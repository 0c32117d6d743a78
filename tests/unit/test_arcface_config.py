"""mm-style configuration files: run, merged, overridden as mm's users know them."""

import pytest

from arcface.inshop_retrieval.config import (
    RECIPE,
    ROOT,
    find_config,
    parse_value,
    read_config,
    with_options,
)
from arcface.inshop_retrieval.recipe import DATASETS
from shared.errors import UserError

RECIPE_FILE = RECIPE / "config/arcface/resnet50-arcface_8xb32_inshop.py"
DATA_ROOTS = [f"{name}.dataset.data_root" for name in DATASETS]


@pytest.fixture
def read(tmp_path):
    """Reads the configuration of a text; further files by name."""

    def read(text, **files):
        for name, content in files.items():
            (tmp_path / f"{name}.py").write_text(content)
        (tmp_path / "main.py").write_text(text)
        return read_config(tmp_path / "main.py")

    return read


@pytest.fixture
def recipe():
    return read_config(RECIPE_FILE)


# --- reading --------------------------------------------------------------------------------------

READ = {  # a file, its base, and the configuration
    "templates reach inside and fill text": (
        "a = {{ _base_.model.head.size }}\n"
        "b = '{{_base_.model.head.size}}'\n"
        "c = 'at {{ _base_.place }}, {{_base_.model.head.size}} px'\n"
        "d = '{{_base_.steps.1}}'\n",
        "model = dict(head=dict(size=7))\nplace = 'x y'\nsteps = ['p', 'q']\n",
        {
            **{"model": {"head": {"size": 7}}, "place": "x y", "steps": ["p", "q"]},
            **{"a": 7, "b": 7, "c": "at x y, 7 px", "d": "q"},
        },
    ),
    "templates mean the base before this file changes it": (
        "x = dict(a=2)\ny = {{_base_.x}}\n",
        "x = dict(a=1, b=1)\n",
        {"x": {"a": 2, "b": 1}, "y": {"a": 1, "b": 1}},
    ),
    "dicts merge and everything else replaces": (
        "model = dict(head=dict(size=2), steps=[9], none=dict(k=1))\n"
        "optimizer = dict(_delete_=True, kind='B')\n"
        "new = dict(_delete_=True, inner=dict(_delete_=True, x=1))\n",
        "model = dict(head=dict(size=1, kind='A'), steps=[1, 2], none=None)\n"
        "optimizer = dict(kind='A', lr=1)\n",
        {
            "model": {"head": {"size": 2, "kind": "A"}, "steps": [9], "none": {"k": 1}},
            "optimizer": {"kind": "B"},
            "new": {"inner": {"x": 1}},
        },
    ),
    "a byte order mark and Windows' line ends": (
        "\ufeffa = 1\r\nb = dict(\r\n  c=2)\r\n",
        "",
        {"a": 1, "b": {"c": 2}},
    ),
}


@pytest.mark.parametrize(("text", "base", "expected"), READ.values(), ids=READ)
def test_a_file_is_read_as_mm_users_know_it(read, text, base, expected):
    files = {"base": base} if base else {}
    assert read(text + "_base_ = 'base.py'\n" * bool(base), **files) == expected


def test_names_and_templates_give_copies(read):
    config = read(
        "_base_ = 'base.py'\n"
        "own = dict(root='a')\n"
        "again = own\n"
        "pair = [own, own]\n"
        "taken = {{_base_.data}}\n",
        base="data = dict(root='b', sizes=[1])\n",
    )
    config["own"]["root"] = config["data"]["root"] = config["pair"][0]["root"] = "changed"
    config["data"]["sizes"].append(2)
    assert config["again"] == config["pair"][1] == {"root": "a"}
    assert config["taken"] == {"root": "b", "sizes": [1]}


def test_files_are_code(read, tmp_path):
    config = read(
        "import math\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "_base_ = 'base.py'\n"
        "lr = 0.01 * 4\n"
        "sizes = [2 ** n for n in range(3)]\n"
        "work_dir = f'work_dirs/lr{lr}_{_base_.model.depth}'\n"
        "root = Path('data') / 'inshop'\n"
        "head = dict(angle=math.pi, scale=np.float32(64), kind=dict, **_base_.model)\n"
        "def helper():\n    return 3\n"
        "if lr > 0.02:\n    epochs = helper()\n"
        "here = '{{ fileDirname }}/{{fileBasename}}'\n",
        base="model = dict(depth=50)\n",
    )
    assert config == {
        "model": {"depth": 50},
        "lr": 0.04,
        "sizes": [1, 2, 4],
        "work_dir": "work_dirs/lr0.04_50",
        "root": "data/inshop",
        "head": {"angle": pytest.approx(3.14159, abs=1e-5), "scale": 64.0, "kind": "dict",
                 "depth": 50},
        "epochs": 3,
        "here": f"{tmp_path}/main.py",
    }  # fmt: skip
    assert type(config["head"]["scale"]) is float


REFUSED = [  # the content of main.py, and what is said of it
    ("_base_ = 'nowhere.py'\n", "main.py: the base nowhere.py is missing"),
    ("_base_ = ['base.py', 'other.py']\n", "main.py: the base other.py assigns x"),
    ("a = 1\n_base_ = 'main.py'\n", r"its own base \(main.py → main.py\)"),
    ("_base_ = 3\n", "main.py:1: _base_ must be a file's name"),
    ("_base_ = 'base.py'\nx = dict(a=1)\n", r"main.py: x is \[1\].*_delete_=True"),
    ("_base_ = 'base.py'\n\nb = {{_base_.tabel}}\n", "main.py:3: .*did you mean table?"),
    ("a = 1\nb = undefined\n", "main.py:2: NameError: name 'undefined'"),
    ("raise SystemExit\n", "main.py:1: SystemExit"),
    ("b = dict(k={1, 2})\n", "main.py: .*b.k is a set, which is no setting"),
    ("b = []\nb.append(b)\n", "main.py: RecursionError"),
    ("a = 1\n  b = 2\n", "main.py:2: .*not a Python file"),
    ("a = 1\0\n", "main.py"),
    (b"\xff\xfe\x00", "cannot be read"),
    ("a = " + "-" * 100_000 + "1\n", "main.py"),
    ("a = " + "[" * 5_000 + "]" * 5_000 + "\n", "main.py"),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[said for _, said in REFUSED])
def test_a_file_that_cannot_be_is_one_line_with_its_place(tmp_path, content, message):
    (tmp_path / "base.py").write_text("x = [1]\ntable = 1\n")
    (tmp_path / "other.py").write_text("x = 2\n")
    written = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "main.py").write_bytes(written)
    with pytest.raises(UserError, match=message) as caught:
        read_config(tmp_path / "main.py")
    assert "\n" not in str(caught.value)


# --- the recipe's files ---------------------------------------------------------------------------


def get(config, dotted):
    for part in dotted.split("."):
        config = config[int(part)] if isinstance(config, list) else config[part]
    return config


@pytest.mark.parametrize("path", sorted(RECIPE.glob("config/arcface/*.py")), ids=lambda p: p.stem)
def test_every_file_reads_its_six_data_sets_alike(path):
    config = read_config(path)
    found = []
    for name in DATASETS:
        dataset = get(config, f"{name}.dataset")
        assert dataset["data_root"] == config["data_root"]
        crop = next(step for step in dataset["pipeline"] if step["type"].endswith("Crop"))
        found.append((dataset["split"], crop["crop_size"]))
    assert len({size for _, size in found}) == 1
    assert [split for split, _ in found] == [
        *("train", "query", "query", "query", "gallery", "gallery")
    ]
    last = config["param_scheduler"][-1]
    assert last["end"] == config["train_cfg"]["max_epochs"]
    assert last["end"] - last["begin"] == last["T_max"]


def test_a_file_is_looked_up_here_then_in_the_recipe_then_at_the_root(tmp_path):
    name = "config/arcface/resnet50-arcface_8xb32_inshop.py"
    assert find_config(name, tmp_path) == RECIPE_FILE
    assert find_config(f"arcface/{name}", tmp_path) == ROOT / "arcface" / name
    (tmp_path / "config/arcface").mkdir(parents=True)
    (tmp_path / name).write_text("x = 1\n")
    assert find_config(name, tmp_path) == tmp_path / name
    with pytest.raises(UserError, match=f"did you mean {name}?") as caught:
        find_config(name.replace("config/", "configs/"), tmp_path)
    assert all(str(place / "configs") in str(caught.value) for place in (tmp_path, RECIPE, ROOT))


# --- --cfg-options --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("None", None),
        ("TRUE", True),
        ("(1,2)", (1, 2)),
        ("1,2", [1, 2]),
        ("'1'", "1"),
        ("' x '", " x "),
        ("{'a': 1}", {"a": 1}),
        ("[a,1,true,None]", ["a", 1, True, None]),
        ("(a, b)", ("a", "b")),
        ("[(a,1),[b c]]", [("a", 1), ["b c"]]),
        ("['a,b',c]", ["a,b", "c"]),
        ("a,b", ["a", "b"]),
        ("(a,b),(c,1)", [("a", "b"), ("c", 1)]),
        ("/p a/th", "/p a/th"),
        ("", ""),
        ("none", "none"),
        ("007", "007"),
        ("{1,2}", "{1,2}"),
        ("[a", "[a"),
        ("[a]b]", "[a]b]"),
        ("['a]", "['a]"),
        ("os.system('x')", "os.system('x')"),
        ("-" * 50_000 + "1", "-" * 50_000 + "1"),
    ],
)
def test_values_are_literals_bracketed_words_or_the_text_as_typed(text, value):
    parsed = parse_value(text)
    assert parsed == value and type(parsed) is type(value)


def test_each_documented_override_sets_its_own(recipe):
    for key in DATA_ROOTS:
        config = with_options(recipe, [f"{key}=/data/a b,c"])  # a text stays one, comma or not
        changed = {name for name in DATA_ROOTS if get(config, name) == "/data/a b,c"}
        assert changed == {key}
    assert {get(recipe, name) for name in DATA_ROOTS} == {"data/inshop"}


def test_later_options_win_and_dicts_are_merged(recipe):
    config = with_options(
        recipe,
        ["train_cfg.max_epochs=3", "train_cfg={'max_epochs': 4}", "val_cfg={'fp16': True}"],
    )
    assert config["train_cfg"] == {"by_epoch": True, "max_epochs": 4, "val_interval": 1}
    assert config["val_cfg"] == {"fp16": True}
    config = with_options(recipe, ["train_cfg={'_delete_': True, 'max_epochs': 4}"])
    assert config["train_cfg"] == {"max_epochs": 4}


_PIPELINE = "train_dataloader.dataset.pipeline"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("train_cfg", "expected key=value"),
        ("=3", "expected key=value"),
        ("a..b=1", "expected key=value"),
        (f"{_PIPELINE}.-1.scale=72", "pipeline is a list of length 5.*0 to 4"),
        (f"{_PIPELINE}.5.scale=72", "pipeline is a list of length 5.*0 to 4"),
        ("param_scheduler.2=None", "param_scheduler is a list of length 2"),
        ("train_cfg.max_epochs.x=1", "train_cfg.max_epochs is 50, it has no keys"),
        ("model.head={'loss': {'loss_weight': {'x': 1}}}", "head.loss.loss_weight is 1.0"),
        ("param_scheduler={'x': 1}", "param_scheduler is .* cannot take in a dict"),
        ("data_preprocessor.mean.0={'x': 1}", "data_preprocessor.mean.0 is 123.675 and cannot"),
    ],
)
def test_an_option_that_cannot_be_is_refused_by_its_full_key(recipe, option, message):
    with pytest.raises(UserError, match=f"--cfg-options .*{message}"):
        with_options(recipe, [option])
