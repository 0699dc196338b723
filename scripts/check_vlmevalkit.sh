#!/usr/bin/env bash
# Trains the tiny model, has VLMEvalKit measure its export, and asks the export the same without VLMEvalKit.
#   ./scripts/check_vlmevalkit.sh             needs no network once everything is installed
#   ./scripts/check_vlmevalkit.sh --install   only makes target/vlmevalkit, which has VLMEvalKit and borrows the packages of .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in
  ""|--install) ;;
  *) sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

place=target/vlmevalkit
requirements=scripts/vlmevalkit/requirements.txt
# One that was made by other requirements, or in another place, is made anew.
if ! cmp -s "$requirements" "$place/installed" || ! "$place/bin/python" -c 'import torch' 2>/dev/null; then
  rm -rf "$place"
  .venv/bin/python -m venv --without-pip "$place"
  .venv/bin/python -m pip --python "$place/bin/python" install --quiet --disable-pip-version-check --no-deps -r "$requirements"
  site=$("$place/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/borrowed.pth"
  cp "$requirements" "$place/installed"
fi
[ "${1:-}" != --install ] || exit 0
cargo build --release --bin sail-train
# Without network wherever that can be had.
without_network=()
if unshare -n true 2>/dev/null; then without_network=(unshare -n); fi
"${without_network[@]}" "$place/bin/python" tests/reference/check_vlmevalkit.py target/release/sail-train
