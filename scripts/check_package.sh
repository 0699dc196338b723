#!/usr/bin/env bash
# Builds the archive of scripts/package.sh, unpacks it elsewhere, and trains the tiny curriculum from there with the torch of
# another virtual environment, in one process and in two; then has it say what is wrong where something is missing.
# Also reads the Dockerfile with hadolint.
#   ./scripts/check_package.sh [ARCHIVE]   with ARCHIVE, that one is checked instead of a new one
# The other environment borrows the packages of .venv; LIBTORCH counts during the build alone.
set -euo pipefail
archive=${1:+$(realpath "$1")}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { # fail WHAT [FILE]: with what FILE says
  printf 'error: %s\n' "$1" >&2
  [ $# -lt 2 ] || cat "$2" >&2
  exit 1
}

./scripts/package/tools.sh target/package-tools
target/package-tools/venv/bin/hadolint Dockerfile
echo "ok: hadolint finds nothing in the Dockerfile"

if [ -z "$archive" ]; then
  ./scripts/package.sh --out "$work/out"
  archive=$(echo "$work"/out/*.tar.gz)
fi
(cd "${archive%/*}" && sha256sum --quiet -c "${archive##*/}.sha256")
mkdir "$work/another place" "$work/an empty folder"
tar -C "$work/another place" -xzf "$archive"
sail=$(echo "$work/another place"/sail-*)

# Nothing of this checkout and this shell.
unset LIBTORCH LD_LIBRARY_PATH PYTHONPATH PYTHON VIRTUAL_ENV CONDA_PREFIX
site=$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for venv in "with torch" "without torch"; do
  "$root/.venv/bin/python" -m venv --without-pip "$work/$venv"
done
its_site=$("$work/with torch/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$site" >"$its_site/borrowed.pth"
usual_path=$PATH
export PATH="$work/with torch/bin:$usual_path"

for program in libexec/sail-train bin/sail-data; do
  ! readelf -d "$sail/$program" | grep -E 'R(UN)?PATH' || fail "$program still has a path of this machine"
done
for file in LICENSE README.md docs/install.md share/man/man1/sail-train-launch.1 share/man/man1/sail-data.1 \
  share/zsh/site-functions/_sail-data share/fish/vendor_completions.d/sail-train.fish; do
  [ -s "$sail/$file" ] || fail "the archive has no $file"
done
# shellcheck disable=SC2016 # $1 is of the inner shell
bash -c 'source "$1"; complete -p sail-train' - "$sail/share/bash-completion/completions/sail-train" >/dev/null
for crate in safetensors zstd ring webpki-roots option-ext tch; do
  grep -q "^  $crate [0-9]" "$sail/THIRD-PARTY-LICENSES.txt" || fail "the licence of $crate is not in the archive"
done
echo "ok: the archive has what it should"

# Through links, from elsewhere, and through PATH.
ln -s "$sail/bin/sail-train" "$work/first link"
ln -s "first link" "$work/link"
version=$(cd / && "$work/link" --version)
# Whether `-dirty` follows was decided when the programs were linked.
commit=$(git describe --always --exclude='*' --abbrev=8 2>/dev/null || echo "built outside of git")
[[ $version == "sail-train "*" ($commit"*")"$'\n'"torch 2.11."* ]] || fail "\`--version\` of a build of $commit says: $version"
(cd "$work/an empty folder" && PATH="$sail/bin:$PATH" sail-train -V | grep -qF "($commit") || fail "-V has no commit"
"$sail/bin/sail-data" --version | grep -qF "($commit" || fail "sail-data --version has no commit"
# A program that prints a variable in the place of sail-train shows what the loader is given.
mkdir -p "$work/probe/bin" "$work/probe/libexec"
cp "$sail/bin/sail-train" "$work/probe/bin"
cp "$(command -v printenv)" "$work/probe/libexec/sail-train"
given=$(LD_LIBRARY_PATH="/usual folder:/another" "$work/probe/bin/sail-train" LD_LIBRARY_PATH)
[[ $given == */torch/lib:"/usual folder:/another" ]] || fail "LD_LIBRARY_PATH became $given"
echo "ok: it starts through links, from other folders and through PATH"

cd "$sail"
bin/sail-data check 'data/demo/*-train-*.tar' >/dev/null
train=(--config configs/tiny/curriculum.yaml)
bin/sail-train "${train[@]}" --set "run.root=$work/one run" >"$work/log" 2>&1 || fail "the curriculum failed" "$work/log"
bin/sail-train launch --nproc 2 -- "${train[@]}" --set "run.root=$work/two ranks" >"$work/log" 2>&1 ||
  fail "the curriculum failed with two ranks" "$work/log"
python - "$work/one run" "$work/two ranks" <<'PY'
import json, pathlib, sys

def losses(root):
    steps = [pathlib.Path(root, f"runs/tiny/stage{stage}/metrics.jsonl") for stage in (1, 2, 3)]
    lines = [json.loads(line) for path in steps for line in path.read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]

one, two = map(losses, sys.argv[1:])
assert len(one) == len(two) == 36, (len(one), len(two))
worst = max(abs(a - b) / a for a, b in zip(one, two))
assert worst < 1e-3, worst
print(f"ok: three stages of 12 steps in one process and in two, whose losses differ by {worst:.1e} at most")
PY
manifest=$(find "$work/one run/runs/tiny/stage3" -name manifest.json | tail -n 1)
grep -qF "($commit" "$manifest" || fail "the commit is not in" "$manifest"
grep -q '"torch_version": "2.11.' "$manifest" || fail "the version of torch is not in" "$manifest"
cd "$root"

says() { # says WHAT COMMAND...: COMMAND refuses with exit code 2, says WHAT, and ends with a hint
  local what=$1 code=0 said
  shift
  said=$(cd "$work/an empty folder" && "$@" 2>&1) || code=$?
  [ "$code" = 2 ] || fail "exit code $code instead of 2 from $*: $said"
  [[ $said == "error: "*"$what"*$'\n\nhint: '* ]] || fail "expected \"$what\" and a hint from $*: $said"
  printf 'ok: refused, %s\n' "$what"
}
start="$sail/bin/sail-train"
says "\`python3\` has no torch, and LIBTORCH is not set" env "PATH=$work/without torch/bin:$usual_path" "$start" --version
says "there is no \`no-such-python\`" env PYTHON=no-such-python "$start" --version
says "\`false\` does not run" env PYTHON=false "$start" --version
says "which has no folder \`lib\`" env "LIBTORCH=$work/nowhere" "$start" --version
# A torch of another version, which is found only where it is installed.
mkdir -p "$work/old/torch/lib"
echo "__version__ = '2.10.0+cu128'" >"$work/old/torch/version.py"
touch "$work/old/torch/__init__.py"
says "is 2.10.0+cu128, and sail-train is built for 2.11" env "PYTHONPATH=$work/old" "$start" --version
says "is 2.10.0+cu128, and sail-train is built for 2.11" env "LIBTORCH=$work/old/torch" "$start" --version
(cd "$work/old" && "$start" --version >/dev/null) || fail "a folder \`torch\` in the current one was taken for torch"
mkdir -p "$work/silent/lib"
says "does not say its version" env "LIBTORCH=$work/silent" "$start" --version
# A torch whose own dependencies are not beside it, then one without CUDA.
mkdir -p "$work/bare/lib"
echo 2.11.0+cpu >"$work/bare/build-version"
ln -s "$site"/torch/lib/*.so* "$work/bare/lib"
says "libcudnn.so.9" env "LIBTORCH=$work/bare" "$start" --version
rm "$work"/bare/lib/*cuda*
says "has no CUDA" env "LIBTORCH=$work/bare" "$start" --version
cp -r "$sail/bin" "$work/moved"
says "is not there" "$work/moved/sail-train" --version
echo "the package works"
