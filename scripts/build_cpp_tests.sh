#!/usr/bin/env bash
# build_cpp_tests.sh VENV FOLDER [CMake argument...]: builds FOLDER/tests/cpp/fusedpo_test, or the
# target that FUSEDPO_TARGET names.
#
# GoogleTest is the system's if it is there, else comes through apt-get where that is allowed, else
# CMake downloads it, else one line says what to install.
set -euo pipefail
venv=$(cd "$1" && pwd) folder=$2
shift 2
cmake=$venv/bin/cmake

configure() {
  "$cmake" -S . -B "$folder" -G Ninja -DCMAKE_MAKE_PROGRAM="$venv/bin/ninja" \
    -DFUSEDPO_BUILD_TESTS=ON -DFUSEDPO_BUILD_PYTHON=OFF -DFUSEDPO_CUDA=OFF \
    -DFUSEDPO_WERROR="${FUSEDPO_WERROR:-OFF}" "$@" > "$folder.log" 2>&1
}

# Only GoogleTest is worth another attempt: any other configure error is shown as it is.
lacks_gtest() { grep -q 'GoogleTest is not installed' "$folder.log"; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

apt_install() {
  command -v apt-get > /dev/null || return 1
  as_root true 2> /dev/null || return 1
  as_root apt-get install -y -qq libgtest-dev > /dev/null 2>&1 && return
  as_root apt-get update -qq > /dev/null 2>&1 && as_root apt-get install -y -qq libgtest-dev > /dev/null 2>&1
}

mkdir -p "$folder"
if ! configure -DFUSEDPO_DOWNLOAD_GTEST=OFF "$@"; then
  lacks_gtest || { cat "$folder.log" >&2; exit 1; }
  echo "fusedpo: GoogleTest is not installed: trying apt-get, then a download" >&2
  if ! { apt_install && configure -DFUSEDPO_DOWNLOAD_GTEST=OFF "$@"; }; then
    configure -DFUSEDPO_DOWNLOAD_GTEST=ON "$@" || {
      tail -n 15 "$folder.log" >&2
      echo "fusedpo: GoogleTest is missing and could not be fetched: install it (Debian, Ubuntu: apt install libgtest-dev; Fedora: dnf install gtest-devel) and run make again (all of CMake's output: $folder.log)" >&2
      exit 1
    }
  fi
fi
"$cmake" --build "$folder" --target "${FUSEDPO_TARGET:-all}"
