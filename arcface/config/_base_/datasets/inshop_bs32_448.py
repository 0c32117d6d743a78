# DeepFashion In-shop: pictures resized to 512 x 512, 448 x 448 crops, 32 pictures a process.
# `data_root` holds Eval/list_eval_partition.txt and Img/img/; --data-root sets it everywhere.
dataset_type = "InShop"
data_root = "data/inshop"

data_preprocessor = dict(
    num_classes=3997,
    mean=[123.675, 116.28, 103.53],  # grey levels of R, G, B
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=512),
    dict(type="RandomCrop", crop_size=448),
    dict(type="RandomFlip", prob=0.5, direction="horizontal"),
    dict(type="PackInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=512),
    dict(type="CenterCrop", crop_size=448),
    dict(type="PackInputs"),
]

train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    dataset=dict(type=dataset_type, data_root=data_root, split="train", pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
query_dataloader = dict(
    batch_size=32,
    num_workers=4,
    dataset=dict(type=dataset_type, data_root=data_root, split="query", pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
gallery_dataloader = dict(
    batch_size=32,
    num_workers=4,
    dataset=dict(type=dataset_type, data_root=data_root, split="gallery", pipeline=test_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=False),
)

# Copies: an override of query_dataloader leaves these two as they are.
val_dataloader = query_dataloader
test_dataloader = query_dataloader

val_evaluator = [
    dict(type="RetrievalRecall", topk=1),
    dict(type="RetrievalAveragePrecision", topk=10),
]
test_evaluator = val_evaluator
