#!/usr/bin/env bash
# Does refining a vision encoder in three stages make a better one here? Trains it in five ways with equal budgets, measures
# what comes out, and writes tables, a plot and what held.
#   ./scripts/reproduce_gfr.sh --scale smoke   small random models, minutes: that everything runs, and nothing else
#   ./scripts/reproduce_gfr.sh --scale cpu     DINOv2 ViT-S/14 and SmolLM2-135M, hours on two cores; downloads weights and corpus
#   ./scripts/reproduce_gfr.sh --scale gpu     the same for longer, on one GPU
# Further options are those of scripts/reproduce_gfr.py. The same command goes on where a killed one was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for arg in "$@"; do
  case "$arg" in
    -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
  esac
done

step() { printf '\n== %s\n' "$*" >&2; "$@" >&2; }

step ./scripts/setup.sh --reference
step cargo build --release --bin sail-train
.venv/bin/python scripts/reproduce_gfr.py "$@"
