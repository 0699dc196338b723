#!/usr/bin/env bash
# Shows that all that needs a machine's GPUs works there: a table of checks with their figures.
#   ./scripts/gpu_check.sh              checks what is built here
#   ./scripts/gpu_check.sh --pack DIR   builds, and puts into DIR what a machine needs that has GPUs and torch 2.11 but
#                                       neither Rust nor a network; there the one command is DIR/gpu_check.sh
#   ... --cpu                           checks what the CPU and Gloo can do, to try the checks themselves
#   ... --short                         leaves out what takes long
#   ... --bench                         instead of the checks, speed beside PyTorch at the sizes of SAILViT-L, ViT-H and
#                                       Qwen2.5-1.5B (bench.py --device cuda); PyTorch's side needs transformers
#   ... --bench --alone                 the same without PyTorch's side
# A packed check takes libtorch from the torch of `python3`, or of the Python that PYTHON names.
# Exit codes: 0 all checks passed, 1 one failed, 2 they could not be made.
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() { # fail MESSAGE HINT
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

pack= cpu=no bench=no alone=no options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --pack)
      [ $# -gt 1 ] || fail "\`--pack\` needs a folder" "name one that is made or filled anew"
      pack=$(cd "$from" && realpath -m -- "$2")
      shift
      ;;
    --cpu) cpu=yes options+=("$1") ;;
    --short) options+=("$1") ;;
    --bench) bench=yes ;;
    --alone) alone=yes ;;
    -h|--help) sed -n '2,12s/^# \{0,1\}//p' gpu_check.sh; exit 0 ;;
    *) echo "error: unknown argument \`$1\`; see $0 --help" >&2; exit 2 ;;
  esac
  shift
done
if [ "$bench" = yes ]; then
  [ -z "$pack" ] || fail "\`--bench\` measures, \`--pack\` packs" "pack first, then run the pack with \`--bench\`"
  [[ " ${options[*]} " != *" --short "* ]] || fail "\`--short\` is for checks, \`--bench\` makes none" "give one of them"
elif [ "$alone" = yes ]; then
  fail "\`--alone\` is for \`--bench\`" "give both"
fi

build() { # in the repository: the programs, with the build that everything else uses
  cd ..
  cargo build --release --workspace --bins --examples
  programs=target/release
}

make_pack() {
  local rpath size to
  mkdir -p "$1/configs" "$1/data" "$1/scripts" "$1/tests" "$1/target/release/examples"
  for program in sail-train sail-gpu-check examples/bench_train examples/bench_forward; do
    # Benches stay where scripts/bench.py looks for them.
    to=$1/$program
    [ "${program#examples/}" = "$program" ] || to=$1/target/release/$program
    strip -o "$to" "$programs/$program"
    # Where libtorch is on this machine is looked at before LD_LIBRARY_PATH: it becomes a path of nothing but
    # slashes, of the same length.
    rpath=$(readelf -d "$to" | sed -n 's/.*rpath: \[\(.*\)\]/\1/p')
    LC_ALL=C sed -i "s|$rpath|${rpath//?//}|" "$to"
  done
  # Two of them have libtorch's bindings and all of sail-train in them: a third of the size when compressed.
  tar -C "$1" --remove-files -czf "$1/programs.tar.gz" sail-train sail-gpu-check target
  cp -r configs/tiny configs/gpu-check "$1/configs"
  cp -r data/demo "$1/data"
  cp scripts/gpu_check.sh "$1"
  cp scripts/bench.py scripts/bench_common.py scripts/bench_limits.py "$1/scripts"
  cp -r tests/reference "$1/tests"
  mkdir -p "$1/tests/goldens"
  cp tests/goldens/smollm2_greedy.json "$1/tests/goldens"
  size=$(du -sm "$1" | cut -f1)
  echo "packed $size MB into $1; carry it to the machine and run $1/gpu_check.sh"
  [ "$size" -le 60 ] || fail "$1 has $size MB, more than the 60 that are easy to carry" "look what has grown"
}

find_torch() { # sets LD_LIBRARY_PATH to the libraries of Python's torch
  local python=${PYTHON:-python3} found version libraries
  found=$(cd "$from" && "$python" - <<'PY'
import importlib.util, pathlib, runpy
spec = importlib.util.find_spec("torch")
if spec is not None:
    torch = pathlib.Path(spec.submodule_search_locations[0]).resolve()
    print(runpy.run_path(str(torch / "version.py"))["__version__"])
    print(*[torch / "lib", *sorted(torch.parent.glob("nvidia/*/lib"))], sep=":")
PY
) || fail "\`$python\` does not run" "put a Python with torch 2.11 first in PATH, or set PYTHON to it"
  [ -n "$found" ] || fail "\`$python\` has no torch" "put a Python with torch 2.11 first in PATH, or set PYTHON to it"
  version=${found%%$'\n'*} libraries=${found#*$'\n'}
  [[ $version == 2.11.* ]] || fail "the torch of \`$python\` is $version" "these programs are built for torch 2.11"
  export LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
  echo "torch $version of \`$python\`, libraries in ${libraries%%:*}"
}

packed=no
[ ! -f programs.tar.gz ] || packed=yes
if [ "$packed" = yes ]; then
  [ -z "$pack" ] || fail "this is a pack already" "run --pack where the programs are built"
  tar -xzf programs.tar.gz || fail "\`$PWD/programs.tar.gz\` does not unpack" "carry the whole pack over again"
  programs=.
  find_torch
else
  build
fi
if [ -n "$pack" ]; then
  make_pack "$pack"
  exit
fi

"$programs/sail-train" --version && "$programs/sail-gpu-check" --help >/dev/null ||
  fail "the programs do not start" "the line above says what they miss"
if [ "$cpu" = yes ]; then
  # Ranks share the cores, and a sum has one order.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
elif command -v nvidia-smi >/dev/null; then
  nvidia-smi --query-gpu=index,name,memory.total,driver_version --format=csv,noheader || true
fi
if [ "$bench" = yes ]; then
  if [ "$packed" = yes ]; then python=${PYTHON:-python3}; else python=${PYTHON:-$PWD/.venv/bin/python}; fi
  case "$python" in
    /*) ;;
    */*) python=$from/$python ;;
  esac
  command -v "$python" >/dev/null || fail "no \`$python\`" "set PYTHON to a Python with torch 2.11, or run ./scripts/setup.sh --reference"
  # On the CPU: that both sides work and agree. Their speed on a few tokens says nothing.
  parts=(--device cuda)
  [ "$cpu" = no ] || parts=(--only agreement-tiny --agreement-steps 5)
  [ "$alone" = no ] || parts+=(--alone)
  PYTHON=$python exec "$python" scripts/bench.py "${parts[@]}"
fi
work=$(mktemp -d "${TMPDIR:-/tmp}/sail-gpu-check.XXXXXX")
status=0
"$programs/sail-gpu-check" --train "$programs/sail-train" --work "$work" "${options[@]}" || status=$?
if [ "$status" = 0 ]; then
  rm -rf "$work"
else
  echo "logs and what the runs wrote: $work"
fi
exit "$status"
