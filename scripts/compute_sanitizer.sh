#!/usr/bin/env bash
# compute_sanitizer.sh [--python PYTHON] [--out FOLDER] [--seconds N] [TOOL...]
#
# Runs a small part of the GPU test group under NVIDIA's compute-sanitizer: memcheck, racecheck,
# initcheck, synccheck (or the tools named), each for at most N seconds (120). Logs go to FOLDER.
# Ends with 0 if every tool ran clean, 1 on any finding, failed test or time-out, 2 if a tool could
# not run at all (no compute-sanitizer, or a driver that does not let it in).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=.venv/bin/python out=build/sanitizer seconds=120 tools=()
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2 && shift 2 ;;
    --out) out=$2 && shift 2 ;;
    --seconds) seconds=$2 && shift 2 ;;
    memcheck | racecheck | initcheck | synccheck) tools+=("$1") && shift ;;
    *) echo "unknown argument: $1" >&2 && exit 2 ;;
  esac
done
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck initcheck synccheck)
mkdir -p "$out"

sanitizer=${COMPUTE_SANITIZER:-}
for candidate in "$(command -v compute-sanitizer)" /usr/local/cuda/bin/compute-sanitizer \
  /usr/local/cuda/compute-sanitizer/compute-sanitizer; do
  [ -n "$sanitizer" ] || { [ -x "$candidate" ] && sanitizer=$candidate; }
done
if [ -z "$sanitizer" ]; then
  echo "compute-sanitizer was not found: install the CUDA toolkit, or set COMPUTE_SANITIZER"
  exit 2
fi

# Every kernel with odd sizes, tails, strides, ignored rows, all dtypes; forward and backward.
tests=(
  tests/python/test_cuda_contract.py::test_contract_results_are_bit_equal_from_run_to_run
  tests/python/test_cuda_contract.py::test_contract_all_rows_ignored_gives_zeros_and_a_connected_graph
  tests/python/test_cuda_contract.py::test_contract_the_gradient_written_over_the_logits_has_the_bits_of_a_new_one
  tests/python/test_cuda_contract.py::test_extremes_no_vocabulary_size_needs_to_be_a_multiple_of_anything
  tests/python/test_cuda_contract.py::test_token_logps_non_contiguous_logits_give_the_bits_of_contiguous_ones
  tests/python/test_cuda_contract.py::test_linear_logps_the_budget_changes_no_result
  tests/python/test_cuda_contract.py::test_linear_logps_any_subset_of_the_inputs_may_want_a_gradient
  tests/python/test_cuda_contract.py::test_autocast_float32_inputs_under_autocast_give_the_bits_of_inputs_cast_beforehand
  tests/python/test_cuda.py::test_a_label_out_of_range_gives_nan_in_its_row_and_nowhere_else
  tests/python/test_cuda_losses.py::test_losses_one_pair_is_the_first_of_many
  tests/python/test_cuda_losses.py::test_losses_reductions
  tests/python/test_cuda_losses.py::test_losses_unpaired_batches_of_one_class
)

# A tool and its options. Only our kernels are instrumented; but initcheck has to see who writes
# what ours read, so it watches all, and below only what our kernels read is a finding.
options_of() {
  case $1 in
    memcheck) echo "--kernel-name kns=fusedpo --report-api-errors no --padding 64" ;;
    racecheck) echo "--kernel-name kns=fusedpo --racecheck-report all" ;;
    initcheck) echo "--print-limit 10000" ;;
    synccheck) echo "--kernel-name kns=fusedpo" ;;
  esac
}

# verdict TOOL STATUS: sets verdict and result from what the tool and pytest wrote.
judge() {
  local tool=$1 status=$2 log=$out/$1.log pytest=$out/$1.pytest.log summary ours
  summary=$(grep -hE '(ERROR|RACECHECK) SUMMARY:' "$log" 2> /dev/null | tail -n 1 | sed 's/^=* *//')
  ours=$(grep -cE '^=+ +at .*fusedpo' "$log" 2> /dev/null)
  result=1
  if [ "$status" = 124 ] || [ "$status" = 137 ]; then
    verdict="did not finish in $seconds s"
  elif [ -z "$summary" ]; then
    verdict="could not run: $(grep -hE 'Error|Unable|supported|terminated' "$log" 2> /dev/null | head -n 1)"
    result=2
  elif [ "$tool" = initcheck ] && [ "$ours" != 0 ]; then
    verdict="$ours uninitialised reads in our kernels; in all: $summary"
  elif [ "$tool" != initcheck ] && ! grep -q 'SUMMARY: 0 ' <<< "$summary"; then
    verdict=$summary
  elif ! grep -qE '[0-9]+ passed' "$pytest" || grep -qE '[0-9]+ (failed|error)' "$pytest"; then
    verdict="the tests did not pass"
  else
    verdict="clean ($summary)" result=0
  fi
}

worst=0
for tool in "${tools[@]}"; do
  start=$SECONDS
  rm -f "$out/$tool.log"
  # Without torch's caching every tensor is an allocation of its own, with bounds of its own.
  # shellcheck disable=SC2046  # the options are words
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 FUSEDPO_REQUIRE_CUDA=1 timeout --kill-after=10 "$seconds" \
    "$sanitizer" --tool "$tool" $(options_of "$tool") --target-processes all \
    --show-backtrace device --log-file "$out/$tool.log" \
    "$python" -m pytest -q -x -p no:cacheprovider "${tests[@]}" > "$out/$tool.pytest.log" 2>&1
  judge "$tool" $?
  echo "$tool: $verdict; $((SECONDS - start)) s; pytest: $(tail -n 1 "$out/$tool.pytest.log")"
  # A finding outweighs a tool that could not run.
  if [ $result = 1 ] || { [ $result = 2 ] && [ $worst = 0 ]; }; then worst=$result; fi
done
exit $worst
