#!/usr/bin/env bash
# Builds the documentation as a book into target/book, where a warning is an error, and checks what it names.
#   ./scripts/check_docs.sh
# Takes the mdBook of this version that is there, or installs it into target/tools (some minutes, once, and crates.io).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=0.5.4
mdbook=$(command -v mdbook || true)
if [ -z "$mdbook" ] || [ "$("$mdbook" --version)" != "mdbook v$version" ]; then
  # Without its server; a second call finds that it is installed.
  cargo install mdbook --version "$version" --locked --no-default-features --features search \
    --root target/tools --target-dir target/tools/build --quiet
  mdbook=target/tools/bin/mdbook
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
rm -rf target/book
status=0
"$mdbook" build >"$log" 2>&1 || status=$?
cat "$log" >&2
if [ "$status" != 0 ] || grep -qE '(WARN|ERROR)' "$log"; then
  printf 'error: the book cannot be built without a warning\n\nhint: see above; docs/SUMMARY.md lists its pages\n' >&2
  exit 1
fi
python3 scripts/check_docs.py --book target/book
cargo build --release --bin sail-train --bin sail-data
python3 scripts/check_docs.py
echo "the book is in target/book"
