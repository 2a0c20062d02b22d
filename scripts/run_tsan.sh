#!/usr/bin/env bash
# run_tsan.sh VENV: readers, writers and merges of one store, and the pool of pages, under the thread
# sanitizer.
set -euo pipefail
venv=$1
# To stderr, and for the end of .ci/run.
not_run() { echo "fusedpo: $1" | tee -a "${FUSEDPO_NOT_RUN:-/dev/null}" >&2; }
FUSEDPO_TARGETS=threads_test scripts/build_cpp_tests.sh "$venv" build/tsan \
  -DFUSEDPO_SANITIZE_THREADS=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
test=(build/tsan/tests/cpp/threads_test --gtest_brief=1)
# Kernels that spread addresses wider than the sanitizer expects need fixed ones.
if "${test[@]}" --gtest_list_tests > /dev/null 2>&1; then
  "${test[@]}"
elif command -v setarch > /dev/null && setarch -R "${test[@]}" --gtest_list_tests > /dev/null 2>&1; then
  setarch -R "${test[@]}"
else
  not_run "the thread sanitizer did NOT run: it cannot start on this system"
fi
