# ResNet-18 from random weights at 64 pixels, on the built-in demo: two minutes on two cores.
_base_ = "./resnet50-arcface_8xb32_inshop.py"

data_root = "demo/data/inshop"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=96),
    dict(type="RandomCrop", crop_size=64),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=96),
    dict(type="CenterCrop", crop_size=64),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    batch_size=24, num_workers=1, dataset=dict(data_root=data_root, pipeline=train_pipeline)
)
test_data = dict(
    batch_size=64, num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline)
)
query_dataloader = test_data
gallery_dataloader = test_data
val_dataloader = test_data
test_dataloader = test_data

data_preprocessor = dict(num_classes=120)
model = dict(
    image_encoder=[
        dict(type="ResNet", depth=18, init_cfg=None),
        dict(type="GlobalAveragePooling"),
    ],
    head=dict(num_classes=120, in_channels=512, scale=16.0, margins=0.3),
    prototype=test_data,
)

# 420 steps from random weights: AdamW gets further in them than the recipe's SGD.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-3, weight_decay=0.05),
)
param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=0.1,
        by_epoch=True,
        begin=0,
        end=1,
        convert_to_iter_based=True,
    ),
    dict(type="CosineAnnealingLR", T_max=13, by_epoch=True, begin=1, end=14),
]
train_cfg = dict(max_epochs=14, val_interval=7, val_before_train=True)
auto_scale_lr = dict(enable=False)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=7))
