#!/usr/bin/env bash
# Reinforcement learning with GRPO on the merged model (ms-swift): answers are sampled and rewarded.
#   ./grpo.sh                                    as set below; put a # before what you do not want
#   ./grpo.sh --tuner_type full --beta 0.01      any flag of `swift rlhf`; typed ones win
#   ./grpo.sh --demo                             the built-in demo;  --dry-run  --estimate  --help
#   CUDA_VISIBLE_DEVICES=0,1 NPROC_PER_NODE=2 MASTER_PORT=29501 ./grpo.sh
#   nohup ./grpo.sh > /dev/null 2>&1 &           continues after logout; tail -F logs/latest.log
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
model=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../../shared/shell/common.sh
source "$model/../../shared/shell/common.sh"

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # the GPUs to use; without one it is the CPU
export MAX_PIXELS=${MAX_PIXELS:-1003520}              # larger pictures are scaled down to this

# Relative paths here begin in model/, typed ones where they are typed.
arguments=(
  --rlhf_type grpo
  --model './output/checkpoint-merged' # what ./merge.sh writes
  --external_plugins ./plugin/plugin.py
  --reward_funcs external_vase_acc
  --train_type lora # or full: then there is nothing to merge afterwards
  --torch_dtype bfloat16
  --dataset './data/grpo_video_dataset.json'
  --max_completion_length 256
  --target_modules all-linear
  --num_train_epochs 1
  --per_device_train_batch_size 1
  --per_device_eval_batch_size 1
  --learning_rate 1e-6
  --gradient_accumulation_steps 4
  --save_strategy steps
  --eval_strategy steps
  --eval_steps 1000
  --save_steps 300
  --save_total_limit 10
  --logging_steps 1
  --output_dir output/GRPO
  --warmup_ratio 0.01
  --dataloader_num_workers 1
  --num_generations 4
  --temperature 1.0
  --log_completions true
  --report_to tensorboard
  --num_iterations 1
  --async_generate false
  --beta 0.001
  --system ./prompt.txt
  --gradient_checkpointing false
  --ddp_find_unused_parameters false
)

find_python vasevqa swift torch
log_run "$model" grpo "$@"
run_python "$model/train.py" grpo "${arguments[@]}" --- "$@"
