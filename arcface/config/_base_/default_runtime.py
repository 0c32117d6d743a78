# What every run has: log lines, checkpoints, processes, randomness.
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=100),  # steps
    checkpoint=dict(type="CheckpointHook", interval=1),  # epochs
)

env_cfg = dict(
    cudnn_benchmark=False,
    dist_cfg=dict(backend="nccl"),  # gloo where there is no GPU
)

log_level = "INFO"
load_from = None  # a checkpoint whose weights a new run starts from
resume = False
randomness = dict(seed=None, deterministic=False)
