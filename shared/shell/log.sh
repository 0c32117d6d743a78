# shellcheck shell=bash
# The log of a run: common.sh has it, and every script through common.sh. Sourced, never run.

# Whether the arguments start a run; those that only answer leave no log behind.
starts_run() { [[ ! " $* " =~ " "(-h|--help|--(print.config|dry.run|estimate))" " ]]; }

is_demo() {
  local word
  for word in "$@"; do
    [[ $word != --demo ]] || return 0
  done
  return 1
}

# Opens the log of a run, which starts with these arguments, of a script in PLACE; a demo's lies in the demo.
log_run() {
  local place=$1 name=$2 recipe
  shift 2
  starts_run "$@" || return 0
  recipe=${place#"$repository"/}
  ! is_demo "$@" || place=$repository/${recipe%%/*}/demo/runs
  start_log "$place/logs" "$name"
}

# Sends all output to DIRECTORY/NAME_<time>.log as well.
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
  # shellcheck disable=SC2034 # run_python asks for it
  log_started=yes
}
