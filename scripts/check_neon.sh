#!/usr/bin/env bash
# check_neon.sh VENV FOLDER: compiles the torch-free core for 64-bit ARM, sees that the row kernels
# are made of NEON vectors and fused multiply-adds, and runs the kernels' and the losses' tests
# under QEMU. On x86; needs g++-aarch64-linux-gnu and, to run them, qemu-user, which it installs
# where it may.
set -euo pipefail
venv=$(cd "$1" && pwd) folder=$2 target=aarch64-linux-gnu
fail() { echo "check_neon: $*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

# has PROGRAM PACKAGE
has() {
  command -v "$1" > /dev/null ||
    as_root apt-get install -y -qq "$2" > /dev/null 2>&1 ||
    { as_root apt-get update -qq && as_root apt-get install -y -qq "$2"; } > /dev/null 2>&1
}
has $target-g++ g++-$target ||
  fail "$target-g++ is missing and could not be installed (Debian, Ubuntu: apt install g++-$target)"
runs=yes
has qemu-aarch64 qemu-user || runs=no

# GoogleTest is built for ARM, too: from the system's sources if they are there, else downloaded.
sources=()
[ -d /usr/src/googletest ] && sources=(-DFETCHCONTENT_SOURCE_DIR_GOOGLETEST=/usr/src/googletest)
mkdir -p "$folder"
"$venv/bin/cmake" -S . -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$venv/bin/ninja" \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$target-g++ \
  -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_DISABLE_FIND_PACKAGE_GTest=ON "${sources[@]}" \
  -DFUSEDPO_BUILD_TESTS=ON -DFUSEDPO_BUILD_PYTHON=OFF -DFUSEDPO_CUDA=OFF -DFUSEDPO_WERROR=ON \
  > "$folder.log" 2>&1 || { tail -n 20 "$folder.log" >&2; fail "CMake failed"; }
"$venv/bin/cmake" --build "$folder" --target fusedpo_test >> "$folder.log" 2>&1 ||
  { tail -n 40 "$folder.log" >&2; fail "the build failed"; }

object=$(find "$folder" -name 'row_kernels_isa.cpp.o')
vectors=$($target-objdump -d "$object" | grep -cE 'fmla\s+v[0-9]+\.4s' || true)
[ "$vectors" -gt 0 ] || fail "the row kernels have no fmla on four floats: they were not vectorised"
echo "row kernels: $vectors fused multiply-adds of four floats"

if [ $runs = no ]; then
  echo "NOT CHECKED: QEMU could not be installed, so what was compiled for 64-bit ARM did not run" |
    tee -a "${FUSEDPO_NOT_RUN:-/dev/null}"
  exit
fi
qemu-aarch64 "$folder/tests/cpp/fusedpo_test" --gtest_brief=1 --gtest_filter='*RowKernels*:*Loss*'
