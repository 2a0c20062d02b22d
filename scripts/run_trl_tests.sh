#!/usr/bin/env bash
# run_trl_tests.sh FOLDER "VERSION..." [pytest argument...]: the tests marked `trl` in the environment
# FOLDER/VERSION of each TRL version; ends in one summary line for each.
set -uo pipefail
folder=$1
read -ra versions <<< "$2"
shift 2
mkdir -p build

status=0
summaries=()
for version in "${versions[@]}"; do
  echo "=== TRL $version"
  log=build/pytest-trl-$version.log
  scripts/pytest.sh "$folder/$version/bin/python" -m trl "$@" 2>&1 | tee "$log" || status=1
  summaries+=("TRL $version: $(tail -n 1 "$log")")
done
echo
printf '%s\n' "${summaries[@]}"
exit $status
