#!/usr/bin/env bash
# build_cuda_host_ops.sh VENV FOLDER: the CUDA operators over emulated kernels, for tests without a
# GPU; prints the library's path.
set -euo pipefail
venv=$(cd "$1" && pwd) folder=$2
mkdir -p "$folder"
{
  "$venv/bin/cmake" -S . -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$venv/bin/ninja" \
    -DPython_EXECUTABLE="$venv/bin/python" \
    -Dpybind11_DIR="$("$venv/bin/python" -m pybind11 --cmakedir)" \
    -DFUSEDPO_BUILD_CUDA_HOST=ON -DFUSEDPO_CUDA=OFF -DFUSEDPO_WERROR="${FUSEDPO_WERROR:-OFF}"
  "$venv/bin/cmake" --build "$folder" --target fusedpo_ops_cuda_host
} > "$folder.log" 2>&1 || { tail -n 40 "$folder.log" >&2; exit 1; }
echo "$PWD/$(find "$folder" -name 'libfusedpo_ops_cuda_host.so')"
