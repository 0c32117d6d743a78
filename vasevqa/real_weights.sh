#!/usr/bin/env bash
# NEEDS A DOWNLOAD (17 GB) AND A GPU (24 GB). Not run yet: there was no GPU.
# 50 steps of SFT on Qwen2.5-VL-7B, merged, then 200 questions before and after.
#   ./real_weights.sh                      your data in model/data/, as the documents name it
#   ./real_weights.sh --max_steps 500      other words go to sft.sh
#   ./real_weights.sh --dry-run            what is missing, and the commands; runs nothing
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"
# shellcheck source=../shared/shell/real.sh
source "$repository/shared/shell/real.sh"

begin_real "$@"
find_python vasevqa swift torch
model=$recipe/model run=$recipe/model/output_real
base=$model/models/Qwen2.5-VL-7B-Instruct merged=$run/merged

need_gpu
need "the training rows, vasevqa/model/data/video_training_dataset.json (README, Model, section 1)" \
  "$model/data/video_training_dataset.json"
need "the questions, vasevqa/model/data/questions.json (README, Model, section 4)" "$model/data/questions.json"
start_real vasevqa "Qwen2.5-VL-7B-Instruct (17 GB) is fetched into model/models/ where it is not there"

step "$PYTHON_FOUND" "$repository/shared/tools/fetch_model.py" Qwen/Qwen2.5-VL-7B-Instruct "$base"
export PYTHON=$PYTHON_FOUND
step "$model/sft.sh" --max_steps 50 --output_dir "$run/sft" ${real_words[@]+"${real_words[@]}"}
adapter=$(printf '%s\n' "$run"/sft/checkpoint-[0-9]* | sort -V | tail -n 1)
step "$model/merge.sh" --adapters "$adapter" --output_dir "$merged"
step "$PYTHON_FOUND" "$model/evaluate.py" --checkpoint "$merged" --before "$base" \
  --data-root "$model/data/questions.json" --limit 200 --out "$run/evaluation"

found=$run/evaluation/vqa.json
report vasevqa "right in content, 200 questions: base $(figure "$found" before contained --percent), \
after SFT $(figure "$found" metrics contained --percent), \
majority answer $(figure "$found" majority --percent)" "none in the documents"
