#!/usr/bin/env bash
# Sets up and runs every check: formatting, lints, documentation, unit and end-to-end tests, parity
# with transformers.
#   ./scripts/test.sh              everything that is quick enough to run before each change
#   ./scripts/test.sh --extended   also the long fault-injection loops, the C++ code under AddressSanitizer, all of the
#                                  check of GPU machines, pages in headless Chromium, the archive of package.sh, the
#                                  documentation as a book, runs on an MLflow server, exports in VLMEvalKit, and the
#                                  larger corpus, for which 520 MB are downloaded once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extended=no
for arg in "$@"; do
  case "$arg" in
    --extended) extended=yes ;;
    -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument \`$arg\`; see $0 --help" >&2; exit 2 ;;
  esac
done

step() { printf '\n== %s\n' "$*"; "$@"; }

# Trainings of the tests write some GB of checkpoints; /tmp may be a small file system.
export TMPDIR="${TMPDIR:-$PWD/target/tmp}"
mkdir -p "$TMPDIR"
# What a failure may come of, if it comes of the machine.
trap 'df -h "$PWD" "$TMPDIR"; free -m' ERR

step ./scripts/setup.sh --reference
./scripts/quickstart.sh --help >/dev/null # the README's first command must start
step cargo fmt --all --check
step python3 scripts/build_configuration_docs.py --check
# One profile throughout, so that libtorch's bindings are compiled once.
step cargo build --release --workspace --bins
# Links, commands and configurations of the documentation.
step python3 scripts/check_docs.py
step python3 tests/reference/test_check_docs.py
step cargo clippy --release --workspace --all-targets -- -D warnings
RUSTDOCFLAGS="-D warnings" step cargo doc --release --workspace --no-deps --quiet
step .venv/bin/python scripts/fetch_demo_weights.py
step cargo test --release --workspace
# Each bench once, to see that it works.
step cargo test --release --workspace --benches
step .venv/bin/python tests/reference/test_remote_code.py
step .venv/bin/python tests/reference/check_webdataset.py
step .venv/bin/python tests/reference/test_corpus.py
step python3 tests/reference/test_gfr_page.py
gfr=$(mktemp -d)
step .venv/bin/python scripts/reproduce_gfr.py --scale smoke --seeds 1 --out "$gfr" >/dev/null
rm -r "$gfr"
# The check of GPU machines as it is carried to one, but on the CPU; libtorch is that of a Python there.
pack=$(mktemp -d)
trap 'rm -rf "$pack"' EXIT
step ./scripts/gpu_check.sh --pack "$pack"
gpu_check=("$pack/gpu_check.sh" --cpu)
[ "$extended" = yes ] || gpu_check+=(--short)
PYTHON=.venv/bin/python step "${gpu_check[@]}"
# Losses and gradient norms are those of a plain PyTorch trainer.
PYTHON=.venv/bin/python step "$pack/gpu_check.sh" --cpu --bench
if [ "$extended" = yes ]; then
  step ./scripts/sanitize.sh
  step ./scripts/check_browser.sh
  step ./scripts/check_package.sh
  step .venv/bin/python scripts/fetch_corpus.py --out target/corpus
  step .venv/bin/python scripts/fetch_corpus.py --check target/corpus
  step target/release/sail-data check 'target/corpus/*.tar' --tokenizer configs/tiny/tokenizer.json --max-tiles 1
  # The same inputs and seed give the same bytes.
  for out in once again; do step .venv/bin/python scripts/fetch_corpus.py --limit 100 --out "target/corpus-$out"; done
  step diff -r target/corpus-once target/corpus-again
  step ./scripts/check_docs.sh
  step ./scripts/check_mlflow.sh
  step ./scripts/check_vlmevalkit.sh
  step cargo test --release --workspace -- --ignored
fi
printf '\nall checks passed\n'
