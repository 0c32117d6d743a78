# ResNet-50 with an ArcFace head on DeepFashion In-shop: the documented recipe.
# The embedding is the pooled feature itself, 2048 numbers. lr 0.02 is that of a total batch of 256
# (8 processes x 32) and follows the real one.
_base_ = [
    "../_base_/datasets/inshop_bs32_448.py",
    "../_base_/schedules/cub_bs64.py",
    "../_base_/default_runtime.py",
]

model = dict(
    type="ImageToImageRetriever",
    image_encoder=[
        dict(
            type="ResNet",
            depth=50,
            # torchvision's name of its weights, or the path of a checkpoint; then `prefix` is
            # what comes before the backbone's names in it.
            init_cfg=dict(type="Pretrained", checkpoint="IMAGENET1K_V2", prefix="backbone"),
        ),
        dict(type="GlobalAveragePooling"),
    ],
    head=dict(
        type="ArcFaceClsHead",
        num_classes=3997,
        in_channels=2048,
        loss=dict(type="CrossEntropyLoss", loss_weight=1.0),
        init_cfg=None,
    ),
    prototype={{_base_.gallery_dataloader}},
)

optim_wrapper = dict(optimizer=dict(lr=0.02))
param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=0.01,
        by_epoch=True,
        begin=0,
        end=5,
        convert_to_iter_based=True,
    ),
    dict(type="CosineAnnealingLR", T_max=45, by_epoch=True, begin=5, end=50),
]
train_cfg = dict(by_epoch=True, max_epochs=50, val_interval=1)
auto_scale_lr = dict(enable=True, base_batch_size=256)

default_hooks = dict(
    logger=dict(type="LoggerHook", interval=20),
    checkpoint=dict(
        type="CheckpointHook",
        interval=1,
        save_best="auto",
        max_keep_ckpts=3,
        rule="greater",
    ),
)
custom_hooks = [dict(type="PrepareProtoBeforeValLoopHook"), dict(type="SyncBuffersHook")]
