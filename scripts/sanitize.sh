#!/usr/bin/env bash
# Runs sail-torch's unit tests with its C++ code compiled for AddressSanitizer: a wrong access to memory and a leak
# end them with an error. Memory that libtorch and Rust allocate is watched as well where the C++ code touches it.
# Nothing is suppressed: neither libtorch nor glibc leaks in these tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Before everything else in the process, whose main program is not linked for it.
library=$("${CXX:-c++}" -print-file-name=libasan.so)
if [ ! -e "$library" ]; then
  echo "error: \`${CXX:-c++}\` has no libasan.so; install that of gcc (on Debian it comes with g++)" >&2
  exit 2
fi
options=detect_leaks=1:detect_stack_use_after_return=1:strict_string_checks=1
# The feature's build lies beside the usual one, and both share libtorch's bindings.
cargo test --release -p sail-torch --lib --features address-sanitizer \
  --config "target.'cfg(all())'.runner = ['env', 'LD_PRELOAD=$library', 'ASAN_OPTIONS=$options']"
