"""mm-style configuration files: read without running, merged, overridden as mm's users know it."""

import pytest

from arcface.config_options import (
    DATA_ROOTS,
    data_roots,
    parse_value,
    with_data_root,
    with_options,
)
from arcface.config_reader import RECIPE, ROOT, find_config, merge, read_config
from shared.errors import UserError

RECIPE_FILE = RECIPE / "config/arcface/resnet50-arcface_8xb32_inshop.py"


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
    with pytest.raises(UserError, match=r"main.py:3: model.steps is \[1, 2\].*_delete_=True"):
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
        ("_base_ = 'nowhere.py'\n", r"main.py:1: the base nowhere.py is missing"),
        ("_base_ = ['base.py', 'other.py']\n", r"main.py:1: the bases base.py and other.py both"),
        ("a = 1\n_base_ = 'main.py'\n", r"its own base \(main.py → main.py\)"),
        ("_base_ = 3\n", "main.py:1: _base_ must be a file's name"),
        ("_base_ = ['a' + 'b']\n", "main.py:1: _base_ must be a file's name"),
    ],
)
def test_bases_that_cannot_be_are_refused(read, text, message):
    with pytest.raises(UserError, match=message):
        read(text, base="x = 1\n", other="x = 2\n")


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "from os import path",
        "with read_base():\n    x = 1",
        "b = open('x')",
        "b = dict([('k', 1)])",
        "b = dict(**a)",
        "b = {**a}",
        "b = [i for i in (1, 2)]",
        "b = {'k': 1 for _ in a}",
        "b = a.x",
        "b = a['x']",
        "b = _base_.x",
        "b = __import__('os').sep",
        "b = f'{a}'",
        "b = 1 + 1",
        "b = not True",
        "b = 1 if a else 2",
        "b = lambda: 1",
        "b = {1, 2}",
        "b = b'bytes'",
        "b = 1j",
        "b = ...",
        "b, c = 1, 2",
        "a.x = 1",
        "a['x'] = 1",
        "b: int = 1",
        "b += 1",
        "del a",
        "if a:\n    b = 1",
        "def f():\n    pass",
        "class A:\n    pass",
        "b = (c := 1)",
        "b = undefined",
        "b = '{{ fileDirname }}'",
        "b = {'k': 1, 'k': 2}",
        "b = {(1, 2): 3}",
        "print('text')",
        "b = {{_base_.missing}}",
        "b = '{{_base_.x.missing}}'",
        "b = 'x {{_base_.table}}'",
        "b = {{_base_}}",
        "b = table",
    ],
)
def test_what_is_more_than_a_value_is_refused_with_its_line(read, line):
    base = "x = 1\ntable = dict(k=1)\n"
    with pytest.raises(UserError, match=r"main\.py:4: \S") as caught:
        read(f"_base_ = 'base.py'\na = dict(x=1)\n\n{line}\n", base=base)
    assert "\n" not in str(caught.value)


def test_a_name_of_a_base_is_refused_with_the_way_to_write_it(read):
    with pytest.raises(UserError, match=r"write \{\{_base_\.table\}\}"):
        read("_base_ = 'base.py'\nb = table\n", base="table = dict(k=1)\n")


def test_a_file_that_would_run_code_runs_none(read, tmp_path):
    trap = tmp_path / "ran"
    for line in (
        f"x = open({str(trap)!r}, 'w')",
        f"x = __import__('pathlib').Path({str(trap)!r}).touch()",
        f"import pathlib\npathlib.Path({str(trap)!r}).touch()",
        f"x = [p.touch() for p in [__import__('pathlib').Path({str(trap)!r})]]",
    ):
        with pytest.raises(UserError, match="read, never run"):
            read(line + "\n")
    assert not trap.exists()


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


def test_copies_of_copies_do_not_fill_the_memory(read):
    doubling = "".join(f"a{i + 1} = [a{i}, a{i}, a{i}, a{i}]\n" for i in range(40))
    with pytest.raises(UserError, match=r"main.py:\d+: copies of names make more than 100,000"):
        read("a0 = [1]\n" + doubling)


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


def test_a_file_written_for_the_mm_family_loads_as_it_is(tmp_path):
    """All constructs that such files use, in the usual folders."""
    texts = {
        "_base_/datasets/data.py": (
            "# dataset settings\n"
            "dataset_type = 'InShop'\n"
            "data_preprocessor = dict(\n    num_classes=3997,\n"
            "    # RGB format\n    mean=[123.675, 116.28, 103.53],\n    to_rgb=True)\n"
            "test_pipeline = [\n    dict(type='LoadImageFromFile'),\n"
            "    dict(type='Resize', scale=512),\n    dict(type='PackInputs'),\n]\n"
            "query_dataloader = dict(\n    batch_size=32,\n    dataset=dict(\n"
            "        type=dataset_type,\n        data_root='data/inshop',\n"
            "        split='query',\n        pipeline=test_pipeline),\n"
            "    sampler=dict(type='DefaultSampler', shuffle=False),\n)\n"
            "gallery_dataloader = dict(\n    dataset=dict(data_root='data/inshop'))\n"
            "val_dataloader = query_dataloader\n"
            "val_evaluator = [dict(type='RetrievalRecall', topk=1)]\n"
            "test_dataloader = val_dataloader\ntest_evaluator = val_evaluator\n"
        ),
        "_base_/schedules/schedule.py": (
            "optim_wrapper = dict(\n    optimizer=dict(type='SGD', lr=0.01, nesterov=True))\n"
            "param_scheduler = [dict(type='CosineAnnealingLR', T_max=95)]\n"
            "train_cfg = dict(by_epoch=True, max_epochs=100, val_interval=1)\nval_cfg = dict()\n"
        ),
        "_base_/runtime.py": (
            "default_scope = 'mmpretrain'\nvis_backends = [dict(type='LocalVisBackend')]\n"
            "visualizer = dict(type='UniversalVisualizer', vis_backends=vis_backends)\n"
            "load_from = None\nresume = False\n"
        ),
        "arcface/recipe.py": (
            "_base_ = [\n    '../_base_/datasets/data.py',\n"
            "    '../_base_/schedules/schedule.py',\n    '../_base_/runtime.py',\n]\n\n"
            "pretrained = 'https://example.org/a,b.pth'  # noqa\n"
            "model = dict(\n    type='ImageToImageRetriever',\n    image_encoder=[\n"
            "        dict(type='ResNet', depth=50,\n             init_cfg=dict(\n"
            "                 type='Pretrained', checkpoint=pretrained, prefix='backbone')),\n"
            "        dict(type='GlobalAveragePooling'),\n    ],\n"
            "    head=dict(type='ArcFaceClsHead', in_channels=2048, init_cfg=None),\n"
            "    prototype={{_base_.gallery_dataloader}})\n\n"
            "optim_wrapper = dict(\n    optimizer=dict(\n        type='SGD', lr=0.02, "
            "weight_decay=0.0005))\n"
            "train_cfg = dict(by_epoch=True, max_epochs=50, val_interval=1)\n"
        ),
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    config = read_config(tmp_path / "arcface/recipe.py")
    assert config["model"]["prototype"] == {"dataset": {"data_root": "data/inshop"}}
    assert config["test_dataloader"] == config["query_dataloader"]
    assert config["optim_wrapper"]["optimizer"] == {
        **{"type": "SGD", "lr": 0.02, "nesterov": True, "weight_decay": 0.0005}
    }
    checkpoint = config["model"]["image_encoder"][0]["init_cfg"]["checkpoint"]
    assert checkpoint == "https://example.org/a,b.pth"
    assert config["train_cfg"]["max_epochs"] == 50 and config["val_cfg"] == {}


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
        ("a,b", "a,b"),
        ("/p a/th, 2", "/p a/th, 2"),
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


def test_the_documented_overrides_are_all_known_and_each_sets_its_own(recipe):
    for key in DATA_ROOTS:
        config, remarks = with_options(recipe, [f"{key}=/data/a b,c"], strict=True)
        assert remarks == []
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
    config, remarks = with_options(
        recipe, [f"{key}={value}" for key, value in options.items()], strict=True
    )
    assert remarks == []
    assert {key: get(config, key) for key in options} == options


def test_later_options_win_and_dicts_are_merged(recipe):
    config, _ = with_options(
        recipe,
        ["train_cfg.max_epochs=3", "train_cfg={'max_epochs': 4}", "val_cfg={'fp16': True}"],
    )
    assert config["train_cfg"] == {"by_epoch": True, "max_epochs": 4, "val_interval": 1}
    assert config["val_cfg"] == {"fp16": True}
    config, _ = with_options(recipe, ["train_cfg={'_delete_': True, 'max_epochs': 4}"])
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
        ("param_scheduler={'x': 1}", "param_scheduler is a list"),
        ("data_preprocessor.mean.0={'x': 1}", "data_preprocessor.mean.0 is 123.675"),
    ):
        with pytest.raises(UserError, match=f"--cfg-options {key} and cannot take in a dict"):
            with_options(recipe, [option])


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("train_dataloadr.dataset.data_root=/x", "did you mean train_dataloader?"),
        ("train_cfg.max_epoch=3", "did you mean train_cfg.max_epochs?"),
        ("optimizer.lr=0.1", "did you mean optim_wrapper.optimizer.lr?"),
        ("typo_key.nope.x=1", "the configuration has no typo_key"),
    ],
)
def test_an_unknown_key_is_set_with_a_warning_and_refused_when_strict(recipe, option, hint):
    config, remarks = with_options(recipe, [option])
    assert len(remarks) == 1 and hint in remarks[0]
    key, _, text = option.partition("=")
    assert get(config, key) == parse_value(text)
    with pytest.raises(UserError, match="--strict-cfg refuses it"):
        with_options(recipe, [option], strict=True)


def test_keys_that_the_caller_reads_are_known(recipe):
    known = ("default_hooks.*.priority", "model.head.num_subcenters")
    options = ["default_hooks.logger.priority=3", "model.head.num_subcenters=2"]
    assert with_options(recipe, options, known=known, strict=True)[1] == []
    _, remarks = with_options(recipe, ["model.head.num_subcenter=2"], known=known)
    assert "did you mean model.head.num_subcenters?" in remarks[0]


# --- data roots -----------------------------------------------------------------------------------


def test_one_data_root_reaches_all_six(recipe):
    config = with_data_root(recipe, "/data/a, b")
    assert {get(config, name) for name in DATA_ROOTS} == {"/data/a, b"}
    del recipe["test_dataloader"]
    assert "test_dataloader" not in with_data_root(recipe, "/x")


def test_an_unset_variable_is_refused_with_the_line_to_type(recipe, tmp_path):
    config, _ = with_options(recipe, [f"{key}=" for key in DATA_ROOTS])
    with pytest.raises(UserError) as caught:
        data_roots(config, tmp_path)
    message = str(caught.value)
    assert "train_dataloader.dataset.data_root is empty" in message
    assert "export data_path=/…/inshop" in message
    assert "Eval/list_eval_partition.txt" in message and "Img/img" in message


def test_each_data_set_that_is_read_needs_a_directory(recipe, tmp_path):
    (tmp_path / "here").mkdir()
    config = with_data_root(recipe, "here")
    assert set(data_roots(config, tmp_path).values()) == {tmp_path / "here"}
    config, _ = with_options(config, ["model.prototype.dataset.data_root=there"])
    with pytest.raises(UserError, match=r"model\.prototype.*there is no directory.*--data-root"):
        data_roots(config, tmp_path)
    config, _ = with_options(config, ["model.prototype.dataset.data_root=3"])
    with pytest.raises(UserError, match=r"model\.prototype\.dataset\.data_root is 3"):
        data_roots(config, tmp_path)


def test_an_override_that_nothing_reads_is_accepted(recipe, tmp_path):
    config = with_data_root(recipe, str(tmp_path))
    config, remarks = with_options(config, ["query_dataloader.dataset.data_root=/nowhere"])
    assert remarks == [] and len(data_roots(config, tmp_path)) == 4
