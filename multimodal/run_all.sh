#!/usr/bin/env bash
# From nothing to the report: environment, data, three stages of training, evaluation. Resumes where it stopped.
#   ./run_all.sh                                               everything
#   ./run_all.sh --model-size base --batch-size 8 --epochs 50  flags of run_training.py go to it
#   ./run_all.sh --demo                                        built-in data, about two minutes on two cores
#   ./run_all.sh --help                                        stages and flags
#   nohup ./run_all.sh > /dev/null 2>&1 &                      continues after logout; log in logs/
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"

packages=(torch torchvision open_clip soundfile soxr msgspec tensorboard)
if starts_run "$@"; then
  log_run "$recipe" run_all "$@"
  # the only stage that needs no Python of the recipe's: it makes one where there is none
  (find_python multimodal "${packages[@]}") 2>/dev/null || bash "$recipe/setup_environment.sh" || exit
fi
find_python multimodal "${packages[@]}"
run_python "$recipe/run_all.py" "$@"
