#!/usr/bin/env bash
# NEEDS A DOWNLOAD (15 GB, and some thousand pictures) AND A GPU (20 GB). Not run yet: there was no GPU.
# Stage 1 on LLaVA-v1.6-Mistral-7B with the first products of the real catalogue, one epoch.
#   ./real_weights.sh                      500 products to learn from, 200 pictures to validate with
#   PRODUCTS=5000 ./real_weights.sh        more of them
#   ./real_weights.sh --load_in_4bit       other words go to knowledge_distillation.py
#   ./real_weights.sh --dry-run            what is missing, and the commands; runs nothing
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"
# shellcheck source=../shared/shell/real.sh
source "$repository/shared/shell/real.sh"

begin_real "$@"
find_python lavic torch torchvision transformers peft accelerate
data=$recipe/data slice=$recipe/data/real run=$recipe/src/out_real

need_gpu
need "the products, lavic/data/item2meta_train.json (README, section 2)" "$data/item2meta_train.json"
need "the pictures to validate with, lavic/data/item2meta_valid.jsonl" "$data/item2meta_valid.jsonl"
start_real lavic "the slice's pictures, and LLaVA-v1.6-Mistral-7B (15 GB) into the Hub's cache, are fetched"

printf '$ the first %s products and 200 pictures into %s\n' "${PRODUCTS:-500}" "$slice"
[[ -n $real_dry ]] || "$PYTHON_FOUND" -c 'import json, os, sys
data, slice, count = sys.argv[1:]
os.makedirs(slice, exist_ok=True)
with open(f"{data}/item2meta_train.json", encoding="utf-8") as file:
    items = list(json.load(file).items())[: int(count)]
with open(f"{slice}/item2meta_train.json", "w", encoding="utf-8") as file:
    json.dump(dict(items), file)
with open(f"{data}/item2meta_valid.jsonl", encoding="utf-8") as file:
    lines = [line for line in file if line.strip()][:200]
with open(f"{slice}/item2meta_valid.jsonl", "w", encoding="utf-8") as file:
    file.writelines(lines)' "$data" "$slice" "${PRODUCTS:-500}" || exit
printf '%s\n' "$ crawl_images.py --data-root $slice   (pictures that are gone do not stop the run)"
code=0
[[ -n $real_dry ]] || "$PYTHON_FOUND" "$recipe/src/crawl_images.py" --data-root "$slice" || code=$?
((code < 2)) || exit "$code"
step "$PYTHON_FOUND" "$recipe/src/knowledge_distillation.py" --nproc 1 --batch_size 1 --num_epochs 1 --lr 5e-5 \
  --validate_before_training --output_dir "$run" \
  --train_data "$slice/item2meta_train.json" --train_images_dir "$slice/train_images" \
  --val_data "$slice/item2meta_valid.jsonl" --val_images_dir "$slice/valid_images" \
  ${real_words[@]+"${real_words[@]}"}

found=$run/status.json
report lavic "val_loss $(figure "$found" result before) before, $(figure "$found" result after) after, \
${PRODUCTS:-500} products, N $(figure "$found" result n)" "val_loss < 0.6 (all products, RTX 4090, 4 to 5 hours)"
