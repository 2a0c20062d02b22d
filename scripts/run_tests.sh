#!/usr/bin/env bash
# run_tests.sh VENV [pytest argument...]: GoogleTest and pytest; ends in their summary lines.
set -uo pipefail
venv=$1
shift
mkdir -p build

# First, because a machine that cannot build the C++ tests should say so at once.
scripts/build_cpp_tests.sh "$venv" build/cpp-tests || exit 1
build/cpp-tests/tests/cpp/fusedpo_test --gtest_brief=1 2>&1 | tee build/gtest.log
cpp=$?
scripts/pytest.sh "$venv/bin/python" "$@" 2>&1 | tee build/pytest.log
python=$?

echo
echo "GoogleTest: $(grep -E '^\[==========\]' build/gtest.log | tail -n 1)"
grep -E '^\[  (PASSED|SKIPPED|FAILED) +\]|FAILED TEST' build/gtest.log | sed 's/^/GoogleTest: /'
echo "pytest:     $(tail -n 1 build/pytest.log)"
[ "$cpp" = 0 ] && [ "$python" = 0 ]
