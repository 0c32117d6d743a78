# shellcheck shell=bash
# What every recipe's script needs; sourced, never run. A script's first line of code makes sure of bash:
#   [ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
# then:  find_python RECIPE PACKAGE…     sets PYTHON_FOUND, or ends with exit 3
#        start_log DIRECTORY NAME        sends all output to DIRECTORY/NAME_<time>.log as well
#        run_python SCRIPT [ARGUMENTS]   becomes the Python launcher: same process id, so signals reach it
# Nothing here changes the directory: a path that the user typed stays relative to where it was typed.

repository=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P) || exit 1

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

# Whether the arguments start a run; those that only answer leave no log behind.
starts_run() { [[ ! " $* " =~ " "(-h|--help|--(print.config|dry.run|estimate))" " ]]; }

start_log() {
  local directory=$1 name file number=1
  name=$2_$(date +%Y%m%d_%H%M%S)
  file=$name.log
  mkdir -p -- "$directory" 2>/dev/null
  # noclobber takes the name for this run alone: two runs may start in the same second
  until (set -C && : >"$directory/$file") 2>/dev/null; do
    if [[ ! -e $directory/$file ]]; then
      complain "no log file: $directory cannot be written"
      return
    fi
    file=$name.$((++number)).log
  done
  ln -sfn -- "$file" "$directory/latest.log" 2>/dev/null
  echo "$$" >"$directory/run.pid" # exec keeps it: the process to signal
  [[ $directory == /* ]] || directory=$PWD/$directory
  export TOOLKIT_LOG=$directory/$file # for status.json, and for whoever watches the run
  send_output_to "$directory/$file"
}

# Under nohup with > /dev/null, or with stdout closed, the file gets everything alone; else both do.
send_output_to() {
  if [[ /dev/fd/1 -ef /dev/null ]] || ! { : >&1; } 2>/dev/null; then
    exec >>"$1" 2>&1
  else
    # tee outlives every signal to the group, and a closed pipe: it ends when the last writer has ended.
    # HUP is ignored before it begins: a script that ends at once hangs its terminal up
    trap '' HUP
    exec > >(trap '' INT TERM PIPE && exec tee -a -- "$1" 2>/dev/null) 2>&1
    trap - HUP
  fi
  log_started=yes
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
