#!/usr/bin/env bash
# Stage 2: tune the language model to recommend; every argument goes to src/prompt_tuning.py.
#   ./run_prompt_tuning.sh                                the category and candidates below
#   ./run_prompt_tuning.sh --category amazon_home         a flag typed here wins over the one below
#   ./run_prompt_tuning.sh --demo                         on the demo, after ./run_training.sh --demo
#   nohup ./run_prompt_tuning.sh > /dev/null 2>&1 &       goes on after logout
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"

# One flag a line: change, add, delete or comment out any of them.
arguments=(
  --model_dir "$recipe/src/out_distilled/vision_lora_adapter_best" # stage 1's adapter
  --category all_beauty                                            # or amazon_fashion, amazon_home
  --candidate_type candidates_st                                   # or candidates_gpt_large
  --batch_size 1
  --num_epochs 1
  --lr 5e-5
)

logs=$recipe/logs
for word in "$@"; do
  [[ $word != --demo ]] || logs=$recipe/demo/runs/logs arguments=()
done
find_python lavic torch torchvision transformers peft
starts_run "$@" && start_log "$logs" prompt_tuning
run_python "$recipe/src/prompt_tuning.py" ${arguments[@]+"${arguments[@]}"} "$@"
