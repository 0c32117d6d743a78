"""What training reads of a configuration: by name, checked, nothing passed over in silence."""

import json

import pytest

from arcface.inshop_retrieval.config import RECIPE, read_config, with_options
from arcface.inshop_retrieval.recipe import (
    DATASETS,
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
    assert (recipe.num_classes, recipe.in_channels) == (3997, 2048)
    assert (recipe.scale, recipe.margins) == (64.0, 0.5)
    assert (recipe.optimizer, recipe.lr) == ("SGD", 0.02)
    assert (recipe.momentum, recipe.weight_decay, recipe.nesterov) == (0.9, 5e-4, True)
    assert (recipe.epochs, recipe.val_interval, recipe.train.batch_size) == (50, 1, 32)
    assert (recipe.depths("Recall"), recipe.depths("mAP")) == ((1,), (10,))
    assert (recipe.log_interval, recipe.keep, recipe.best) == (20, 3, "Recall@1")


@pytest.mark.parametrize(("total", "lr"), [(128, 0.01), (64, 0.005), (256, 0.02)])
def test_the_learning_rate_is_scaled_by_the_real_batch(read, total, lr):
    assert read()[0].lr_for(total) == pytest.approx(lr)
    assert read("auto_scale_lr.enable=False")[0].lr_for(total) == 0.02


def test_margins_may_be_one_a_list_or_a_file(read, tmp_path):
    (tmp_path / "margins.txt").write_text("0.1\n0.2 0.3\n")
    few = "model.head.num_classes=3"
    assert read(few, "model.head.margins=0.1,0.2,0.3")[0].margins == [0.1, 0.2, 0.3]
    assert read(few, "model.head.margins=margins.txt")[0].margins == [0.1, 0.2, 0.3]


def test_adaptive_margins_come_from_their_hook(read):
    hook = "custom_hooks=[{'type': 'SetAdaptiveMarginsHook', 'margin_max': 0.4}]"
    assert read(hook)[0].adaptive == (0.05, 0.4, -0.25)


def test_mixed_precision_comes_from_the_wrapper(read):
    assert read()[0].amp is None
    assert read("optim_wrapper.type=AmpOptimWrapper")[0].amp == "fp16"
    bf16 = ("optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.dtype=bfloat16")
    assert read(*bf16)[0].amp == "bf16"


def test_parameters_are_treated_as_paramwise_cfg_says(read):
    recipe = read(
        "optim_wrapper.paramwise_cfg.custom_keys.head.lr_mult=5.0",
        "optim_wrapper.paramwise_cfg.norm_decay_mult=0",
        "optim_wrapper.clip_grad.max_norm=1.5",
    )[0]
    assert recipe.custom_keys == {"head": {"lr_mult": 5.0}}
    assert (recipe.norm_decay, recipe.clip_norm) == (0, 1.5)


def test_several_depths_and_no_best_file(read):
    recipe, _ = read("val_evaluator.0.topk=(1,5)", "default_hooks.checkpoint.save_best=None")
    assert recipe.depths("Recall") == (1, 5) and recipe.best is None


REFUSED = {
    "optimizer": ("optim_wrapper.optimizer.type=Lion", "optim_wrapper.optimizer.type is 'Lion'"),
    "hook": ("custom_hooks=[{'type': 'EMAHook'}]", "custom_hooks.0.type is 'EMAHook'"),
    "sampler": ("train_dataloader.sampler.type=RepeatAugSampler", "sampler.type is"),
    "metric": ("val_evaluator.0.type=Accuracy", "val_evaluator.0.type is 'Accuracy'"),
    "head": ("model.head.type=LinearClsHead", "model.head.type is 'LinearClsHead'"),
    "model": ("model.type=ImageClassifier", "model.type is 'ImageClassifier'"),
    "epochs": ("train_cfg.max_epochs=0", "train_cfg.max_epochs must be a whole number from 1"),
    "batch": (
        "train_dataloader.batch_size=1.5",
        "train_dataloader.batch_size must be a whole number",
    ),
    "rate": (
        "model.head.sample_rate=1.5",
        "sample_rate must be a number above 0 and up to 1, got 1.5",
    ),
    "margin": ("model.head.margins=1.6", "model.head.margins is 1.6"),
    "margins": ("model.head.margins=[0.1,0.2]", "2 numbers for 3997 classes"),
    "margin file": ("model.head.margins=nowhere.txt", "nowhere.txt cannot be read"),
    "accumulation": ("optim_wrapper.accumulative_counts=4", "accumulative_counts is 4, allowed: 1"),
    "loss weight": ("model.head.loss.loss_weight=2.0", "loss_weight is 2.0, allowed: 1.0"),
    "rule": ("default_hooks.checkpoint.rule=less", "rule is 'less'"),
    "topk": ("val_evaluator.0.topk=0", "val_evaluator.0.topk"),
    "infinite": ("optim_wrapper.optimizer.lr=1e999", "lr must be a number"),
    "no loader": ("train_dataloader=3", "train_dataloader is 3"),
}


@pytest.mark.parametrize(("option", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_to_be_had_is_refused_by_name(read, option, message):
    with pytest.raises(UserError) as refused:
        read(option)
    assert message in str(refused.value)


@pytest.mark.parametrize("betas", ["3", "(0.9,)", "(0.9,1.0)", "'ab'"])
def test_betas_that_are_no_pair_below_one_are_refused(read, betas):
    optimizer = f"{{'type': 'AdamW', 'lr': 0.1, 'betas': {betas}, '_delete_': True}}"
    with pytest.raises(UserError, match=r"betas is .*, expected two: a number from 0 to below 1"):
        read(f"optim_wrapper.optimizer={optimizer}")


REMARKS = {
    "a key of the head": ("model.head.scael=32", "model.head.scael is not known and has no effect"),
    "a near name": ("train_cfg.max_epohcs=3", "did you mean max_epochs?"),
    "a name at the top": ("train_dataloder.batch_size=3", "did you mean train_dataloader?"),
    "a data set's key": ("val_dataloader.dataset.slpit=query", "did you mean split?"),
    "imports": ("custom_imports={'imports': ['mine']}", "custom_imports has no effect"),
}


@pytest.mark.parametrize(("option", "remark"), REMARKS.values(), ids=REMARKS)
def test_keys_without_effect_are_named_with_what_is_near(read, option, remark):
    _, remarks = read(option)
    assert len(remarks) == 1 and remark in remarks[0]


EDITS = (  # as mm's users make them, all in one command
    *(
        "train_dataloader.batch_size=64",
        "train_dataloader.num_workers=8",
        "train_cfg.max_epochs=10",
    ),
    *("optim_wrapper.optimizer.lr=0.01", "optim_wrapper.clip_grad.max_norm=5", "load_from=/w.pth"),
    *("model.head.margins=0.3", "default_hooks.checkpoint.interval=5", "val_evaluator.0.topk=1,5"),
    *("optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.loss_scale=dynamic"),
    *("param_scheduler.1.T_max=5", "randomness.seed=3", "work_dir=/runs/a", "resume=True"),
    *("env_cfg.cudnn_benchmark=True", "train_dataloader.persistent_workers=False"),
    *("custom_hooks=[{'type': 'SyncBuffersHook'}]", "val_dataloader.drop_last=False"),
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


def test_what_decides_the_numbers_is_told_from_what_does_not(documented, read):
    keys = deciding(read()[0])
    assert keys["model.head.num_classes"] == 3997
    assert keys["train_dataloader.dataset.pipeline.1.scale"] == 512
    options = (
        "train_dataloader.num_workers=4",
        "train_dataloader.dataset.data_root=/else",
        "default_hooks.logger.interval=1",
        "train_cfg.max_epochs=9",
        "val_dataloader.batch_size=1",
    )
    assert deciding(read(*options)[0]) == keys
    assert deciding(read("optim_wrapper.optimizer.lr=0.1")[0]) != keys


def write_list(root):
    (root / "Eval").mkdir()
    lines = ["3", "image_name item_id evaluation_status", "a i train", "b j query", "c j gallery"]
    (root / "Eval" / "list_eval_partition.txt").write_text("\n".join(lines))


def test_one_data_root_reaches_all_six(documented, tmp_path):
    write_list(tmp_path)
    settings = settle(documented, Overrides(data_root=tmp_path, scale_lr=True), tmp_path)
    text = json.dumps(settings.configuration)
    assert text.count(json.dumps(str(tmp_path))) == 6
    assert settings.recipe.gallery.root == str(tmp_path)
    assert settings.recipe.num_classes == 3997 and settings.remarks == []


def test_an_unset_variable_is_refused_with_the_line_to_type(documented, tmp_path):
    options = tuple(f"{name}.dataset.data_root=" for name in DATASETS)
    with pytest.raises(UserError) as caught:
        settle(documented, Overrides(options), tmp_path)
    message = str(caught.value)
    assert "train_dataloader.dataset.data_root is empty" in message
    assert "export data_path=/…/inshop" in message
    assert "Eval/list_eval_partition.txt" in message and "Img/img" in message


def test_each_data_set_that_is_read_needs_a_directory(documented, tmp_path):
    write_list(tmp_path)
    over = Overrides((), data_root=tmp_path)
    for value, message in (("there", "there is no directory.*--data-root"), ("3", "root is 3")):
        config = with_options(
            settle(documented, over, tmp_path).configuration,
            [f"model.prototype.dataset.data_root={value}"],
        )
        with pytest.raises(UserError, match=rf"model\.prototype.*{message}"):
            settle(config, Overrides(), tmp_path)
    options = ("query_dataloader.dataset.data_root=/nowhere",)  # which nothing reads
    found = settle(documented, Overrides(options, strict=True, data_root=tmp_path), tmp_path)
    assert found.remarks == []


def test_what_options_changed_is_kept_with_the_files_values(tmp_path):
    write_list(tmp_path)
    options = ("train_dataloader.batch_size=3", "model.head.sample_rate=0.5")
    config = read_config(RECIPE / "config/arcface/resnet18-arcface_demo.py")
    changed = settle(config, Overrides(options, tmp_path), tmp_path).changed
    assert changed["train_dataloader.batch_size"] == 24
    assert changed["model.head.sample_rate"] is None
