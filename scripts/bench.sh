#!/usr/bin/env bash
# Builds, and compares training with a plain PyTorch trainer on the same work, and measures what is around the steps; a
# table of figures.
#   ./scripts/bench.sh                        everything: hours on two cores
#   ./scripts/bench.sh --only 'stage*' vit    some parts; --list names them
#   ./scripts/bench.sh --only leak linear     what is asked of one side; FAIL and exit code 1 where it is not kept
#   ./scripts/bench.sh --rounds 2 --steps 3   shorter
#   ./scripts/bench.sh --json FILE            also for machines; --help says the rest
# Needs `./scripts/setup.sh --reference` and the weights of scripts/fetch_demo_weights.py, and a machine that does
# nothing else. Exit codes: 0 the sides agree and limits are kept, 1 not so or one failed, 2 they could not be run.
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { # fail MESSAGE HINT
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

case " $* " in
  *" --list "* | *" --help "* | *" -h "*) exec python3 scripts/bench.py "$@" ;;
esac
.venv/bin/python -c 'import torch, transformers' 2>/dev/null ||
  fail "\`.venv\` has no torch and transformers" "run ./scripts/setup.sh --reference"
for folder in weights/dinov2-small weights/smollm2-135m-instruct; do
  [ -e "$folder/model.safetensors" ] || fail "no weights in \`$folder\`" "run .venv/bin/python scripts/fetch_demo_weights.py"
done
cargo build --release --workspace --bins --examples
script=$PWD/scripts/bench.py python=$PWD/.venv/bin/python
cd "$from"
exec "$python" "$script" "$@"
