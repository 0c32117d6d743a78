#!/usr/bin/env bash
# Stage 1: teach LLaVA-v1.6's vision tower. Every argument goes to src/knowledge_distillation.py.
#   ./run_training.sh                            the settings below; log in logs/, run in src/out_distilled
#   nohup ./run_training.sh > /dev/null 2>&1 &   continues after the terminal is closed
#   ./run_training.sh --max_samples all          a flag typed here wins over the same flag below
#   ./run_training.sh --demo                     built-in data, on any machine
#   ./monitor_training.sh                        watch it, from another terminal
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"

# Change a line, or delete it: the program's default then holds. Paths are seen from src/.
settings=(
  --batch_size 1     # samples of a forward pass; 1 fits 20 GB
  --num_epochs 1     # 1 to 3
  --lr 5e-5          # learning rate
  --max_samples 5000 # for a test; delete this line to train on everything
  --train_data ../data/item2meta_train.json
  --val_data ../data/item2meta_valid.jsonl
  --output_dir ./out_distilled
)

! is_demo "$@" || settings=() # it has data and sizes of its own
settings=("${settings[@]/#..\//$recipe/}")
settings=("${settings[@]/#.\//$recipe/src/}")
find_python lavic torch torchvision transformers peft accelerate
log_run "$recipe" training "$@"
run_python "$recipe/src/knowledge_distillation.py" ${settings[@]+"${settings[@]}"} "$@"
