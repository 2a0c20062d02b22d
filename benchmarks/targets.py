"""python -m benchmarks.targets FOLDER: the targets of a GPU's or a CPU's benchmarks, row by row.

Reads the JSON files of one machine, prints and writes targets.json: for every row its target, what
was measured and whether it was met; "not measured" where there is no figure.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from benchmarks import common, judge, targets_cpu, targets_gpu, targets_step

GPU_FILES = ("head", "logits", "losses")
CPU_FILES = ("head", "logits", "memory", "dpo_step")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    folder = parser.parse_args(arguments).folder
    runs: judge.Runs = {}
    for name in {*GPU_FILES, *CPU_FILES}:
        path = folder / f"{name}.json"
        if path.exists():
            runs[name] = json.loads(path.read_text(encoding="utf-8"))
    rehearsal = any(run.get("rehearsal") for run in runs.values())
    on_gpu = rehearsal or any(run["environment"].get("gpu") for run in runs.values())
    names = GPU_FILES if on_gpu else CPU_FILES
    runs = {name: runs[name] for name in names if name in runs}
    if not runs:
        parser.error(f"no {'.json, '.join(names)}.json in {folder}")
    on_cpu = [*targets_cpu.TARGETS, *targets_step.targets(runs)]
    found = judge.rows(targets_gpu.TARGETS if on_gpu else on_cpu, runs)
    judge.show(found)
    environments = {name: run["environment"] for name, run in runs.items()}
    content = {"rehearsal": rehearsal, "targets": found, "environments": environments}
    content["commits"] = {n: common.commits_of(run, lambda _: "")[""] for n, run in runs.items()}
    common.write(folder / "targets.json", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
