#!/usr/bin/env bash
# Watch the newest run of this recipe; the run does not notice. Every argument goes to the monitor.
#   ./monitor_training.sh           live on a terminal until the run ends or Ctrl-C, else one look
#   ./monitor_training.sh --once    one look; --json for programs, --follow without a terminal
#   ./monitor_training.sh --stop    let the run save and leave
#   ./monitor_training.sh --menu    choose from a menu
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
# shellcheck source=../shared/shell/common.sh
source "$recipe/../shared/shell/common.sh"

find_python lavic yaml
run_python "$repository/shared/tools/monitor.py" --recipe lavic "$@"
