"""What training reads of a configuration: by name, checked, nothing passed over in silence."""

import copy

import pytest

from arcface import run_settings
from arcface.config_options import with_options
from arcface.config_reader import RECIPE, read_config
from arcface.recipe import AdaptiveMargins, deciding
from arcface.recipe_reader import KNOWN, read_recipe
from shared.config import RunOptions
from shared.errors import UserError

DOCUMENTED = RECIPE / "config/arcface/resnet50-arcface_8xb32_inshop.py"


@pytest.fixture(scope="module")
def documented():
    return read_config(DOCUMENTED)


@pytest.fixture
def read(documented, tmp_path):
    """Reads the documented configuration under options."""

    def read(*options):
        configuration, _ = with_options(copy.deepcopy(documented), options, known=KNOWN)
        return read_recipe(configuration, tmp_path)

    return read


def test_the_documented_configuration_is_the_documented_recipe(read):
    recipe, remarks = read()
    assert remarks == []
    assert (recipe.head.num_classes, recipe.head.in_channels) == (3997, 2048)
    assert (recipe.head.scale, recipe.head.margins) == (64.0, 0.5)
    assert recipe.optimizer.kind == "SGD" and recipe.optimizer.lr == 0.02
    assert recipe.optimizer.options == {
        "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True, "dampening": 0.0,
    }  # fmt: skip
    assert (recipe.epochs, recipe.val_interval, recipe.train.batch_size) == (50, 1, 32)
    assert (recipe.recall_at, recipe.map_at) == ((1,), (10,))
    assert (recipe.log_interval, recipe.checkpoints.keep) == (20, 3)
    assert recipe.checkpoints.best == "Recall@1"


@pytest.mark.parametrize(("total", "lr"), [(128, 0.01), (64, 0.005), (256, 0.02)])
def test_the_learning_rate_is_scaled_by_the_real_batch(read, total, lr):
    assert read()[0].lr_for(total) == pytest.approx(lr)
    assert read("auto_scale_lr.enable=False")[0].lr_for(total) == 0.02


def test_margins_may_be_one_a_list_or_a_file(read, tmp_path):
    (tmp_path / "margins.txt").write_text("0.1\n0.2 0.3\n")
    few = "model.head.num_classes=3"
    assert read(few, "model.head.margins=[0.1,0.2,0.3]")[0].head.margins == (0.1, 0.2, 0.3)
    assert read(few, "model.head.margins=margins.txt")[0].head.margins == (0.1, 0.2, 0.3)


def test_adaptive_margins_come_from_their_hook(read):
    hook = "custom_hooks=[{'type': 'SetAdaptiveMarginsHook', 'margin_max': 0.4}]"
    assert read(hook)[0].head.adaptive == AdaptiveMargins(0.05, 0.4, -0.25)


def test_mixed_precision_comes_from_the_wrapper(read):
    assert read()[0].amp is None
    assert read("optim_wrapper.type=AmpOptimWrapper")[0].amp == "fp16"
    bf16 = ("optim_wrapper.type=AmpOptimWrapper", "optim_wrapper.dtype=bfloat16")
    assert read(*bf16)[0].amp == "bf16"


def test_parameters_are_treated_as_paramwise_cfg_says(read):
    optimizer = read(
        "optim_wrapper.paramwise_cfg.custom_keys.head.lr_mult=5.0",
        "optim_wrapper.paramwise_cfg.norm_decay_mult=0",
        "optim_wrapper.clip_grad.max_norm=1.5",
    )[0].optimizer
    assert optimizer.custom_keys == (("head", 5.0, 1.0),)
    assert (optimizer.norm_decay_mult, optimizer.clip_norm) == (0, 1.5)


def test_several_depths_and_no_best_file(read):
    recipe, _ = read("val_evaluator.0.topk=(1,5)", "default_hooks.checkpoint.save_best=None")
    assert recipe.recall_at == (1, 5) and recipe.checkpoints.best is None


REFUSED = {
    "optimizer": ("optim_wrapper.optimizer.type=Lion", "optim_wrapper.optimizer.type is 'Lion'"),
    "hook": ("custom_hooks=[{'type': 'EMAHook'}]", "custom_hooks.0.type is 'EMAHook'"),
    "sampler": ("train_dataloader.sampler.type=RepeatAugSampler", "sampler.type is"),
    "metric": ("val_evaluator.0.type=Accuracy", "val_evaluator.0.type is 'Accuracy'"),
    "head": ("model.head.type=LinearClsHead", "model.head.type is 'LinearClsHead'"),
    "model": ("model.type=ImageClassifier", "model.type is 'ImageClassifier'"),
    "epochs": ("train_cfg.max_epochs=0", "train_cfg.max_epochs is 0"),
    "batch": ("train_dataloader.batch_size=1.5", "train_dataloader.batch_size is 1.5"),
    "rate": ("model.head.sample_rate=1.5", "sample_rate is 1.5"),
    "margin": ("model.head.margins=1.6", "model.head.margins is 1.6"),
    "margins": ("model.head.margins=[0.1,0.2]", "2 numbers for 3997 classes"),
    "margin file": ("model.head.margins=nowhere.txt", "nowhere.txt cannot be read"),
    "accumulation": ("optim_wrapper.accumulative_counts=4", "accumulative_counts must be 1"),
    "loss weight": ("model.head.loss.loss_weight=2.0", "loss_weight must be 1.0"),
    "rule": ("default_hooks.checkpoint.rule=less", "rule is 'less'"),
    "topk": ("val_evaluator.0.topk=0", "val_evaluator.0.topk"),
    "infinite": ("optim_wrapper.optimizer.lr=1e999", "lr is inf"),
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
    with pytest.raises(UserError, match=r"betas is .*, expected two numbers in \[0, 1\)"):
        read(f"optim_wrapper.optimizer={optimizer}")


@pytest.mark.parametrize(
    ("option", "remark"),
    [
        ("model.head.scael=32", "model.head.scael is not known and has no effect"),
        ("train_cfg.max_epohcs=3", "did you mean max_epochs?"),
        ("train_dataloder.batch_size=3", "train_dataloder is not known"),
    ],
)
def test_unknown_keys_are_named_with_what_is_near(read, option, remark):
    _, remarks = read(option)
    assert len(remarks) == 1 and remark in remarks[0]


def test_files_written_for_mm_toolboxes_load_without_a_remark(documented, tmp_path):
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
    assert read_recipe({**documented, **theirs}, tmp_path)[1] == []


def test_what_decides_the_numbers_is_told_from_what_does_not(documented):
    keys = deciding(documented)
    assert keys["model.head.num_classes"] == 3997
    assert keys["train_dataloader.dataset.pipeline.1.scale"] == 512
    options = (
        "train_dataloader.num_workers=9",
        "train_dataloader.dataset.data_root=/else",
        "default_hooks.logger.interval=1",
        "train_cfg.max_epochs=9",
        "val_dataloader.batch_size=1",
    )
    free, _ = with_options(documented, options)
    assert deciding(free) == keys
    changed, _ = with_options(documented, ["optim_wrapper.optimizer.lr=0.1"])
    assert deciding(changed) != keys


def test_settings_of_a_run_can_be_read_back(tmp_path):
    (tmp_path / "Eval").mkdir()
    (tmp_path / "Img").mkdir()
    overrides = run_settings.Overrides(data_root=tmp_path, scale_lr=True)
    settings = run_settings.load(str(DOCUMENTED), overrides, tmp_path)
    assert set(settings.roots.values()) == {tmp_path}
    assert settings.remarks == []
    assert settings.recipe.base_batch_size == 256


def test_what_options_changed_is_kept_with_the_files_values(tmp_path):
    options = ("train_dataloader.batch_size=3", "model.head.sample_rate=0.5")
    config = "config/arcface/resnet18-arcface_demo.py"
    (tmp_path / "Img" / "img").mkdir(parents=True)
    (tmp_path / "Eval").mkdir()
    settings = run_settings.load(config, run_settings.Overrides(options, tmp_path), tmp_path)
    kept = settings.for_run(RunOptions(), "random")
    assert kept.changed["train_dataloader.batch_size"] == 24
    assert kept.changed["model.head.sample_rate"] is None
    assert kept.departures()["init"] == "pretrained"
    assert kept.departures()["configuration.train_dataloader.batch_size"] == 24
