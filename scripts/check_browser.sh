#!/usr/bin/env bash
# Trains the tiny curriculum, writes its page, and reads it in headless Chromium as a person does, also with many long runs
# on it; serves one, and lets its run go on.
#   ./scripts/check_browser.sh [SCREENSHOT.png]
# Needs node and npm from 20 on, and Chromium: `chromium`, or what CHROMIUM names.
set -euo pipefail
screenshot=${1:+$(realpath "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CHROMIUM="${CHROMIUM:-$(command -v chromium || true)}"
for program in node npm "${CHROMIUM:-chromium}"; do
  command -v "$program" >/dev/null || {
    printf 'error: there is no `%s`\n\nhint: install it (Debian: apt-get install nodejs npm chromium), or set CHROMIUM\n' "$program" >&2
    exit 2
  }
done
cargo build --release --bin sail-train
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
target/release/sail-train --config configs/tiny/curriculum.yaml --set "run.root=$work" >/dev/null
target/release/sail-train report "$work/runs/tiny" --out "$work/report.html"
# There is no lock file, since the versions in package.json are exact.
npm install --prefix tests/browser --no-package-lock --no-audit --no-fund --silent
node tests/browser/report.mjs "$work/report.html" ${screenshot:+"$screenshot"}
node tests/browser/many.mjs "$work/report.html"
node tests/browser/live.mjs target/release/sail-train "$work/runs/tiny/stage3"
