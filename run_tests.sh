#!/usr/bin/env bash
# Pass the tests; sets up on first use, ends with pytest's own closing line.
#   ./run_tests.sh             what CI runs: unit, recipes, shell, faults
#   ./run_tests.sh --fast      unit tests alone, under two minutes
#   ./run_tests.sh --full      everything: the demos and README commands as written, kill campaigns, second seeds
#   ./run_tests.sh --fast tests/unit/test_files.py -x    more arguments go to pytest; paths are the repository's
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -u
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P) && cd -- "$root" || exit 1

tier=default
case ${1:-} in
  -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$root/run_tests.sh" && exit ;;
  --fast | --full) tier=${1#--} && shift ;;
esac
paths=(tests/unit tests/recipes tests/shell tests/faults)
marks='not full'
case $tier in
  fast) paths=(tests/unit) marks='not slow and not full' ;;
  full) paths+=(tests/full) marks='' ;;
esac

"$root/setup.sh" || exit
# Two workers; files with tests marked serial share one of them. No hub, no thread storms.
arguments=(-n 2 -m "$marks")
for word in "$@"; do
  [[ ! -e ${word%%::*} ]] || paths=() # the user names the tests
done
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONUTF8=1
exec "$root/.venv/bin/python" -m pytest "${arguments[@]}" ${paths[@]+"${paths[@]}"} "$@"
