#!/usr/bin/env bash
# From a bare machine to a refined vision encoder: sets up, builds, trains three stages on real
# image-text pairs, exports the encoder and has transformers load it.
#   ./scripts/quickstart.sh          DINOv2 ViT-S/14 + SmolLM2-135M (downloads their weights)
#   ./scripts/quickstart.sh --tiny   small random models: no weights, two minutes after the build
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

size=demo
for arg in "$@"; do
  case "$arg" in
    --tiny) size=tiny ;;
    -h|--help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument \`$arg\`; see $0 --help" >&2; exit 2 ;;
  esac
done

step() { printf '\n== %s\n' "$*"; "$@"; }

step ./scripts/setup.sh --reference
step cargo build --release --bin sail-train --bin sail-data
[ "$size" = tiny ] || step .venv/bin/python scripts/fetch_demo_weights.py

train=target/release/sail-train
runs="runs/$size"
mkdir -p "$runs"
# A finished stage is skipped and an interrupted one resumes, so running this again is safe.
printf '\n== %s --config configs/%s/curriculum.yaml\n' "$train" "$size"
"$train" --config "configs/$size/curriculum.yaml" >"$runs/summary.txt"

vit="$runs/stage3/export/vit"
step "$train" embed --vit "$vit" --image docs/images/sample.png --out "$runs/features.safetensors"
step .venv/bin/python scripts/check_export.py "$vit" --image docs/images/sample.png \
  --embedding "$runs/features.safetensors"

images=--images
[ "$size" = demo ] || images= # a minute of random models shows that everything runs, not that it sees
step python3 scripts/check_learning.py "$runs/stage3" --first "$runs/stage1" $images

step "$train" report "$runs"

printf '\n== summary (also in %s/summary.txt)\n' "$runs"
cat "$runs/summary.txt"
printf '\nOpen %s/report.html in a browser; docs/tutorial.md goes on with images of your own.\n' "$runs"
