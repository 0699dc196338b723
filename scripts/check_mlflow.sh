#!/usr/bin/env bash
# Trains, kills and resumes a run that MLflow's own server keeps, and asks its own client what it has.
#   ./scripts/check_mlflow.sh
# Installs MLflow into target/mlflow (some minutes on a first run).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# The version whose limits crates/sail-train/src/events/mlflow follows.
version=3.17.2
place=target/mlflow
if ! "$place/bin/python" -c "import mlflow; assert mlflow.__version__ == '$version'" 2>/dev/null; then
  rm -rf "$place"
  python3 -m venv "$place"
  "$place/bin/python" -m pip install --quiet --disable-pip-version-check "mlflow==$version"
fi
cargo build --release --bin sail-train
"$place/bin/python" tests/reference/check_mlflow.py target/release/sail-train
