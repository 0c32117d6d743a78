"""What training reads of a configuration: by name, checked, nothing passed over in silence."""

import json

import pytest

from arcface.inshop_retrieval.config import RECIPE, read_config, with_options
from arcface.inshop_retrieval.recipe import (
    Overrides,
    deciding,
    read_recipe,
    settle,
    without_data,
)
from shared.errors import UserError

DOCUMENTED = RECIPE / "config/arcface/resnet50-arcface_8xb32_inshop.py"


@pytest.fixture(scope="module")
def documented():
    return read_config(DOCUMENTED)


@pytest.fixture
def read(documented, tmp_path):
    """Reads the documented configuration under options."""

    def read(*options):
        found = without_data(documented, Overrides(options), tmp_path)
        return found.recipe, found.remarks

    return read


def test_the_documented_configuration_is_the_documented_recipe(read):
    recipe, remarks = read()
    assert remarks == []
    assert (recipe.num_classes, recipe.in_channels, recipe.encoder[0]["depth"]) == (3997, 2048, 50)
    assert (recipe.scale, recipe.margins) == (64.0, 0.5)
    assert (recipe.optimizer, recipe.lr) == ("SGD", 0.02)
    assert (recipe.momentum, recipe.weight_decay, recipe.nesterov) == (0.9, 5e-4, True)
    assert (recipe.epochs, recipe.val_interval, recipe.train.batch_size) == (50, 1, 32)
    assert (recipe.depths("Recall"), recipe.depths("mAP")) == ((1,), (10,))
    assert (recipe.log_interval, recipe.keep, recipe.best) == (20, 3, "Recall@1")
    steps = [(step["type"], *list(step.values())[1:2]) for step in recipe.train.pipeline]
    assert steps == [
        *(("LoadImageFromFile",), ("Resize", 512), ("RandomCrop", 448), ("RandomFlip", 0.5)),
        ("PackInputs",),
    ]
    assert recipe.mean == [123.675, 116.28, 103.53]
    assert [recipe.lr_for(total) for total in (128, 64, 256)] == pytest.approx([0.01, 0.005, 0.02])
    assert [n for n in range(1, 51) if recipe.is_saved(n)] == list(range(1, 51))


_OPTIM, _HOOK = "optim_wrapper", "{'type': 'SetAdaptiveMarginsHook', 'margin_max': 0.4}"
_THREE = "model.head.num_classes=3"
VALUES = [  # what of the recipe is another one, and the options
    ("scale_lr", False, "auto_scale_lr.enable=False"),
    ("margins", [0.1, 0.2, 0.3], _THREE, "model.head.margins=0.1,0.2,0.3"),
    ("margins", [0.1, 0.2, 0.3], _THREE, "model.head.margins=margins.txt"),
    ("adaptive", (0.05, 0.4, -0.25), f"custom_hooks=[{_HOOK}]"),
    ("amp", "fp16", f"{_OPTIM}.type=AmpOptimWrapper"),
    ("amp", "bf16", f"{_OPTIM}.type=AmpOptimWrapper", f"{_OPTIM}.dtype=bfloat16"),
    (
        *("custom_keys", {"head": {"lr_mult": 5.0}}),
        f"{_OPTIM}.paramwise_cfg.custom_keys.head.lr_mult=5.0",
    ),
    ("norm_decay", 0, f"{_OPTIM}.paramwise_cfg.norm_decay_mult=0"),
    ("best", None, "default_hooks.checkpoint.save_best=None"),
]


@pytest.mark.parametrize(("name", "value", "options"), [(n, v, o) for n, v, *o in VALUES])
def test_an_option_becomes_what_it_says(read, tmp_path, name, value, options):
    (tmp_path / "margins.txt").write_text("0.1\n0.2 0.3\n")
    recipe, remarks = read(*options)
    assert remarks == []
    assert getattr(recipe, name) == value != getattr(read()[0], name)


def test_epochs_that_are_validated_and_saved_include_the_last(read):
    intervals = ("train_cfg.val_interval=3", "default_hooks.checkpoint.interval=4")
    recipe, _ = read("train_cfg.max_epochs=10", "train_cfg.val_begin=5", *intervals)
    epochs = range(1, 11)
    assert [epoch for epoch in epochs if recipe.is_validated(epoch)] == [6, 9, 10]
    assert [epoch for epoch in epochs if recipe.is_saved(epoch)] == [4, 8, 10]


_ADAMW = "optim_wrapper.optimizer={{'type': 'AdamW', 'lr': 0.1, '_delete_': True, 'betas': {}}}"
REFUSED = [
    ("optim_wrapper.optimizer.type=Lion", "optim_wrapper.optimizer.type is 'Lion'"),
    ("custom_hooks=[{'type': 'EMAHook'}]", "custom_hooks.0.type is 'EMAHook'"),
    ("val_evaluator.0.type=Accuracy", "val_evaluator.0.type is 'Accuracy'"),
    ("model.type=ImageClassifier", "model.type is 'ImageClassifier'"),
    ("model.head.sample_rate=1.5", "sample_rate must be a number above 0 and up to 1, got 1.5"),
    ("model.head.margins=[0.1,0.2]", "2 numbers for 3997 classes"),
    ("optim_wrapper.accumulative_counts=4", "accumulative_counts is 4, allowed: 1"),
    ("default_hooks.checkpoint.save_best=retrieval/Recall@5", "save_best is"),
    ("optim_wrapper.optimizer.momentum=0", "nesterov needs a momentum above 0"),
    ("auto_scale_lr.base_batch_size=None", "auto_scale_lr.base_batch_size is missing"),
    ("train_dataloader=3", "train_dataloader is 3"),
    (_ADAMW.format("(0.9,)"), "expected two: a number from 0 to below 1"),
    (_ADAMW.format("(0.9,1.0)"), "expected two: a number from 0 to below 1"),
]


@pytest.mark.parametrize(("option", "message"), REFUSED)
def test_what_is_not_to_be_had_is_refused_by_name(read, option, message):
    with pytest.raises(UserError) as refused:
        read(option)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("option", "remark"),
    [
        ("train_dataloder.batch_size=3", "did you mean train_dataloader?"),
        ("val_dataloader.dataset.slpit=query", "did you mean split?"),
        ("train_cfg.zzz=3", "train_cfg.zzz is not known and has no effect; known"),
    ],
)
def test_keys_without_effect_are_named_with_what_is_near(read, option, remark):
    _, remarks = read(option)
    assert len(remarks) == 1 and remark in remarks[0]


EDITS = (  # as mm's users make them, all in one command
    *("train_dataloader.batch_size=64", "train_dataloader.num_workers=8"),
    *("train_cfg.max_epochs=10", "model.image_encoder.0.depth=101", "randomness.seed=3"),
    *("optim_wrapper.optimizer.lr=0.01", "optim_wrapper.clip_grad.max_norm=5", "load_from=/w.pth"),
    *("model.head.margins=0.3", "default_hooks.checkpoint.interval=5", "val_evaluator.0.topk=1,5"),
    *("optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.loss_scale=dynamic"),
    *("param_scheduler.1.T_max=5", "work_dir=/runs/a", "resume=True"),
    *("env_cfg.cudnn_benchmark=True", "train_dataloader.persistent_workers=False"),
    *("custom_hooks=[{'type': 'SyncBuffersHook'}]", "val_dataloader.drop_last=False"),
    "query_dataloader.dataset.data_root=/nowhere",  # which nothing reads
)


def test_edits_as_mm_users_make_them_leave_no_remark(read):
    recipe, remarks = read(*EDITS)
    assert remarks == []
    assert (recipe.train.batch_size, recipe.train.workers, recipe.epochs) == (64, 8, 10)
    assert (recipe.lr, recipe.clip_norm, recipe.amp, recipe.margins) == (0.01, 5.0, "fp16", 0.3)
    assert (recipe.depths("Recall"), recipe.save_interval, recipe.seed) == ((1, 5), 5, 3)
    assert (recipe.work_dir, recipe.resume, recipe.load_from) == ("/runs/a", True, "/w.pth")


def test_files_written_for_mm_toolboxes_load_without_a_remark(documented):
    hooks = {
        "timer": {"type": "IterTimerHook"},
        "logger": {"type": "LoggerHook", "interval": 20},
        "param_scheduler": {"type": "ParamSchedulerHook"},
        "checkpoint": {"type": "CheckpointHook", "interval": 1, "save_best": "auto"},
        "sampler_seed": {"type": "DistSamplerSeedHook"},
        "visualization": {"type": "VisualizationHook", "enable": False},
    }
    theirs = {
        "default_scope": "mmpretrain",
        "default_hooks": hooks,
        "env_cfg": {"cudnn_benchmark": False, "mp_cfg": {}, "dist_cfg": {"backend": "nccl"}},
        "vis_backends": [{"type": "LocalVisBackend"}],
        "visualizer": {"type": "UniversalVisualizer"},
        "log_level": "INFO",
        "resume": False,
        "randomness": {"seed": None, "deterministic": False},
    }
    assert read_recipe({**documented, **theirs})[1] == []


def test_what_decides_the_numbers_is_told_from_what_does_not(read):
    keys = deciding(read()[0])
    options = (
        "train_dataloader.num_workers=4",
        "train_dataloader.dataset.data_root=/else",
        "default_hooks.logger.interval=1",
        "train_cfg.max_epochs=9",
        "val_dataloader.batch_size=1",
    )
    assert deciding(read(*options)[0]) == keys
    scale = "train_dataloader.dataset.pipeline.1.scale"
    assert deciding(read(f"{scale}=500")[0]) == {**keys, scale: 500} != keys


@pytest.fixture
def inshop(tmp_path):
    (tmp_path / "Eval").mkdir()
    lines = ["3", "image_name item_id evaluation_status", "a i train", "b j query", "c j gallery"]
    (tmp_path / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines))
    return tmp_path


def test_one_data_root_reaches_all_six(documented, inshop):
    settings = settle(documented, Overrides(data_root=inshop, scale_lr=True), inshop)
    assert json.dumps(settings.configuration).count(json.dumps(str(inshop))) == 6
    assert settings.recipe.gallery.root == str(inshop)
    assert settings.recipe.num_classes == 3997 and settings.remarks == []
    for value, message in (("there", "there is no directory.*--data-root"), ("3", "root is 3")):
        option = f"model.prototype.dataset.data_root={value}"  # each that is read needs one
        config = with_options(settings.configuration, [option])
        with pytest.raises(UserError, match=rf"model\.prototype.*{message}"):
            settle(config, Overrides(), inshop)


def test_what_options_changed_is_kept_with_the_files_values(inshop):
    options = ("train_dataloader.batch_size=3", "model.head.sample_rate=0.5")
    config = read_config(RECIPE / "config/arcface/resnet18-arcface_demo.py")
    changed = settle(config, Overrides(options, inshop), inshop).changed
    assert changed["train_dataloader.batch_size"] == 24
    assert changed["model.head.sample_rate"] is None
