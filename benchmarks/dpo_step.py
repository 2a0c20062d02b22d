"""python -m benchmarks.dpo_step: whole DPO steps on real prompts, plain TRL beside fusedpo.

Every contestant trains in a process of its own on the same model, batches and optimizer. First the
logs of all are compared with plain TRL's, then their times are reported: a contestant whose logs
differ is reported as wrong and its times are left out. The model has Qwen2.5-0.5B's shape with
random weights; where it has fewer layers than 24, the time of 24 is extrapolated from the measured
time of the backbone, and marked.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import common
from benchmarks.dpo_step_run import CONTESTANTS, LAYERS, Case

FILES = ("llamafactory-dpo-en", "pandalm-human", "llmbar", "anthropic-evals-yesno")
# Largest relative difference of a logged value from TRL's. In bf16 the contestants round at
# different places, and rewards start at 0: those are held to the same number of nats.
ALLOWED = {"fp32": 2e-4, "amp": 2e-2}


def child(case: Case, contestant: str, folder: pathlib.Path) -> dict[str, Any]:
    """Train in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.dpo_step_run", contestant, str(folder)]
    result = subprocess.run(
        [*command, json.dumps(case._asdict())],
        capture_output=True,
        text=True,
        check=False,
        cwd=common.ROOT,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{contestant} failed:\n{result.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def worst_difference(logs: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """Over every value that TRL logs. Accuracies count ties, which rounding decides."""
    worst = 0.0
    for mine, other in zip(logs, theirs, strict=True):
        for name, value in other.items():
            if not name.endswith("accuracies") and name not in ("epoch", "learning_rate"):
                # Rewards start at 0; the mean logit of a random head is close to 0.
                absolute = name.startswith(("rewards/", "logits/"))
                scale = 1.0 if absolute else max(abs(value), 1e-9)
                worst = max(worst, abs(mine[name] - value) / scale)
    return worst


def full_depth(run: dict[str, Any], layers: int) -> float:
    """Seconds of a step with 24 layers: the rest does not depend on them."""
    median: float = run["step"]["median_s"]
    return median + run["backbone_s"] * (LAYERS - layers) / layers


def measure(case: Case, contestants: list[str]) -> dict[str, Any]:
    runs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in contestants:
            print(f"  {name} ...", end="", flush=True)
            run = child(case, name, pathlib.Path(folder))
            reference = runs.setdefault("trl", run)
            run["worst_difference"] = worst_difference(run["logs"], reference["logs"])
            if run["worst_difference"] > ALLOWED[case.dtype]:
                run["wrong"] = True
                del run["step"]
            else:
                run["step_of_24_layers_s"] = full_depth(run, case.layers)
            runs[name] = run
            print(" " + line(run, reference))
    return {"case": case._asdict(), "extrapolated": case.layers != LAYERS, "runs": runs}


def line(run: dict[str, Any], trl: dict[str, Any]) -> str:
    if "wrong" in run:
        return f"WRONG: a logged value differs by {run['worst_difference']:.1e}"
    step, deep = run["step"]["median_s"], run["step_of_24_layers_s"]
    return (
        f"{step:7.2f} s/step ({trl['step']['median_s'] / step:4.2f}x)  24 layers {deep:7.2f} s "
        f"({trl['step_of_24_layers_s'] / deep:4.2f}x)  backbone {run['backbone_s']:6.2f} s  "
        f"{run['tokens']['computed']:6.0f} tokens  peak {run['peak_bytes'] / 2**30:5.2f} GiB "
        f"({run['extra_bytes'] / 2**30:5.2f} above the weights)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder of *.jsonl pairs")
    parser.add_argument("--tokenizer", required=True, help="Qwen2.5's, a folder or hub id")
    parser.add_argument("--files", nargs="+", default=FILES)
    parser.add_argument("--batch", nargs="+", type=int, default=(4, 8), help="pairs per step")
    parser.add_argument("--train", nargs="+", default=("lora", "full"), choices=("lora", "full"))
    parser.add_argument("--dtype", nargs="+", default=("fp32", "amp"), choices=tuple(ALLOWED))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after an untimed one")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--contestants", nargs="+", default=tuple(CONTESTANTS))
    parser.add_argument("--output", type=pathlib.Path)
    options = parser.parse_args()
    if options.contestants[0] != "trl":
        parser.error("the first contestant must be trl: the others are compared with it")
    environment = common.environment()
    output = options.output or (common.RESULTS / common.device_name(environment) / "dpo_step.json")
    results: list[dict[str, Any]] = []
    for file in options.files:
        for pairs in options.batch:
            for train in options.train:
                for dtype in options.dtype:
                    case = Case(
                        data=str((options.data / f"{file}.jsonl").resolve()),
                        tokenizer=str(options.tokenizer),
                        pairs=pairs,
                        train=train,
                        dtype=dtype,
                        layers=options.layers,
                        steps=options.steps,
                        device=options.device,
                    )
                    print(f"{file}, {pairs} pairs, {train}, {dtype}, {options.layers} layers")
                    results.append({"file": file, **measure(case, list(options.contestants))})
                    # After each case: a run that is stopped leaves what it has.
                    common.write(output, {"environment": environment, "cases": results})


if __name__ == "__main__":
    main()
