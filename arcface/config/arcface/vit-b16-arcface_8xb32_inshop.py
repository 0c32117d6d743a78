# The recipe on open_clip's ViT-B-16: 224 x 224 crops of the 256 x 256 pictures as they are on disk,
# a gentler margin, AdamW with a small step for the trained tower and five times that for the head.
_base_ = "./resnet50-arcface_8xb32_inshop.py"

data_preprocessor = dict(  # of open_clip's towers
    mean=[122.7709383, 116.7460125, 104.09373615],
    std=[68.5005327, 66.6321579, 70.32316305],
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=256),
    dict(type="RandomCrop", crop_size=224),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=256),
    dict(type="CenterCrop", crop_size=224),
    dict(type="PackInputs"),
]
test_data = dict(dataset=dict(pipeline=test_pipeline))
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
query_dataloader = test_data
gallery_dataloader = test_data
val_dataloader = test_data
test_dataloader = test_data

model = dict(
    image_encoder=[
        dict(
            type="OpenClip",
            model_name="ViT-B-16",
            # open_clip's name of its weights, or the path of a checkpoint.
            init_cfg=dict(type="Pretrained", checkpoint="laion2b_s34b_b88k"),
        ),
    ],
    head=dict(in_channels=512, scale=32.0, margins=0.3),
    prototype=test_data,
)

optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=5e-5, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=dict(head=dict(lr_mult=5.0))),
)
param_scheduler = [
    dict(
        type="LinearLR",
        start_factor=0.01,
        by_epoch=True,
        begin=0,
        end=2,
        convert_to_iter_based=True,
    ),
    dict(type="CosineAnnealingLR", T_max=30, by_epoch=True, begin=2, end=32),
]
train_cfg = dict(max_epochs=32)
