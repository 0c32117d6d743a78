#!/usr/bin/env bash
# Make multimodal/venv with everything that this recipe needs, or bring it up to date.
#   bash setup_environment.sh                             then: source venv/bin/activate
#   PYTHON=/path/to/python3.12 bash setup_environment.sh  with an interpreter of your choice
# Packages come from where your pip takes them. torchaudio is not among them: its last versions do not go with torch.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"
recipe=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd -P) || exit 1
root=${recipe%/*} venv=$recipe/venv

SETUP_VENV=$venv SETUP_REQUIREMENTS=$root/requirements/multimodal.txt SETUP_WHAT='torch, open_clip, soundfile and other' \
  SETUP_COMMAND='multimodal/setup_environment.sh' bash "$root/setup.sh" || exit
if "$venv/bin/python" -P -c 'import importlib.util, sys
sys.exit(importlib.util.find_spec("torchaudio") is None)' && ! "$venv/bin/python" -P -c 'import torchaudio' 2>/dev/null; then
  printf '%s\n' "$venv holds a torchaudio that does not import, and transformers would fail because of it:" \
    "$venv/bin/pip uninstall torchaudio" >&2
  exit 3
fi
printf '%s\n' "ready: source ${venv#"$PWD"/}/bin/activate"
