#!/usr/bin/env bash
# Filter pictures by CLIP; a menu for clipfilter1.py, and the same six entries without a terminal.
#   ./clipfilter1.sh                       on a terminal: asks for an entry
#   ./clipfilter1.sh 2 --yes               entry 2 without questions
#   ./clipfilter1.sh 3 --threshold 0.15    entry 3 with its threshold
#   ./clipfilter1.sh 2 --input_dir DIR     every flag of clipfilter1.py is passed to it (--help lists them)
#   ./clipfilter1.sh 2 --demo              the built-in pictures
#   nohup ./clipfilter1.sh 2 > /dev/null 2>&1 &   continues after logout; tail -F logs/latest.log
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
filter=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../../shared/shell/common.sh
source "$filter/../../shared/shell/common.sh"

menu() {
  cat <<'TEXT'
1. 🔍 仅分析数据集质量分布       analyse how the scores lie, filter nothing
2. 🎯 自动过滤（先分析后过滤）   filter: analyse, propose a threshold, filter
3. ⚙️ 自定义阈值过滤             filter with a threshold of your own
4. 💻 强制使用CPU模式            filter on the CPU
5. 🎮 使用GPU 1                  filter on GPU 1
6. 📊 快速分析（100个样本）      analyse 100 pictures
TEXT
}

usage() {
  printf 'usage: %s [1-6] [flags of clipfilter1.py]; without a terminal the entry has to be typed\n' "${0##*/}"
  menu
}

on_terminal=
[[ ! -t 0 ]] || on_terminal=yes

entry=
case ${1:-} in
  [1-6])
    entry=$1
    shift
    ;;
  -h | --help)
    usage
    exit 0
    ;;
  '' | -*)
    if [[ -z $on_terminal ]]; then
      usage >&2
      exit 2
    fi
    menu
    read -r -p '请选择 / entry (1-6): ' entry
    ;;
  *) entry=$1 ;;
esac

typed() { [[ " $* " == *" --threshold "* || " $* " == *" --threshold="* || " $* " == *" --keep"* ]]; }

flags=()
case $entry in
  1) flags=(--analyze_only) ;;
  2) flags=(--confirm) ;;
  3)
    if ! typed "$@"; then
      if [[ -z $on_terminal ]]; then
        complain "entry 3 needs a threshold: ${0##*/} 3 --threshold 0.15"
        exit 2
      fi
      read -r -p '阈值 / threshold: ' threshold
      flags=("--threshold=$threshold")
    fi
    ;;
  4) flags=(--confirm --device cpu) ;;
  5) flags=(--confirm --device cuda:1) ;;
  6) flags=(--analyze_only --sample_size 100) ;;
  *)
    complain "no entry ${entry:-(none typed)}; allowed: 1 to 6"
    exit 2
    ;;
esac

find_python vasevqa torch torchvision open_clip
log_run "$filter" clipfilter1 "$@"
run_python "$filter/clipfilter1.py" ${flags[@]+"${flags[@]}"} "$@"
