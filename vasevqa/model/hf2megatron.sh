#!/usr/bin/env bash
# Convert a Hugging Face model to Megatron-Core's format (ms-swift); needs a GPU and Megatron.
#   ./hf2megatron.sh                              as set below; put a # before what you do not want
#   ./hf2megatron.sh --model ./output/checkpoint-merged --output_dir output/merged-mcore
#   ./hf2megatron.sh --dry-run                    check everything, print the swift command, stop
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
model=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../../shared/shell/common.sh
source "$model/../../shared/shell/common.sh"

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0} # the GPU to use

# Relative paths here begin in model/, typed ones where they are typed.
arguments=(
  --model './models/Qwen2.5-VL-3B-Instruct'
  --to_mcore true
  --torch_dtype bfloat16
  --output_dir output/Qwen2.5-VL-3B-Instruct-mcore
  --test_convert_precision true # compares the outputs of both; needs the GPU
)

find_python vasevqa swift torch
log_run "$model" hf2megatron "$@"
run_python "$model/to_megatron.py" "${arguments[@]}" --- "$@"
