#!/usr/bin/env bash
# Both README commands as a stranger meets them: a clone of HEAD at a path with a space and Chinese characters,
# an empty HOME, no variable but PATH, an ASCII locale, no .venv. CUDA_VISIBLE_DEVICES is unset: GPUs are used.
#   tests/full/rehearsal.sh            prints the minutes of each; exit 0: both ended well, 1: one did not
#   tests/full/rehearsal.sh --keep     leaves the clone with its .venv; without, it is removed when all went well
#   tests/full/rehearsal.sh --dry-run  clones, and prints what would be typed
#   TMPDIR=/roomy tests/full/rehearsal.sh    somewhere with 9 GB free; the logs stay there
# What pip needs in the environment (an index, a proxy) goes by name: PASS_ON="PIP_INDEX_URL https_proxy" …
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
set -u
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P) || exit 1

keep='' dry=''
for word in "$@"; do
  case $word in
    --keep) keep=yes ;;
    --dry-run) dry=yes ;;
    -h | --help) sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" && exit ;;
    *) printf 'rehearsal: unknown argument %s; allowed: --keep, --dry-run\n' "$word" >&2 && exit 2 ;;
  esac
done

say() { printf 'rehearsal: %s\n' "$*"; }
refuse() {
  printf 'rehearsal: %s\n' "$*" >&2
  exit 3
}
# PATH without this repository's own environment, which a fresh machine does not have.
outer_path() {
  local entry kept=()
  IFS=: read -ra entries <<<"$PATH"
  for entry in "${entries[@]}"; do
    [[ $entry == "$root"/* ]] || kept+=("$entry")
  done
  (IFS=: && printf '%s' "${kept[*]}")
}
# One command in the clone, from an empty environment: its exit code and minutes, its output in a log.
rehearse() {
  local name=$1 began=$SECONDS code=0 tenths
  if [[ -n $dry ]]; then
    say "would run, in $clone: env -i ${settings[*]} ./$name.sh"
    return
  fi
  say "$name.sh; tail -f '$logs/$name.log' follows it"
  (cd -- "$clone" && exec env -i "${settings[@]}" "./$name.sh") >"$logs/$name.log" 2>&1 </dev/null || code=$?
  tenths=$(((SECONDS - began) / 6))
  say "$name.sh: exit $code after $((tenths / 10)).$((tenths % 10)) minutes"
  tail -n 15 -- "$logs/$name.log" | sed 's/^/  | /'
  ((code == 0)) || failed+=("$name.sh")
}
# What the commands left where they should not, and what they put into HOME.
look_around() {
  local left
  left=$(git -C "$clone" status --porcelain) || left='git status failed'
  [[ -z $left ]] || { say "left in the tree:" && printf '%s\n' "$left" && failed+=("the tree"); }
  left=$(cd -- "$home" && find . -mindepth 1 -maxdepth 2 -print)
  say "in HOME now: ${left:-nothing}"
}

command -v git >/dev/null || refuse "git is missing: install it"
base=$(mktemp -d "${TMPDIR:-/tmp}/rehearsal.XXXXXX") || refuse "no directory can be made in ${TMPDIR:-/tmp}"
clone="$base/训练 场" home="$base/home" logs="$base/logs"
mkdir -- "$home" "$logs"
trap 'say "stopped; everything is in $base"; exit 130' INT TERM
git clone --quiet -- "$root" "$clone" || refuse "$root cannot be cloned into $base"
[[ -z $(git -C "$root" status --porcelain --untracked-files=no) ]] || say "uncommitted changes take no part"
say "$(git -C "$clone" log -1 --format='%h %s') in $clone"

settings=("PATH=$(outer_path)" "HOME=$home" LC_ALL=C)
for name in ${PASS_ON:-}; do
  [[ -z ${!name:-} ]] || settings+=("$name=${!name}")
done
failed=()
rehearse demo
rehearse run_tests
[[ -n $dry ]] || look_around
if [[ -n $keep || ${#failed[@]} != 0 ]]; then
  say "the clone stays: $clone"
else
  rm -rf -- "$clone" "$home"
fi
[[ -n $dry ]] || say "logs: $logs"
((${#failed[@]} == 0)) || { say "failed: ${failed[*]}" && exit 1; }
