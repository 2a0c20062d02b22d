#!/usr/bin/env bash
# test_cuda_host_ops.sh VENV: the operators' tests over emulated CUDA operators, then some of them
# once more as if every call were captured into a CUDA graph.
set -euo pipefail
venv=$1
FUSEDPO_TEST_CUDA_HOST=$(scripts/build_cuda_host_ops.sh "$venv" build/cuda-host-ops)
export FUSEDPO_TEST_CUDA_HOST

# Left out: what runs in processes of its own, which load no emulation, rows by the million, and
# peaks of memory, which an emulated product takes more of.
left_out="not process_to_process and not 2_to_the_31 and not peak_memory"
tests() { scripts/pytest.sh "$venv/bin/python" --durations=5 -k "$left_out" "${@/#/tests/python/}"; }

tests test_cuda_host.py test_token_logps.py test_linear_logps.py test_gradients.py test_contract.py \
  test_autocast.py test_extremes.py test_losses.py
# The GPU's own group, as far as it holds without one.
FUSEDPO_TEST_DEVICE=cpu tests test_cuda.py test_cuda_memory.py
FUSEDPO_TEST_CAPTURING=1 tests test_gradients.py test_autocast.py
