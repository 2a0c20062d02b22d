#!/usr/bin/env bash
# check_baseline.sh VENV FOLDER: runs the kernels' and the losses' tests on the oldest x86 processor
# that wheels are for (x86-64-v2, as Nehalem), which QEMU plays. FOLDER has build_cpp_tests.sh's
# build, which is made if need be. Needs qemu-user, which it installs where it may.
set -euo pipefail
venv=$1 folder=$2
fail() { echo "check_baseline: $*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

command -v qemu-x86_64 > /dev/null ||
  { as_root apt-get install -y -qq qemu-user || { as_root apt-get update -qq && as_root apt-get install -y -qq qemu-user; }; } \
    > /dev/null 2>&1 || fail "qemu-x86_64 is missing and could not be installed (Debian, Ubuntu: apt install qemu-user)"

scripts/build_cpp_tests.sh "$venv" "$folder" > /dev/null
# What is not compiled for a newer instruction set on purpose must not use one: no 256-bit register.
wide=$(find "$folder/CMakeFiles" -name '*.o' ! -path '*isa_avx*' -exec objdump -d {} + | grep -cE '%[yz]mm' || true)
[ "$wide" = 0 ] || fail "$wide instructions outside of the AVX kernels use registers of AVX"
qemu-x86_64 -cpu Nehalem "$folder/tests/cpp/fusedpo_test" --gtest_brief=1 --gtest_filter='*RowKernels*:*Loss*'
