"""Registers and spills of the kernels that read or write whole rows, from the output of `ptxas -v`.

Usage: cuda_registers.py LOG. Prints the largest over all architectures. A kernel that is meant to
run at the speed of memory may keep a few values in local memory that it needs once before and once
after its loops; more than that is an error.
"""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

SPILL_LIMIT = 96  # bytes stored and loaded
# fp64 rows are bound by arithmetic, and the loss kernels by latency.
HOT = re.compile(r"\b(score|differentiate|move|add|sum_column|multiply)<(?!.*double)")


def main(log: str) -> int:
    text = pathlib.Path(log).read_text()
    text = subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout
    text = re.sub(r"fusedpo::|cuda::|\(anonymous namespace\)::", "", text)
    kernels: dict[str, list[tuple[str, int, int]]] = {}
    name = arch = ""
    spilled = 0
    wants_spill = False
    for line in text.splitlines():
        if entry := re.search(r"Compiling entry function '(.+)' for 'sm_(\d+)'", line):
            name, arch = entry[1], entry[2]
        elif "Function properties for" in line:
            wants_spill = name in line
        elif (spill := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)) and (
            wants_spill
        ):
            spilled = int(spill[1]) + int(spill[2])
        elif used := re.search(r"Used (\d+) registers", line):
            kernels.setdefault(name, []).append((arch, int(used[1]), spilled))
    if not kernels:
        print(f"{log} holds no output of ptxas -v", file=sys.stderr)
        return 1
    bad = False
    for kernel, found in sorted(kernels.items()):
        short = re.sub(r"^void |\(\w+( \w+)*\)$", "", kernel)
        hot = HOT.search(short) is not None
        spills = [f"sm_{arch}: {count}" for arch, _, count in found if count]
        bad |= hot and any(count > SPILL_LIMIT for _, _, count in found)
        note = "; bytes spilled: " + ", ".join(spills) if spills else ""
        print(f"{max(r for _, r, _ in found):4} registers  {short}{note}")
    if bad:
        print("a kernel that should run at the speed of memory spills registers", file=sys.stderr)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
