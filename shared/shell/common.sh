# shellcheck shell=bash
# What every recipe's script needs; sourced, never run. A script's first line of code makes sure of bash:
#   [ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
# then:  find_python RECIPE PACKAGE…     sets PYTHON_FOUND, or ends with exit 3
#        log_run PLACE NAME "$@"         sends all output to PLACE/logs/NAME_<time>.log as well (log.sh)
#        run_python SCRIPT [ARGUMENTS]   becomes the Python launcher: same process id, so signals reach it
# Nothing here changes the directory: a path that the user typed stays relative to where it was typed.

repository=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P) || exit 1

# shellcheck source=log.sh
source "$repository/shared/shell/log.sh"

complain() { printf '%s\n' "$*" >&2; }

# Whether an interpreter is 3.11 or newer and finds every package; imports none of them (-P: not from here).
has_packages() {
  local python=$1
  shift
  "$python" -P -c 'import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))' "$@" >/dev/null 2>&1
}

find_python() {
  local recipe=$1 root candidate active=()
  shift
  if [[ -n ${PYTHON:-} ]]; then
    PYTHON_FOUND=$(type -P -- "$PYTHON") && return
    complain "PYTHON=$PYTHON is not a program: name an interpreter, or unset PYTHON"
    exit 3
  fi
  [[ -z ${VIRTUAL_ENV:-} ]] || active+=("$VIRTUAL_ENV")
  [[ -z ${CONDA_PREFIX:-} || ${CONDA_DEFAULT_ENV:-base} == base ]] || active+=("$CONDA_PREFIX")
  for root in ${active[@]+"${active[@]}"} "$repository/$recipe/venv" "$repository/.venv"; do
    candidate=$root/bin/python
    if [[ -x $candidate ]] && has_packages "$candidate" "$@"; then
      PYTHON_FOUND=$candidate
      return
    fi
  done
  complain "$recipe needs Python 3.11 or newer with $*${active[0]:+, which ${active[0]} lacks}:" \
    "run $repository/setup.sh, or activate your own environment and" \
    "pip install -r $repository/$recipe/requirements.txt"
  exit 3
}

# Words as a shell would take them, quoted only where needed.
quoted() {
  local word words=''
  for word in "$@"; do
    [[ $word == *[!][:alnum:]_./=:,@%+-]* || -z $word ]] && word="'${word//\'/\'\\\'\'}'"
    words+=" $word"
  done
  printf '%s' "${words:1}"
}

run_python() {
  local name
  for name in HF_HOME HF_HUB_CACHE TRANSFORMERS_CACHE HF_DATASETS_CACHE TORCH_HOME MODELSCOPE_CACHE; do
    [[ -z ${!name:-} || ${!name} == [/~]* ]] || export "$name=$PWD/${!name}"
  done
  # transformers no longer reads the first name; the layout below it is the hub's
  [[ -z ${TRANSFORMERS_CACHE:-} ]] || export HF_HUB_CACHE=${HF_HUB_CACHE:-$TRANSFORMERS_CACHE}
  [[ -z ${HF_HOME:-} ]] || export MODELSCOPE_CACHE=${MODELSCOPE_CACHE:-$HF_HOME/modelscope}
  unset PYTHONIOENCODING # it would beat the next line, and ASCII cannot say every path
  export PYTHONUTF8=1 PYTHONUNBUFFERED=1
  [[ -z ${log_started:-} ]] || printf '%s  %s\n' "$(date '+%F %T')" "$(quoted "$PYTHON_FOUND" "$@")"
  exec "$PYTHON_FOUND" "$@"
}
