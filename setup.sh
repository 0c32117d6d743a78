#!/usr/bin/env bash
# Create .venv from requirements/lock.txt, or bring it up to date; says nothing when there is nothing to do.
#   ./setup.sh                              demo.sh and run_tests.sh call it on first use
#   PYTHON=/path/to/python3.12 ./setup.sh   with an interpreter of your choice
# pip's own configuration (index, proxy, cache) holds. Exit 3: a tool, a Python module or disk space is missing.
# SETUP_VENV, SETUP_REQUIREMENTS, SETUP_WHAT, SETUP_COMMAND: a recipe's own environment (multimodal/setup_environment.sh)
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -u
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P) || exit 1
lock=$root/requirements/lock.txt list=${SETUP_REQUIREMENTS:-$lock} self=${SETUP_COMMAND:-./setup.sh}
venv=${SETUP_VENV:-$root/.venv} log=$venv/setup.log stamp=$venv/setup.stamp space_kb=9000000 # 7 GB, and pip's unpacking

say() { printf 'setup: %s\n' "$*"; }
refuse() {
  printf 'setup: %s\n' "$*" >&2
  exit 3
}
# The lists' sha256 and the version of .venv's Python: what the stamp must hold. Fails when .venv cannot run.
wanted_stamp() {
  "$venv/bin/python" -X utf8 -I -S -c 'import hashlib, platform, sys
print(hashlib.sha256(b"".join(open(name, "rb").read() for name in dict.fromkeys(sys.argv[1:]))).hexdigest(),
    platform.python_version())' "$lock" "$list" 2>/dev/null
}
up_to_date() { [[ -f $stamp ]] && wanted=$(wanted_stamp) && [[ $wanted == "$(<"$stamp")" ]]; }
# Prints "VERSION yes|old|no-venv" for one interpreter; must run on any Python, 2.7 too.
probe() {
  "$1" -E -s -c 'import sys
verdict = "yes" if sys.version_info >= (3, 11) else "old"
try:
    import ensurepip, venv
except ImportError:
    verdict = "no-venv" if verdict == "yes" else "old"
sys.stdout.write("%d.%d.%d %s\n" % (tuple(sys.version_info[:3]) + (verdict,)))' 2>/dev/null
}
choose_python() {
  local names=(python3.13 python3.12 python3.11 python3) name found version verdict old='' bare=''
  [[ -z ${PYTHON:-} ]] || names=("$PYTHON")
  for name in "${names[@]}"; do
    found=$(probe "$name") || continue # not there, or a version manager's empty shim
    read -r version verdict <<<"$found"
    case $verdict in
      yes) python=$name python_version=$version && return ;;
      no-venv) bare=${bare:-$name is $version but lacks its venv module: apt install python3-venv} ;;
      old) old=${old:-$name is $version, and torch and numpy need Python 3.11 or newer: install one} ;;
    esac
  done
  refuse "${bare:-${old:-no Python found as ${names[*]}: install Python 3.11 or newer}}," \
    "or name another with PYTHON=/path/to/python $self"
}

check_space() {
  local free used
  [[ $(df -Pk -- "$root" | tail -n 1) =~ [[:space:]]([0-9]+)[[:space:]]+[0-9]+% ]] || return 0
  free=${BASH_REMATCH[1]} used=$(du -sk -- "$venv" | cut -f 1) # used: what an earlier start brought already
  ((free + used >= space_kb)) || refuse "$(gigabytes "$free") GB are free in $root," \
    "$(gigabytes $((space_kb - used))) GB are needed: free some space and run it again"
}
gigabytes() { printf '%d.%d' $(($1 / 1000000)) $(($1 / 100000 % 10)); }
# Runs a command with its output in the log; a line every 30 s shows that it lives.
quietly() {
  local tick=0
  "$@" >>"$log" 2>&1 </dev/null &
  job=$!
  while kill -0 "$job" 2>/dev/null && sleep 0.2; do
    ((++tick % 150)) || say "$SECONDS s, $(du -sh -- "$venv" | cut -f 1) so far"
  done
  wait "$job"
}
fail() {
  local advice='check the network and "pip config list"'
  grep -qi 'no space left' "$log" && advice='free some disk space, or name a roomier place: TMPDIR=/path '$self
  grep -v 'is ignored: it is' "$log" | tail -n 15 >&2
  printf 'setup: %s failed (whole log: %s). %s; run %s again to continue from here\n' "$1" "$log" "$advice" "$self" >&2
  exit 1
}

up_to_date && exit 0
[[ -r $lock ]] || refuse "$lock is missing: take the repository whole"
exec 9<"$lock"
! command -v flock >/dev/null || flock -n 9 || { say "another setup is at work here, waiting for it" && flock 9; }
up_to_date && exit 0
trap 'kill ${job:+"$job"} 2>/dev/null; wait; exit 130' INT
trap 'kill ${job:+"$job"} 2>/dev/null; wait; exit 143' TERM
SECONDS=0 pip=("$venv/bin/python" -X utf8 -I -m pip)
[[ $(probe "$venv/bin/python") != *old ]] || refuse "$venv is of a Python before 3.11: move it away, then run it again"
mkdir -p -- "$venv" && rm -f -- "$stamp" && check_space
if ! "${pip[@]}" --version >/dev/null 2>&1; then # new, or broken by an interruption
  choose_python
  say "creating ${venv#"$root"/} with $python ($python_version)"
  output=$("$python" -X utf8 -I -m venv --clear "$venv" 2>&1)
  { printf '%s\n' "$output" && "${pip[@]}" --version; } >"$log" 2>&1 || fail "creating ${venv#"$root"/} with $python"
fi
for package in "$venv"/lib/python3*/site-packages/*.dist-info; do
  # pip writes RECORD last: without it the package is half there, yet would count as installed
  [[ -e $package/RECORD ]] || rm -rf -- "$package"
done
say "installing ${SETUP_WHAT:-$(grep -c == "$list") packages} from ${list#"$root"/} (some 7 GB on disk); log: ${log#"$root"/}"
quietly "${pip[@]}" install --no-user --progress-bar off -r "$list" || fail "installing the packages"
{ wanted_stamp >"$stamp.new" && mv -f -- "$stamp.new" "$stamp"; } || fail "writing the stamp"
say "ready after $SECONDS s"
