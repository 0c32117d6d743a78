"""mm-style configuration files: run, merged, overridden as mm's users know it."""

import pytest

from arcface.inshop_retrieval.config import (
    RECIPE,
    ROOT,
    find_config,
    merge,
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


def test_literals_dicts_and_names_keep_their_kinds(read):
    config = read(
        '"""About this file."""\n'
        "a = dict(x=1, y=-2.5, z=None, on=True)\n"
        "b = {'x': 'text', 3: (1, [2])}\n"
        "c = d = [a, 1e-3, +4, 'one' 'word']\n"
        "__hidden = 1\n"
    )
    a = {"x": 1, "y": -2.5, "z": None, "on": True}
    assert config == {
        "a": a,
        "b": {"x": "text", 3: (1, [2])},
        "c": [a, 1e-3, 4, "oneword"],
        "d": [a, 1e-3, 4, "oneword"],
    }


def test_names_and_templates_give_copies(read):
    config = read(
        "_base_ = 'base.py'\n"
        "own = dict(root='a')\n"
        "again = own\n"
        "pair = [own, own]\n"
        "taken = {{_base_.data}}\n"
        "quoted = '{{_base_.data}}'\n",
        base="data = dict(root='b', sizes=[1])\n",
    )
    config["own"]["root"] = config["data"]["root"] = "changed"
    config["data"]["sizes"].append(2)
    config["pair"][0]["root"] = "changed"
    assert config["pair"][1] == {"root": "a"}
    assert config["again"] == {"root": "a"}
    assert config["taken"] == config["quoted"] == {"root": "b", "sizes": [1]}


def test_templates_reach_inside_and_fill_text(read):
    config = read(
        "_base_ = ['base.py']\n"
        "a = {{ _base_.model.head.size }}\n"
        "b = '{{_base_.model.head.size}}'\n"
        "c = 'at {{ _base_.place }}, {{_base_.model.head.size}} px'\n"
        "d = '{{_base_.steps.1}}'\n",
        base="model = dict(head=dict(size=7))\nplace = 'x y'\nsteps = ['p', 'q']\n",
    )
    assert (config["a"], config["b"], config["c"], config["d"]) == (7, 7, "at x y, 7 px", "q")


def test_templates_mean_the_base_before_this_file_changes_it(read):
    config = read(
        "_base_ = 'base.py'\nx = dict(a=2)\ny = {{_base_.x}}\n", base="x = dict(a=1, b=1)\n"
    )
    assert config == {"x": {"a": 2, "b": 1}, "y": {"a": 1, "b": 1}}


def test_dicts_merge_and_everything_else_replaces(read):
    config = read(
        "_base_ = 'base.py'\n"
        "model = dict(head=dict(size=2), steps=[9], none=dict(k=1))\n"
        "optimizer = dict(_delete_=True, kind='B')\n"
        "new = dict(_delete_=True, inner=dict(_delete_=True, x=1))\n",
        base="model = dict(head=dict(size=1, kind='A'), steps=[1, 2], none=None)\n"
        "optimizer = dict(kind='A', lr=1)\n",
    )
    assert config["model"] == {"head": {"size": 2, "kind": "A"}, "steps": [9], "none": {"k": 1}}
    assert config["optimizer"] == {"kind": "B"}
    assert config["new"] == {"inner": {"x": 1}}


def test_a_dict_does_not_slip_over_a_list(read):
    with pytest.raises(UserError, match=r"main.py: model.steps is \[1, 2\].*_delete_=True"):
        read(
            "_base_ = 'base.py'\n\nmodel = dict(steps=dict(a=1))\n",
            base="model = dict(steps=[1, 2])\n",
        )


def test_merging_leaves_both_sides_as_they_were():
    base, child = {"a": {"b": [1]}}, {"a": {"_delete_": True, "c": [2]}}
    merged = merge(base, child)
    merged["a"]["c"].append(3)
    assert base == {"a": {"b": [1]}} and child == {"a": {"_delete_": True, "c": [2]}}


def test_bases_are_found_beside_the_file_that_names_them(read, tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/deep.py").write_text("x = 1\n")
    config = read("_base_ = 'inner/mid.py'\n", **{"inner/mid": "_base_ = './deep.py'\ny = 2\n"})
    assert config == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("_base_ = 'nowhere.py'\n", r"main.py: the base nowhere.py is missing"),
        ("_base_ = ['base.py', 'other.py']\n", r"main.py: the base other.py assigns x"),
        ("a = 1\n_base_ = 'main.py'\n", r"its own base \(main.py → main.py\)"),
        ("_base_ = 3\n", "main.py:1: _base_ must be a file's name"),
    ],
)
def test_bases_that_cannot_be_are_refused(read, text, message):
    with pytest.raises(UserError, match=message):
        read(text, base="x = 1\n", other="x = 2\n")


def test_files_are_code(read, tmp_path):
    config = read(
        "import math\n"
        "from pathlib import Path\n"
        "import numpy as np\n"
        "_base_ = 'base.py'\n"
        "gpus = 4\n"
        "lr = 0.01 * gpus\n"
        "sizes = [2 ** n for n in range(3)]\n"
        "work_dir = f'work_dirs/lr{lr}_{_base_.model.depth}'\n"
        "root = Path('data') / 'inshop'\n"
        "head = dict(angle=math.pi, scale=np.float32(64), kind=dict, **_base_.model)\n"
        "def helper():\n    return 3\n"
        "if gpus > 2:\n    epochs = helper()\n"
        "here = '{{ fileDirname }}/{{fileBasename}}'\n",
        base="model = dict(depth=50, layers=[1, 2])\n",
    )
    assert config == {
        "model": {"depth": 50, "layers": [1, 2]},
        "gpus": 4,
        "lr": 0.04,
        "sizes": [1, 2, 4],
        "work_dir": "work_dirs/lr0.04_50",
        "root": "data/inshop",
        "head": {"angle": pytest.approx(3.14159, abs=1e-5), "scale": 64.0, "kind": "dict",
                 "depth": 50, "layers": [1, 2]},
        "epochs": 3,
        "here": f"{tmp_path}/main.py",
    }  # fmt: skip
    assert type(config["head"]["scale"]) is float


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("b = undefined", "NameError: name 'undefined'"),
        ("b = 1 / 0", "ZeroDivisionError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("b = {{_base_.tabel}}", "no base assigns tabel; did you mean table?"),
        ("b = '{{_base_.missing}}'", "KeyError: 'missing'"),
        ("raise SystemExit", "SystemExit"),
        ("b = dict(k={1, 2})", "b.k is a set, which is no setting"),
        ("b = []\nb.append(b)", "RecursionError"),
    ],
)
def test_an_error_of_the_code_is_one_line_with_its_place(read, line, message):
    with pytest.raises(UserError, match=message) as caught:
        read(f"_base_ = 'base.py'\na = dict(x=1)\n\n{line}\n", base="x = 1\ntable = dict(k=1)\n")
    assert "\n" not in str(caught.value)
    is_of_a_line = "no setting" not in message and "Recursion" not in message
    assert ("main.py:4: " in str(caught.value)) is is_of_a_line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = (\n", r"main.py:1: .*not a Python file"),
        (b"a = 1\n  b = 2\n", r"main.py:2: .*not a Python file"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"a = 1\x00\n", "main.py:?1?.*"),
        (b"a = " + b"-" * 100_000 + b"1\n", "main.py"),
        (b"a = " + b"[" * 5_000 + b"]" * 5_000 + b"\n", "main.py"),
    ],
)
def test_files_that_are_no_configuration_end_in_one_line(tmp_path, content, message):
    (tmp_path / "main.py").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_config(tmp_path / "main.py")
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_windows_line_ends_are_fine(tmp_path):
    (tmp_path / "main.py").write_bytes(b"\xef\xbb\xbfa = 1\r\nb = dict(\r\n  c=2)\r\n")
    assert read_config(tmp_path / "main.py") == {"a": 1, "b": {"c": 2}}


# --- the recipe's files ---------------------------------------------------------------------------


def test_the_documented_recipe_has_the_documented_numbers(recipe):
    assert recipe["model"]["head"]["num_classes"] == 3997
    assert recipe["model"]["image_encoder"][0]["depth"] == 50
    optimizer = {"type": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
    assert recipe["optim_wrapper"]["optimizer"] == optimizer
    assert recipe["train_cfg"] == {"by_epoch": True, "max_epochs": 50, "val_interval": 1}
    assert [part["end"] for part in recipe["param_scheduler"]] == [5, 50]
    assert recipe["auto_scale_lr"] == {"enable": True, "base_batch_size": 256}
    assert recipe["default_hooks"]["checkpoint"]["max_keep_ckpts"] == 3
    assert recipe["train_dataloader"]["batch_size"] == 32
    steps = [step["type"] for step in recipe["train_dataloader"]["dataset"]["pipeline"]]
    assert steps == ["LoadImageFromFile", "Resize", "RandomCrop", "RandomFlip", "PackInputs"]
    assert recipe["data_preprocessor"]["mean"] == [123.675, 116.28, 103.53]


@pytest.mark.parametrize("path", sorted(RECIPE.glob("config/arcface/*.py")), ids=lambda p: p.stem)
def test_every_file_reads_its_six_data_sets_alike(path):
    config = read_config(path)
    sizes = {}
    for key in DATA_ROOTS:
        dataset = config
        for part in key.split(".")[:-1]:
            dataset = dataset[part]
        assert dataset["data_root"] == config["data_root"]
        crop = next(step for step in dataset["pipeline"] if step["type"].endswith("Crop"))
        sizes[key] = (dataset["split"], crop["type"], crop["crop_size"])
    assert len({size for _, _, size in sizes.values()}) == 1
    assert [split for split, _, _ in sizes.values()] == [
        *("train", "query", "query", "query", "gallery", "gallery")
    ]
    last = config["param_scheduler"][-1]
    assert last["end"] == config["train_cfg"]["max_epochs"]
    assert last["end"] - last["begin"] == last["T_max"]


# --- where a file is looked up --------------------------------------------------------------------


def test_a_file_is_looked_up_here_then_in_the_recipe_then_at_the_root(tmp_path):
    name = "config/arcface/resnet50-arcface_8xb32_inshop.py"
    assert find_config(name, tmp_path) == RECIPE_FILE
    assert find_config(f"arcface/{name}", tmp_path) == ROOT / "arcface" / name
    assert find_config(str(RECIPE_FILE), tmp_path) == RECIPE_FILE
    (tmp_path / "config/arcface").mkdir(parents=True)
    (tmp_path / name).write_text("x = 1\n")
    assert find_config(name, tmp_path) == tmp_path / name


def test_a_file_that_is_nowhere_is_refused_with_the_places_and_the_nearest(tmp_path):
    with pytest.raises(UserError, match="no such file") as caught:
        find_config("configs/arcface/resnet50-arcface_8xb32_inshop.py", tmp_path)
    message = str(caught.value)
    assert f"did you mean {RECIPE_FILE.relative_to(RECIPE)}?" in message
    assert all(str(place / "configs") in message for place in (tmp_path, RECIPE, ROOT))


# --- values of --cfg-options ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("1e-3", 1e-3),
        (".5", 0.5),
        ("None", None),
        ("True", True),
        ("false", False),
        ("TRUE", True),
        ("[1,2]", [1, 2]),
        ("(1,2)", (1, 2)),
        ("(1,)", (1,)),
        ("1,2", [1, 2]),
        ("[]", []),
        ("()", ()),
        ("'1'", "1"),
        ("' x '", " x "),
        ('"a b"', "a b"),
        ("{'a': 1}", {"a": 1}),
        ("[a,b]", ["a", "b"]),
        ("(a, b)", ("a", "b")),
        ("[a,1,true,None]", ["a", 1, True, None]),
        ("[(a,1),[b c]]", [("a", 1), ["b c"]]),
        ("['a,b',c]", ["a,b", "c"]),
        ("a,b", ["a", "b"]),
        ("/p a/th, 2", ["/p a/th", 2]),
        ("(a,b),(c,1)", [("a", "b"), ("c", 1)]),
        ("/p a/th", "/p a/th"),
        (" /p ", " /p "),
        ("x=y", "x=y"),
        ("", ""),
        ("none", "none"),
        ("007", "007"),
        ("...", "..."),
        ("1j", "1j"),
        ("b'x'", "b'x'"),
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


def get(config, dotted):
    for part in dotted.split("."):
        config = config[int(part)] if isinstance(config, list) else config[part]
    return config


def test_each_documented_override_sets_its_own(recipe):
    for key in DATA_ROOTS:
        config = with_options(recipe, [f"{key}=/data/a b,c"])  # a text stays one, comma or not
        changed = {name for name in DATA_ROOTS if get(config, name) == "/data/a b,c"}
        assert changed == {key}
    assert {get(recipe, name) for name in DATA_ROOTS} == {"data/inshop"}


def test_keys_that_mm_users_know_are_known(recipe):
    options = {
        "model.image_encoder.0.init_cfg": None,
        "model.image_encoder.0.depth": 101,
        "model.head.num_classes": 12,
        "train_dataloader.dataset.pipeline.1.scale": 72,
        "optim_wrapper.optimizer.lr": 1e-3,
        "param_scheduler.1.T_max": 5,
        "train_cfg.max_epochs": 3,
        "train_cfg.val_interval": 2,
        "default_hooks.checkpoint.max_keep_ckpts": 1,
        "auto_scale_lr.base_batch_size": 64,
        "data_preprocessor.mean": [1, 2, 3],
        "load_from": "/x.pth",
    }
    config = with_options(recipe, [f"{key}={value}" for key, value in options.items()])
    assert {key: get(config, key) for key in options} == options


def test_later_options_win_and_dicts_are_merged(recipe):
    config = with_options(
        recipe,
        ["train_cfg.max_epochs=3", "train_cfg={'max_epochs': 4}", "val_cfg={'fp16': True}"],
    )
    assert config["train_cfg"] == {"by_epoch": True, "max_epochs": 4, "val_interval": 1}
    assert config["val_cfg"] == {"fp16": True}
    config = with_options(recipe, ["train_cfg={'_delete_': True, 'max_epochs': 4}"])
    assert config["train_cfg"] == {"max_epochs": 4}


def test_an_index_outside_its_list_is_refused_with_the_length(recipe):
    for index in ("9", "-1", "scale"):
        with pytest.raises(UserError, match=r"pipeline is a list of length 5.*0 to 4"):
            with_options(recipe, [f"train_dataloader.dataset.pipeline.{index}.scale=72"])
    with pytest.raises(UserError, match=r"param_scheduler is a list of length 2"):
        with_options(recipe, ["param_scheduler.2=None"])


@pytest.mark.parametrize("option", ["train_cfg", "=3", "a..b=1", "train_cfg.=1", ""])
def test_an_option_without_key_or_value_is_refused(recipe, option):
    with pytest.raises(UserError, match="expected key=value"):
        with_options(recipe, [option])


def test_a_key_below_a_scalar_is_refused(recipe):
    with pytest.raises(UserError, match=r"train_cfg.max_epochs is 50, it has no keys"):
        with_options(recipe, ["train_cfg.max_epochs.x=1"])


def test_a_dict_over_what_is_none_is_refused_by_its_full_key(recipe):
    for option, key in (
        ("model.head={'loss': {'loss_weight': {'x': 1}}}", "model.head.loss.loss_weight is 1.0"),
        ("param_scheduler={'x': 1}", "param_scheduler is .*"),
        ("data_preprocessor.mean.0={'x': 1}", "data_preprocessor.mean.0 is 123.675"),
    ):
        with pytest.raises(UserError, match=f"--cfg-options {key} and cannot take in a dict"):
            with_options(recipe, [option])
