#!/usr/bin/env bash
# Stage 2: tune the language model to recommend; every argument goes to src/prompt_tuning.py.
#   ./run_prompt_tuning.sh                                the settings below; log in logs/, run in src/out_finetuned
#   ./run_prompt_tuning.sh --category amazon_home         a flag typed here wins over the same flag below
#   ./run_prompt_tuning.sh --demo                         on the demo, after ./run_training.sh --demo
#   nohup ./run_prompt_tuning.sh > /dev/null 2>&1 &       continues after logout
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"

# Change a line, or delete it: the program's default then holds. Paths are seen from src/.
settings=(
  --model_dir ./out_distilled/vision_lora_adapter_best # stage 1's adapter
  --category all_beauty                                # or amazon_fashion, amazon_home
  --candidate_type candidates_st                       # or candidates_gpt_large
  --batch_size 1
  --num_epochs 1
  --lr 5e-5
  --finetune_output_dir ./out_finetuned
)

! is_demo "$@" || settings=() # it has data and sizes of its own
settings=("${settings[@]/#..\//$recipe/}")
settings=("${settings[@]/#.\//$recipe/src/}")
find_python lavic torch torchvision transformers peft accelerate
log_run "$recipe" prompt_tuning "$@"
run_python "$recipe/src/prompt_tuning.py" ${settings[@]+"${settings[@]}"} "$@"
