#!/usr/bin/env bash
# Prepares this checkout for `cargo build`: checks the tools, makes `.venv` with libtorch, links it.
#   ./scripts/setup.sh               what building and training needs
#   ./scripts/setup.sh --reference   also the Python packages that convert demo weights and check results
# Safe to run again; a second run takes a moment. A LIBTORCH in the environment is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

reference=no
for arg in "$@"; do
  case "$arg" in
    --reference) reference=yes ;;
    -h|--help) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument \`$arg\`; see $0 --help" >&2; exit 2 ;;
  esac
done

missing=0
need() { # need WHAT HOW-TO-GET-IT COMMAND...: COMMAND must succeed
  local what=$1 how=$2
  shift 2
  if ! "$@" >/dev/null 2>&1; then
    echo "error: $what is missing; install it with: $how" >&2
    missing=1
  fi
}
# The compiler that the `cc` crate will take.
cxx=${CXX:-c++}
compiles_cxx17() { # the standard library must be there too, so a header is included
  local out status=0
  out=$(mktemp)
  echo '#include <optional>
int main() { return std::optional<int>(0).value(); }' | "$cxx" -std=c++17 -x c++ -o "$out" - || status=1
  rm -f "$out"
  return "$status"
}
has_venv() { # ensurepip is what Debian splits off into python3-venv
  python3 -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))'
}
need git "apt-get install git" git --version
need cargo "curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh" cargo --version
need "a C++17 compiler (\`$cxx\`)" "apt-get install g++" compiles_cxx17
need "python3 (3.10 or newer) with venv" "apt-get install python3 python3-venv" has_venv
[ "$missing" = 0 ] || exit 2

# An interrupted or moved environment is made anew; a whole one answers at once.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  rm -rf .venv
  python3 -m venv .venv
fi

install() { # install FILE unless exactly this FILE was installed before
  local file=$1 stamp=".venv/.installed-$1"
  if cmp -s "$file" "$stamp"; then return; fi
  echo "installing $file into .venv (some minutes on a first run)"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r "$file"
  cp "$file" "$stamp"
}

if [ -n "${LIBTORCH:-}" ]; then
  if [ ! -e "$LIBTORCH/lib/libtorch_cpu.so" ]; then
    echo "error: LIBTORCH is \`$LIBTORCH\`, but $LIBTORCH/lib/libtorch_cpu.so does not exist; unset it or set it to a libtorch 2.11.0" >&2
    exit 2
  fi
  echo "using libtorch at LIBTORCH=$LIBTORCH"
else
  install requirements.txt
  # The fixed place that `.cargo/config.toml` names, whatever the version of Python is.
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  ln -sfn "${site#"$PWD/.venv/"}/torch" .venv/libtorch
fi
if [ "$reference" = yes ]; then
  install requirements.txt # transformers computes with this torch even when the build uses another libtorch
  install requirements-reference.txt
fi
echo "set-up complete"
