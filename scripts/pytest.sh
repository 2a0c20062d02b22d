#!/usr/bin/env bash
# pytest.sh PYTHON [pytest argument...]: pytest in one process per core (8 at most), of one thread
# each: the models are tiny. Tests of threads set their number themselves.
set -euo pipefail
python=$1
shift
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal "$@"
