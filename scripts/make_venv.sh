#!/usr/bin/env bash
# make_venv.sh PYTHON FOLDER: a virtual environment, or one line that says what is missing.
set -euo pipefail
python=$1 folder=$2

say() { echo "fusedpo: $*" >&2; }

command -v "$python" > /dev/null || {
  say "$python was not found: install Python 3.11 or newer, or name it: make PYTHON=python3.12"
  exit 1
}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  say "make needs Python 3.11 or newer (TRL does); $python is $("$python" -V 2>&1). Name another: make PYTHON=python3.12"
  exit 1
}
"$python" -c 'import ensurepip, venv' 2> /dev/null || {
  say "$python cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)"
  exit 1
}
"$python" - << 'END' || {
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
END
  say "$python has no header files: install its development package (Debian, Ubuntu: apt install python3-dev)"
  exit 1
}
if [ -z "${CXX:-}" ] && ! command -v c++ g++ clang++ > /dev/null; then
  say "no C++ compiler was found: install one (Debian, Ubuntu: apt install g++) or set CXX"
  exit 1
fi

# A half-made environment must not look finished to make.
"$python" -m venv "$folder" || { rm -rf "$folder"; exit 1; }
