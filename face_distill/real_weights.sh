#!/usr/bin/env bash
# NEEDS A DOWNLOAD (10 GB) AND A GPU (24 GB). Not run yet: there was no GPU.
# Distil a real teacher into BLIP-2's tower: 12,000 faces, 10 epochs of the documented 100; then LFW.
#   ./real_weights.sh                        with the features in teacher_features_12k/
#   TEACHER=backbone.pth ./real_weights.sh   makes them from a network first, and verifies the network too
#   ./real_weights.sh --epochs 100           other words go to train_distill.py
#   ./real_weights.sh --dry-run              what is missing, and the commands; runs nothing
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"
# shellcheck source=../shared/shell/real.sh
source "$repository/shared/shell/real.sh"

begin_real "$@"
find_python face_distill torch torchvision transformers
faces=$recipe/datasets/faces_emore run=$recipe/checkpoints_real teacher=()
[[ -z ${TEACHER:-} ]] || teacher=(--teacher "$TEACHER")

need_gpu
need "the faces, face_distill/datasets/faces_emore/train.rec (README, section 2)" "$faces/train.rec"
need "the pairs of LFW, face_distill/datasets/faces_emore/lfw.bin" "$faces/lfw.bin"
if [[ -n ${TEACHER:-} ]]; then
  need "the teacher $TEACHER" "$TEACHER"
else
  need "face_distill/teacher_features_12k/teacher_embedding.npy, or TEACHER=backbone.pth to make it from" \
    "$recipe/teacher_features_12k/teacher_embedding.npy"
fi
start_real face_distill "BLIP-2's tower (10 GB) is fetched into blip2_weights/ where it is not there"

step "$PYTHON_FOUND" "$recipe/download_weight.py"
if [[ ! -e $recipe/teacher_features_12k/teacher_embedding.npy ]]; then
  step "$PYTHON_FOUND" "$recipe/extract_teacher.py" --weights "${TEACHER:-backbone.pth}"
fi
step "$PYTHON_FOUND" "$recipe/train_distill.py" --nproc 1 --epochs 10 --amp auto --micro-batch 32 \
  --run-dir "$run" ${real_words[@]+"${real_words[@]}"}
step "$PYTHON_FOUND" "$recipe/evaluate.py" --checkpoint "$run" --data-root "$faces/lfw.bin" \
  ${teacher[@]+"${teacher[@]}"}

found=$run/evaluation/verification.json
accuracy() { figure "$found" metrics lfw "$1" accuracy --percent; }
ours="LFW, 6,000 pairs: untrained $(accuracy 'untrained student'), student $(accuracy student)"
[[ -z ${TEACHER:-} ]] || ours+=", teacher $(accuracy teacher)"
report face_distill "$ours" "none in the document"
