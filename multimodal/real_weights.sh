#!/usr/bin/env bash
# NEEDS A DOWNLOAD (9 GB; 20 GB of disk) AND A GPU (12 GB). Not run yet: there was no GPU.
# The base model on Clotho alone, 30 epochs, from open_clip's word embeddings; then its test split.
#   ./real_weights.sh                            sounds and texts
#   DATASETS='clotho coco' ./real_weights.sh     with COCO's pictures (28 GB; 62 GB of disk)
#   ./real_weights.sh --epochs 100               other words go to run_training.py
#   ./real_weights.sh --dry-run                  what is missing, and the commands; runs nothing
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"
# shellcheck source=../shared/shell/real.sh
source "$repository/shared/shell/real.sh"

begin_real "$@"
find_python multimodal torch torchvision open_clip soundfile soxr
read -ra sets <<<"${DATASETS:-clotho}"
run=$recipe/outputs_real

need_gpu
if ! has_packages "$PYTHON_FOUND" py7zr && ! type -P 7z >/dev/null && ! type -P bsdtar >/dev/null; then
  real_missing+=("a program that unpacks Clotho: py7zr, 7z or bsdtar")
fi
start_real multimodal "${sets[*]} and the word embeddings (0.6 GB) are fetched where they are not there"

step "$PYTHON_FOUND" "$recipe/download_datasets.py" --datasets "${sets[@]}" --skip-existing
step "$PYTHON_FOUND" "$recipe/run_training.py" --nproc 1 --model-size base --epochs 30 --batch-size 32 \
  --datasets "${sets[@]}" --run-dir "$run" ${real_words[@]+"${real_words[@]}"}
step "$PYTHON_FOUND" "$recipe/evaluate.py" --checkpoint "$run" --datasets "${sets[@]}"

found=$run/evaluation/evaluation.json
report multimodal "Clotho, test split, R@1: sound to text $(figure "$found" metrics clotho/audio_to_text/R@1 --percent), \
text to sound $(figure "$found" metrics clotho/text_to_audio/R@1 --percent)" \
  "none in the document; published for CE with VGGish features (7.4 M parameters): 4.8 % and 4.0 %"
