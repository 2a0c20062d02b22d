#!/usr/bin/env bash
# test_cuda_host.sh VENV: runs the CUDA kernels on the CPU, under the sanitizers and with every
# access to memory checked; then plants every FUSEDPO_FAULTS_EVERY-th fault (10 if unset, 1: all of
# them) and demands that a test fails. Needs no CUDA.
set -euo pipefail
venv=$1 folder=build/cuda-host
FUSEDPO_TARGETS="fusedpo_cuda_host_test fusedpo_cuda_check_test" \
  scripts/build_cpp_tests.sh "$venv" "$folder" -DFUSEDPO_BUILD_CUDA_HOST=ON
tests=$folder/tests/cpp/cuda
run_tests() { "$tests/$1" --gtest_brief=1; }
run_tests fusedpo_cuda_host_test &
sanitized=$!
run_tests fusedpo_cuda_check_test
wait "$sanitized"
"$venv/bin/python" scripts/plant_faults.py "$folder" --every "${FUSEDPO_FAULTS_EVERY:-10}" \
  --ninja "$venv/bin/ninja"
