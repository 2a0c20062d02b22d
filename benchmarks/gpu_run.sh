#!/usr/bin/env bash
# benchmarks/gpu_run.sh --out FOLDER [--wheels FOLDER] [--minutes N] [--python PYTHON] [--rehearse]
#
# Everything that waits for a GPU, on a fresh machine without network, in at most N (10) minutes:
# build for this GPU alone, test group, benchmarks, compute-sanitizer. Needs Python with torch
# (CUDA), nvcc, CMake and Ninja; --wheels is the folder that scripts/gpu_wheels.sh filled with what
# else may be missing. Stages run in the order of value, each under a time limit, so that one that
# fails or hangs never costs the later ones. FOLDER receives
#
#   stages.json                                      each stage's seconds and exit status
#   head.json logits.json losses.json packed_attention.json targets.json   results, and a judgement
#                                                    of them, row by row
#   dpo_step.json                                    whole training steps, two cases
#   log.txt                                          the end of what every stage printed
#
# Whole steps need real pairs and a tokenizer: FUSEDPO_REAL_DATA names the folder with preferences/
# and tokenizers/. Without it that stage is left out, and the script says so.
#
# Ends with 0 if every stage did. --rehearse runs all of it on a CPU, tiny: it measures nothing.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=python3 wheels='' out='' minutes=10 rehearse=
while [ $# -gt 0 ]; do
  case $1 in
    --python) python=$2 && shift 2 ;;
    --wheels) wheels=$(realpath "$2") && shift 2 ;;
    --out) out=$2 && shift 2 ;;
    --minutes) minutes=$2 && shift 2 ;;
    --rehearse) rehearse=--rehearse && shift ;;
    *) sed -n 2,19p "$0" | cut -c3- >&2 && exit 2 ;;
  esac
done
[ -n "$out" ] || { sed -n 2,19p "$0" | cut -c3- >&2 && exit 2; }
mkdir -p "$out" && out=$(realpath "$out")
site=$(pwd)/build/gpu-site
mkdir -p build && rm -rf "$site" "$out/stages.json" && : > "$out/log.txt"
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export FUSEDPO_REQUIRE_CUDA=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
[ -z "$rehearse" ] || export FUSEDPO_TEST_DEVICE=cpu

failed=0 stages=''
# stage NAME LIMIT COMMAND...: runs COMMAND for at most LIMIT seconds and never past the end.
stage() {
  local name=$1 limit=$2 start=$SECONDS left=$((minutes * 60 - SECONDS)) status
  shift 2
  [ -z "$rehearse" ] || limit=$((limit * 4)) # a CPU is slower, and may be busy
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 5 ]; then
    status=not-reached
  else
    timeout --kill-after=5 "$limit" "$@" > "$out/stage.log" 2>&1
    status=$?
    { echo "=== $name: $*" && tail -c 200000 "$out/stage.log"; } >> "$out/log.txt"
  fi
  echo "$name: exit status $status, $((SECONDS - start)) s of $limit"
  [ "$status" = 0 ] || { failed=1 && tail -n 12 "$out/stage.log" 2> /dev/null | sed 's/^/    /'; }
  rm -f "$out/stage.log"
  stages+="${stages:+, }{\"stage\": \"$name\", \"status\": \"$status\", \"seconds\": $((SECONDS - start))}"
  echo "{\"rehearsal\": $([ -n "$rehearse" ] && echo true || echo false), \"stages\": [$stages]}" > "$out/stages.json"
  [ "$status" = 0 ]
}

# The three functions below run in shells of their own, under `timeout`.
# Only what is missing; TRL in the version that the benchmarks compare with.
install_wheels() {
  "$python" - "$wheels" > "$out/missing.txt" << 'EOF'
import importlib.metadata as installed, pathlib, sys
for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    name, version = wheel.name.split("-")[:2]
    try:
        found = installed.version(name)
    except installed.PackageNotFoundError:
        found = None
    if found is None or (name == "trl" and found != version):
        print(wheel)
EOF
  xargs -r "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" \
    < "$out/missing.txt"
  local status=$?
  echo "installed:" && cat "$out/missing.txt"
  rm -f "$out/missing.txt"
  return "$status"
}

build() {
  local arch
  arch=$("$python" -c 'import torch; print("%d%d-real" % torch.cuda.get_device_capability())') || return
  echo "building for $arch"
  FUSEDPO_NATIVE=require FUSEDPO_CUDA=ON FUSEDPO_CUDA_ARCHS=$arch \
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation --target "$site" .
}

build_for_cpu() {
  FUSEDPO_NATIVE=require FUSEDPO_CUDA=OFF \
    "$python" -m pip install -q --no-index --no-deps --no-build-isolation --target "$site" .
}

export -f install_wheels build build_for_cpu
export python wheels out site
tests=("$python" -m pytest -v -p no:cacheprovider --durations=5)
head=("$python" -m benchmarks.head --device cuda ${rehearse:+--rehearse} --rounds 9 --out "$out/head.json")

[ -z "$wheels" ] || stage "wheels" 60 bash -c install_wheels
if [ -z "$rehearse" ]; then stage "build" 180 bash -c build; else stage "build" 300 bash -c build_for_cpu; fi ||
  { echo "nothing can run without the build" && exit 1; }
stage "doctor" 30 "$python" -m fusedpo
stage "tests: device" 140 "${tests[@]}" tests/python/test_cuda.py \
  tests/python/test_cuda_memory.py
stage "logits" 60 "$python" -m benchmarks.logits ${rehearse:+--rehearse} --quick --out "$out/logits.json"
# The targets' cases come first; every case is on disk as soon as it is timed.
stage "head" 150 "${head[@]}" --seconds 90
stage "losses" 60 "$python" -m benchmarks.losses --device cuda ${rehearse:+--rehearse} --out "$out/losses.json"
stage "attention" 40 "$python" -m benchmarks.packed_attention $([ -n "$rehearse" ] || echo --device cuda) \
  $([ -z "$rehearse" ] || echo --rounds 1 --pairs 1) --out "$out/packed_attention.json"
stage "targets" 20 "$python" -m benchmarks.targets "$out"
steps=("$python" -m benchmarks.dpo_step --batch 4 --train lora full --dtype amp
  --contestants trl patch fused+store shared shared+store)
if [ -z "${FUSEDPO_REAL_DATA:-}" ]; then
  echo "steps: left out, FUSEDPO_REAL_DATA names no folder with preferences/ and tokenizers/"
elif [ -z "$rehearse" ]; then # about 20 s for each of six processes, most of it imports
  stage "steps" 250 "${steps[@]}" --device cuda --layers 4 --steps 3 --files llamafactory-dpo-en \
    --data "$FUSEDPO_REAL_DATA/preferences" --tokenizer "$FUSEDPO_REAL_DATA/tokenizers/qwen2.5" \
    --output "$out/dpo_step.json"
else
  stage "steps" 250 "${steps[@]}" --rehearse --layers 2 --steps 1 --files anthropic-evals-yesno \
    --data "$FUSEDPO_REAL_DATA/preferences" \
    --tokenizer "$FUSEDPO_REAL_DATA/tokenizers/minimind-6400" --output "$out/dpo_step.json"
fi
if [ -z "$rehearse" ]; then
  stage "tests: contract" 120 "${tests[@]}" tests/python/test_cuda_contract.py
  stage "sanitizer" 190 scripts/compute_sanitizer.sh --python "$python" --seconds 45 --out build/sanitizer
  tail -n 100 build/sanitizer/*.log >> "$out/log.txt" 2> /dev/null
  stage "tests: losses" 60 "${tests[@]}" tests/python/test_cuda_losses.py
  stage "tests: trl" 60 "${tests[@]}" tests/python/test_cuda_packing.py \
    tests/python/test_cuda_trl.py
  stage "tests: accuracy" 90 "${tests[@]}" tests/python/test_cuda_accuracy.py
  stage "head: the rest" 300 "${head[@]}" --append
fi
echo "all: $SECONDS s; results in $out"
exit $failed
