#!/usr/bin/env bash
# run_fuzz.sh VENV SECONDS: libFuzzer, with the address and undefined-behaviour sanitizers, on what
# reads the files of a store. Says so when there is no Clang; a crash is a failure.
set -euo pipefail
venv=$1 seconds=$2
# To stderr, and for the end of .ci/run.
not_run() { echo "fusedpo: $1" | tee -a "${FUSEDPO_NOT_RUN:-/dev/null}" >&2; }

# One that has the runtimes: Debian packs them apart.
clang() {
  local name target='extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }'
  for name in clang++ clang++-{30..14}; do
    command -v "$name" > /dev/null && echo "$target" |
      "$name" -x c++ - -fsanitize=fuzzer,address -o /dev/null 2> /dev/null && echo "$name" && return
  done
  return 1
}
as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}
install_clang() {
  command -v apt-get > /dev/null && as_root true 2> /dev/null || return 1
  { as_root apt-get install -y -qq clang || { as_root apt-get update -qq && as_root apt-get install -y -qq clang; }; } \
    > /dev/null 2>&1 || return
  # Recommended by clang, hence there unless recommendations are off.
  as_root apt-get install -y -qq "libclang-rt-$(clang++ -dumpversion | cut -d. -f1)-dev" > /dev/null 2>&1 || true
}

compiler=$(clang) || { install_clang && compiler=$(clang); } || {
  not_run "fuzzing did NOT run: there is no clang++ with its sanitizers and it could not be installed (Debian, Ubuntu: apt install clang)"
  exit 0
}
"$venv/bin/cmake" -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM="$PWD/$venv/bin/ninja" \
  -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFUSEDPO_BUILD_PYTHON=OFF \
  -DFUSEDPO_CUDA=OFF -DFUSEDPO_SANITIZE=ON -DFUSEDPO_FUZZ=ON > build/fuzz.log 2>&1 || {
  tail -n 15 build/fuzz.log >&2
  not_run "fuzzing did NOT run: $compiler cannot build it (all of CMake's output: build/fuzz.log)"
  exit 0
}
"$venv/bin/cmake" --build build/fuzz --target store_fuzz
mkdir -p build/fuzz/corpus
build/fuzz/tests/fuzz/store_fuzz -max_total_time="$seconds" -max_len=1024 -print_final_stats=1 \
  -print_funcs=0 -artifact_prefix=build/fuzz/ build/fuzz/corpus > build/fuzz/store_fuzz.log 2>&1 || {
  tail -n 40 build/fuzz/store_fuzz.log >&2
  exit 1
}
grep '^stat::' build/fuzz/store_fuzz.log
