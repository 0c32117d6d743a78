"""An In-shop of six items and a configuration that trains on it in seconds."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from arcface.demo_data import inshop_tree as demo
from arcface.inshop_retrieval.config import RECIPE

SCRIPT = RECIPE / "run_scripts" / "run_arcface.py"
STEPS_AN_EPOCH = 4  # 24 pictures, 6 a step
EPOCHS = 3

_CONFIG = """
_base_ = "{recipe}/config/arcface/resnet50-arcface_8xb32_inshop.py"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=36),
    dict(type="RandomCrop", crop_size=32),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=36),
    dict(type="CenterCrop", crop_size=32),
    dict(type="PackInputs"),
]
train_dataloader = dict(batch_size=6, num_workers=0, dataset=dict(pipeline=train_pipeline))
test_data = dict(batch_size=6, num_workers=0, dataset=dict(pipeline=test_pipeline))
val_dataloader = test_data
model = dict(
    image_encoder=[
        dict(type="ResNet", depth=18, init_cfg=None), dict(type="GlobalAveragePooling"),
    ],
    head=dict(num_classes=4, in_channels=512, scale=16.0, margins=0.2),
    prototype=test_data,
)
param_scheduler = [dict(type="CosineAnnealingLR", T_max=3, by_epoch=True, begin=0, end=3)]
train_cfg = dict(max_epochs=3, val_interval=1, val_before_train=True)
auto_scale_lr = dict(enable=False)
default_hooks = dict(logger=dict(interval=2), checkpoint=dict(max_keep_ckpts=2))
"""


def build_inshop(root: Path, train_items: int = 4, test_items: int = 2) -> Path:
    """An In-shop directory: 6 training pictures an item; 3 queries and 3 gallery pictures."""
    with (
        mock.patch.object(demo, "NUM_TRAIN_ITEMS", train_items),
        mock.patch.object(demo, "NUM_TEST_ITEMS", test_items),
    ):
        return demo.build(root).data_root


def write_config(path: Path) -> Path:
    """The configuration, as a file that a user would write."""
    path.write_text(_CONFIG.format(recipe=RECIPE))
    return path
