#!/usr/bin/env bash
# The whole flow: classifier, CLIP filters, SFT, merge, GRPO, merge, evaluation; each stage done once.
#   ./run_all.sh                     continues after the last stage that is done
#   ./run_all.sh --from grpo         begin again there;  --only evaluate  --force  --dry-run  --help
#   ./run_all.sh --demo              on the built-in demo, in vasevqa/demo: under five minutes; on a terminal
#                                    a few lines, and the rest in a log
#   nohup ./run_all.sh > /dev/null 2>&1 &    continues after logout; tail -F logs/latest.log
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"

find_python vasevqa swift torch open_clip
if [[ $* == --demo && -t 1 ]]; then # what ./demo.sh vasevqa shows
  export PYTHON=$PYTHON_FOUND
  run_python "$repository/shared/tools/run_demos.py" vasevqa
fi
log_run "$recipe" run_all "$@"
run_python "$recipe/run_all.py" "$@"
