#!/usr/bin/env bash
# gpu_wheels.sh FOLDER: downloads the wheels that benchmarks/gpu_run.sh may have to install on a GPU
# machine without network: pure Python, a few megabytes together. With --tools also CMake and Ninja
# (30 MB), for a machine that lacks them.
set -euo pipefail
tools=()
[ "${1:-}" = --tools ] && tools=(cmake ninja) && shift
folder=${1:?usage: gpu_wheels.sh [--tools] FOLDER}
mkdir -p "$folder"
python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  --platform any --dest "$folder" \
  trl==1.16.0 liger-kernel datasets dill multiprocess \
  pybind11 scikit-build-core pathspec pytest pluggy iniconfig pygments mpmath \
  "${tools[@]}"
du -ch "$folder"/*.whl
