# shellcheck shell=bash
# What every recipe's real_weights.sh needs; sourced after common.sh, never run.
#   begin_real "$@"             --help and --dry-run; other words are left in real_words
#   need_gpu, need WHAT PATH    note what is missing
#   start_real RECIPE LINE      ends with exit 3 and one line where something is missing
#   step COMMAND...             says the command and runs it; ends the script where it fails
#   figure FILE KEY... [--percent]   a number of a JSON file, or "unknown"
#   report RECIPE OURS DOCUMENTED    the line to paste

real_words=() real_missing=() real_dry='' real_started=$SECONDS

begin_real() {
  local word
  export PYTHONUTF8=1
  for word in "$@"; do
    case $word in
      -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" && exit ;;
      --dry-run) real_dry=yes ;;
      *) real_words+=("$word") ;;
    esac
  done
}

need_gpu() {
  # shellcheck disable=SC2154 # common.sh sets it
  "$PYTHON_FOUND" -c 'import sys
sys.path.insert(0, sys.argv[1])
from shared.device import present_gpus
sys.exit(present_gpus() == 0)' "$repository" 2>/dev/null || real_missing+=("an NVIDIA GPU")
}

need() {
  [[ -e $2 ]] || real_missing+=("$1")
}

start_real() {
  if [[ -n ${real_missing[0]:-} ]]; then
    local list
    list=$(printf '; %s' "${real_missing[@]}")
    complain "missing: ${list:2}"
    [[ -n $real_dry ]] || exit 3
  fi
  printf '%s: %s\n' "$1" "$2"
}

step() {
  printf '$ %s\n' "$(quoted "$@")"
  [[ -n $real_dry ]] || "$@" || exit
}

figure() {
  [[ -z $real_dry ]] || return 0
  "$PYTHON_FOUND" -c 'import json, sys
file, *keys = sys.argv[1:]
share = keys[-1] == "--percent"
try:
    found = json.load(open(file, encoding="utf-8"))
    for key in keys[: len(keys) - share]:
        found = found[int(key) if isinstance(found, list) else key]
    print(f"{100 * found:.2f} %" if share else f"{found:.4g}")
except (OSError, ValueError, KeyError, IndexError, TypeError):
    print("unknown")' "$@"
}

report() {
  [[ -z $real_dry ]] || return 0
  local commit machine
  commit=$(git -C "$repository" rev-parse --short HEAD 2>/dev/null) || commit='no git'
  machine=$("$PYTHON_FOUND" -c 'import sys, torch
card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
print(f"{card}, torch {torch.__version__}, Python {sys.version.split()[0]}")')
  printf '\nours: %s\ndocumented: %s\nto paste: | %s | %s | %s | %s | %s min | %s |\n' \
    "$2" "$3" "$1" "$2" "$3" "$machine" "$(((SECONDS - real_started) / 60))" "$commit"
}
