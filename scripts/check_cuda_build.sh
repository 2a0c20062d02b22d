#!/usr/bin/env bash
# check_cuda_build.sh VENV FOLDER: compiles the CUDA kernels for every architecture of a release, in
# FOLDER and without Python, and checks what came out. Needs nvcc, no GPU.
set -euo pipefail
venv=$(cd "$1" && pwd) folder=$2
start=$SECONDS
fail() { echo "check_cuda_build: $*" >&2; exit 1; }

# cuobjdump comes with a full toolkit; else from the package index.
cuobjdump=$(command -v cuobjdump || true)
if [ -z "$cuobjdump" ]; then
  "$venv/bin/python" -m pip install -q --disable-pip-version-check "nvidia-cuda-cuobjdump>=13" ||
    fail "cuobjdump was not found and cannot be installed: install the CUDA toolkit's cuobjdump"
  cuobjdump=$("$venv/bin/python" -c 'import importlib.metadata as m
print(next(f.locate() for f in m.files("nvidia-cuda-cuobjdump") if f.name == "cuobjdump"))')
fi

rm -rf "$folder"
mkdir -p "$folder"
"$venv/bin/cmake" -S . -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$venv/bin/ninja" \
  -DFUSEDPO_BUILD_PYTHON=OFF -DFUSEDPO_CUDA=ON -DFUSEDPO_CUDA_ARCHS=AUTO -DFUSEDPO_WERROR=ON \
  -DCMAKE_CUDA_FLAGS="-Xptxas -v" > "$folder.log" 2>&1 || { cat "$folder.log" >&2; exit 1; }
"$venv/bin/cmake" --build "$folder" --target fusedpo_cuda >> "$folder.log" 2>&1 ||
  { tail -n 40 "$folder.log" >&2; exit 1; }
echo "compiled in $((SECONDS - start)) s"
library=$folder/libfusedpo_cuda.a

# ---- every architecture, and PTX for those to come -------------------------------
holds() { "$cuobjdump" "--list-$1" "$library" | grep -oE 'sm_[0-9]+' | sort -u | tr '\n' ' '; }
sass=$(holds elf) ptx=$(holds ptx)
echo "SASS: $sass PTX: $ptx"
[ "$sass" = "sm_100 sm_120 sm_80 sm_86 sm_89 sm_90 " ] || fail "SASS is not complete"
[ "$ptx" = "sm_120 sm_90 " ] || fail "PTX must be of 90 and 120"

# ---- what a library made of it needs at run time ---------------------------------
cudart=$(sed -n 's/^CUDA_cudart_static_LIBRARY:FILEPATH=//p' "$folder/CMakeCache.txt")
"${CXX:-c++}" -shared -o "$folder/linked.so" -Wl,--whole-archive "$library" \
  -Wl,--no-whole-archive "$cudart" -ldl -lrt -lpthread
readelf -d "$folder/linked.so" | grep NEEDED | grep -E 'libcuda|cudart|cublas' &&
  fail "a CUDA library is needed at run time"
grep -qF "$PWD" "$library" && fail "the library holds this folder's name"

# ---- registers and spills --------------------------------------------------------
"$venv/bin/python" scripts/cuda_registers.py "$folder.log"
echo "checked in $((SECONDS - start)) s"
