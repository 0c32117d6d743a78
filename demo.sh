#!/usr/bin/env bash
# Train every recipe on its built-in demo data and show what it learned; sets up on first use.
#   ./demo.sh                 all recipes
#   ./demo.sh face_distill    the ones you name
#   ./demo.sh --help          lists them
# At most 15 lines a recipe; the rest is in <recipe>/demo/runs/logs/demo.log.
# One that fails does not stop the others. Exit 0: all learned and ended well, 1: one failed, 130: Ctrl-C.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P) || exit 1
"$root/setup.sh" || exit
export PYTHONUTF8=1 PYTHON="${PYTHON:-$root/.venv/bin/python}"
exec "$root/.venv/bin/python" "$root/shared/tools/run_demos.py" "$@"
