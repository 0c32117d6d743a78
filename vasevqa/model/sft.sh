#!/usr/bin/env bash
# Fine-tune a vision-language model with LoRA on questions and answers about pictures (ms-swift).
#   ./sft.sh                                     as set below; put a # before what you do not want
#   ./sft.sh --num_train_epochs 3 --model DIR    any flag of `swift sft`; typed ones win
#   ./sft.sh --demo                              the built-in demo;  --dry-run  --estimate  --help
#   ./sft.sh --resume_from_checkpoint ./output/7B/checkpoint-400
#   CUDA_VISIBLE_DEVICES=0,1,2,3 NPROC_PER_NODE=4 ./sft.sh
#   nohup ./sft.sh > /dev/null 2>&1 &            continues after logout; tail -F logs/latest.log
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
model=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../../shared/shell/common.sh
source "$model/../../shared/shell/common.sh"

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # the GPUs to use; without one it is the CPU
export MAX_PIXELS=${MAX_PIXELS:-1003520}              # larger pictures are scaled down to this

# Relative paths here begin in model/, typed ones where they are typed.
arguments=(
  --model './models/Qwen2.5-VL-7B-Instruct'
  --dataset './data/video_training_dataset.json'
  --split_dataset_ratio 0.01
  --train_type lora # or full
  --torch_dtype bfloat16
  --num_train_epochs 2
  --per_device_train_batch_size 1
  --per_device_eval_batch_size 1
  --learning_rate 1e-4
  --lora_rank 8
  --lora_alpha 32
  --target_modules all-linear
  --freeze_vit true
  --gradient_accumulation_steps 16
  --eval_steps 100
  --save_steps 100
  --save_total_limit 5
  --logging_steps 5
  --max_length 4096
  --output_dir output/7B
  --warmup_ratio 0.05
  --dataloader_num_workers 4
  --dataset_num_proc 4
)

find_python vasevqa swift torch
log_run "$model" sft "$@"
run_python "$model/train.py" sft "${arguments[@]}" --- "$@"
