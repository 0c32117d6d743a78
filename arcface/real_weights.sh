#!/usr/bin/env bash
# NEEDS A DOWNLOAD (0.1 GB) AND A GPU (16 GB). Not run yet: there was no GPU.
# The documented training of ResNet-50 on In-shop: one GPU, mixed precision, 64 pictures, 50 epochs.
#   ./real_weights.sh                           In-shop in arcface/data/inshop
#   DATA=/data/inshop ./real_weights.sh         elsewhere
#   ./real_weights.sh --amp bf16                other words go to run_arcface.py
#   ./real_weights.sh --dry-run                 what is missing, and the commands; runs nothing
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"
# shellcheck source=../shared/shell/real.sh
source "$repository/shared/shell/real.sh"

begin_real "$@"
find_python arcface torch torchvision
data=${DATA:-$recipe/data/inshop} run=$recipe/work_dirs/real

need_gpu
need "In-shop Clothes Retrieval, $data/Eval/list_eval_partition.txt (README, section 2)" \
  "$data/Eval/list_eval_partition.txt"
start_real arcface "ResNet-50's ImageNet weights (0.1 GB) are fetched into torch's cache where they are not there"

step "$PYTHON_FOUND" "$recipe/run_scripts/run_arcface.py" --data-root "$data" --nproc 1 --amp fp16 \
  --work-dir "$run" --cfg-options train_dataloader.batch_size=64 ${real_words[@]+"${real_words[@]}"}
step "$PYTHON_FOUND" "$recipe/evaluate.py" --checkpoint "$run" --data-root "$data"

found=$run/evaluation/retrieval.json
report arcface "Recall@1 $(figure "$found" metrics retrieval/Recall@1), mAP@10 $(figure "$found" metrics retrieval/mAP@10)" \
  "Recall@1 90.24, mAP@10 70.17 (one card, mixed precision, 50 epochs, batch 64)"
