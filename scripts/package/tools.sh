#!/usr/bin/env bash
# Installs the Python packages that packaging needs into DIR/venv, once for each state of requirements.txt.
#   ./scripts/package/tools.sh DIR
set -euo pipefail
requirements=$(dirname "${BASH_SOURCE[0]}")/requirements.txt
venv=$1/venv
if ! cmp -s "$requirements" "$venv/.installed"; then
  python3 -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$requirements"
  cp "$requirements" "$venv/.installed"
fi
