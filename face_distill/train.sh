#!/usr/bin/env bash
# Distil a face teacher into adapters on BLIP-2's vision tower; every argument goes to train_distill.py.
#   ./face_distill/train.sh                            every visible GPU, the CPU when there is none
#   ./face_distill/train.sh --demo                     the built-in demo, about two minutes on two cores
#   ./face_distill/train.sh --nproc 4 --batch-size 64  see --help for every flag
#   nohup ./face_distill/train.sh > /dev/null 2>&1 &   continues after logout
#   tail -F face_distill/logs/latest.log               follow the newest run (a demo's: face_distill/demo/runs/logs)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
[ -d "$recipe/../shared" ] || {
  echo "error: shared/ is missing beside face_distill/: copy the whole repository" >&2
  exit 3
}
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"

find_python face_distill torch torchvision transformers
log_run "$recipe" training "$@"
run_python "$recipe/train_distill.py" "$@"
