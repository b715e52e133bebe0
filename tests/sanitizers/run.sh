#!/usr/bin/env bash
# Builds the CPU kernels without torch under AddressSanitizer and UndefinedBehaviorSanitizer and runs rows_test.cpp for every
# instruction set of this processor: `make asan`. Nothing is read or written out of bounds, whatever the values.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
compiler=${CXX:-c++}
flags=(-std=c++17 -O1 -g -ffp-contract=off -Wno-uninitialized -Wno-maybe-uninitialized -fno-omit-frame-pointer
       -fsanitize=address,undefined -fno-sanitize-recover=all)
# What lies past the end of a vector is out of bounds, too, though a longer row has used it before.
flags+=(-D_GLIBCXX_SANITIZE_VECTOR -D_GLIBCXX_ASSERTIONS)
# Infinite scores and quotients are part of the contract, and float to float conversions saturate to infinity by IEEE 754.
flags+=(-fno-sanitize=float-divide-by-zero,float-cast-overflow)

build() { "$compiler" "${flags[@]}" -c "$1" -o "$out/$(basename "$1" .cpp).o"; }
pids=()
for source in "$here"/../../csrc/cpu/{,simd/}*.cpp "$here/rows_test.cpp"; do
  build "$source" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid"; done
"$compiler" "${flags[@]}" "$out"/*.o -lpthread -o "$out/rows_test"

# Side by side: each takes a minute or two.
names=(avx512 avx2 baseline)
pids=()
for name in "${names[@]}"; do
  ROADMAP_EXT_CPU=$name "$out/rows_test" 2> "$out/errors-$name" & pids+=($!)
done
ran=0 failed=0
for place in "${!names[@]}"; do
  name=${names[place]}
  if wait "${pids[place]}"; then
    ran=$((ran + 1))
  elif grep -q "cannot be used" "$out/errors-$name"; then
    echo "$name: not on this processor"
  else
    cat "$out/errors-$name" >&2
    failed=1
  fi
done
[ "$failed" = 0 ] && [ "$ran" -gt 0 ]
