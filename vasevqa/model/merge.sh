#!/usr/bin/env bash
# Merge the newest LoRA adapter into its base model, as ./output/checkpoint-merged (ms-swift).
#   ./merge.sh                                    after ./sft.sh, and again after ./grpo.sh
#   ./merge.sh --adapters ./output/7B/checkpoint-600
#   ./merge.sh --output_dir DIR                   another place; what is there is kept as DIR.1
#   ./merge.sh --demo                             the built-in demo;  --dry-run  --help
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
model=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../../shared/shell/common.sh
source "$model/../../shared/shell/common.sh"

# Relative paths here begin in model/, typed ones where they are typed.
arguments=(
  # --adapters ./output/checkpoint-600 # default: the newest below output
  --merge_lora true
  --output_dir ./output/checkpoint-merged
)

find_python vasevqa swift torch
log_run "$model" merge "$@"
run_python "$model/merge.py" "${arguments[@]}" --- "$@"
