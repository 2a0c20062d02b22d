"""python -m benchmarks.dpo_step: whole DPO steps on real prompts, plain TRL beside fusedpo.

Every contestant trains in a process of its own on the same model, batches and optimizer. First the
logs of all are compared with plain TRL's, then their times are reported: a contestant whose logs
differ is reported as wrong and its times are left out. The model has Qwen2.5-0.5B's shape with
random weights; where it has fewer layers than 24 and LoRA is trained, the time of 24 is
extrapolated from the measured time of the backbone. (With all weights trained, the optimizer's time
depends on the layers, too.)
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import torch

from benchmarks import common, device
from benchmarks.dpo_step_run import CONTESTANTS, LAYERS, Case

FILES = ("llamafactory-dpo-en", "pandalm-human", "llmbar", "anthropic-evals-yesno")
# Largest relative difference of a logged value from TRL's. In bf16 everyone rounds, TRL too, at
# places of its own: to be as close to what TRL logs in fp32 serves there, too. Log-probs are sums
# over many tokens, and tell most of a wrong attention.
ALLOWED = {"fp32": {"": 2e-4}, "amp": {"": 2e-2, "logps/": 5e-4, "loss": 5e-3}}


def child(case: Case, what: str, folder: pathlib.Path) -> dict[str, Any]:
    """Train a contestant, or make the store of all, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.dpo_step_run", what, str(folder)]
    result = subprocess.run(
        [*command, json.dumps(case._asdict())],
        capture_output=True,
        text=True,
        check=False,
        cwd=common.ROOT,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{what} failed:\n{result.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def worst_difference(
    logs: list[dict[str, float]], theirs: list[dict[str, float]], allowed: dict[str, float]
) -> float:
    """The largest difference of a value that TRL logs, as a multiple of what is allowed.

    Accuracies count ties, which rounding decides.
    """
    worst = 0.0
    for mine, other in zip(logs, theirs, strict=True):
        for name, value in other.items():
            if name.endswith("accuracies") or name in ("epoch", "learning_rate"):
                continue
            # Rewards start at 0; the mean logit of a random head is close to 0.
            absolute = name.startswith(("rewards/", "logits/"))
            scale = 1.0 if absolute else max(abs(value), 1e-9)
            limit = allowed[max((key for key in allowed if name.startswith(key)), key=len)]
            worst = max(worst, abs(mine[name] - value) / scale / limit)
    return worst


def compare(run: dict[str, Any], trl: dict[str, Any], case: Case) -> None:
    """Add what is derived: how many times better than TRL's."""
    if case.train == "lora":
        for each in (run, trl):
            more = each["backbone_s"] * (LAYERS - case.layers) / case.layers
            each["step_of_24_layers_s"] = each["step"]["median_s"] + more
        run["faster_with_24_layers"] = trl["step_of_24_layers_s"] / run["step_of_24_layers_s"]
    run["faster"] = trl["step"]["median_s"] / run["step"]["median_s"]
    run["backbone_faster"] = trl["backbone_s"] / run["backbone_s"]
    run["fewer_tokens"] = trl["tokens"]["computed"] / run["tokens"]["computed"]
    # A training as small as a test's may find all the memory that it needs.
    run["memory_share"] = run["extra_bytes"] / max(trl["extra_bytes"], 1)


def described(case: Case) -> dict[str, Any]:
    """The case without this machine's folders."""
    names = {name: pathlib.Path(getattr(case, name)).name for name in ("data", "tokenizer")}
    return case._asdict() | names


def logs_in_fp32(
    case: Case, results: list[dict[str, Any]], commit: str | None
) -> list[dict[str, float]] | None:
    """What plain TRL logged in the case's twin in fp32, where that is among the results, of this
    commit: at another the benchmark may have trained otherwise."""
    twin = described(case._replace(dtype="fp32"))
    found = (each for each in results if each["case"] == twin and each["commit"] == commit)
    return next((each["runs"]["trl"]["logs"] for each in found), None)


def measure(
    case: Case, contestants: list[str], in_fp32: list[dict[str, float]] | None = None
) -> dict[str, Any]:
    """Run the contestants; `in_fp32`: the logs of plain TRL in fp32, if they are known already."""
    runs: dict[str, Any] = {}
    result: dict[str, Any] = {"case": described(case), "runs": runs}
    allowed = ALLOWED[case.dtype]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if any(CONTESTANTS[name].store for name in contestants):
            result["store"] = child(case, "store", folder)
        for name in contestants:
            print(f"  {name:13}", end="", flush=True)
            run = child(case, name, folder)
            trl = runs.setdefault("trl", run)
            run["difference"] = worst_difference(run["logs"], trl["logs"], allowed)
            if run["difference"] > 1 and case.dtype != "fp32":
                in_fp32 = in_fp32 or child(case._replace(dtype="fp32"), "trl", folder)["logs"]
                run["difference_from_fp32"] = worst_difference(run["logs"], in_fp32, allowed)
            problem = what_is_wrong(run, trl)
            if problem is not None:
                del run["step"]
                print(f" WRONG: {problem}")
            else:
                compare(run, trl, case)
                print(f"{line(run)}  logs {difference_of(run):4.2f} of what may differ")
            runs[name] = run
    return result


def difference_of(run: dict[str, Any]) -> float:
    return min(run["difference"], run.get("difference_from_fp32", run["difference"]))


def what_is_wrong(run: dict[str, Any], trl: dict[str, Any]) -> str | None:
    """Why a contestant's times are not to be compared with TRL's."""
    if run["products"] != trl["products"]:
        return f"its layers multiply in {run['products']}, TRL's in {trl['products']}"
    if difference_of(run) > 1:
        return f"{difference_of(run):.1f} times the allowed difference from TRL"
    return None


def card(environment: dict[str, Any]) -> str | None:
    """The GPU's name; its clocks and temperature differ from run to run."""
    name: str | None = (environment.get("gpu") or {}).get("name")
    return name


def earlier(output: pathlib.Path, environment: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of a run that this one adds to; both must be of one machine. Each names its commit:
    its contestants are compared with one another only."""
    if not output.exists():
        return []
    content = json.loads(output.read_text(encoding="utf-8"))
    before, now = (each | {"card": card(each)} for each in (content["environment"], environment))
    for name in ("cpu", "card", "flags", "threads", "versions"):
        if before[name] != now[name]:
            raise SystemExit(f"{output} was measured with another {name}: give another --output")
    return [{"commit": before["commit"]} | case for case in content["cases"]]


def line(run: dict[str, Any]) -> str:
    deep = ""
    if "step_of_24_layers_s" in run:
        seconds = run["step_of_24_layers_s"]
        deep = f"24 layers {seconds:7.2f} s ({run['faster_with_24_layers']:4.2f}x)  "
    return (
        f"{run['step']['median_s']:7.2f} s/step ({run['faster']:4.2f}x)  {deep}"
        f"backbone {run['backbone_s']:6.2f} s ({run['backbone_faster']:4.2f}x for "
        f"{run['fewer_tokens']:4.2f}x fewer tokens)  "
        f"peak {run['peak_bytes'] / 2**30:5.2f} GiB, {run['extra_bytes'] / 2**30:5.2f} above the "
        f"weights ({run['memory_share']:4.2f})"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dpo_step", description=__doc__)
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
    parser.add_argument(
        "--add", action="store_true", help="keep the cases in the output that are not run anew"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="the results say that they are no measurement"
    )
    options = parser.parse_args(arguments)
    if options.contestants[0] != "trl":
        parser.error("the first contestant must be trl: the others are compared with it")
    return options


def cases_of(options: argparse.Namespace) -> list[tuple[str, Case]]:
    return [
        (
            file,
            Case(
                data=str((options.data / f"{file}.jsonl").resolve()),
                tokenizer=str(options.tokenizer),
                pairs=pairs,
                train=train,
                dtype=dtype,
                layers=options.layers,
                steps=options.steps,
                device=options.device,
            ),
        )
        for file in options.files
        for pairs in options.batch
        for train in options.train
        for dtype in options.dtype
    ]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    environment = common.environment() | {"gpu": device.facts(torch.device(options.device))}
    output = options.output or (common.RESULTS / common.device_name(environment) / "dpo_step.json")
    content = {"environment": environment} | ({"rehearsal": True} if options.rehearse else {})
    results = earlier(output, environment) if options.add else []
    for file, case in cases_of(options):
        print(f"{file}, {case.pairs} pairs, {case.train}, {case.dtype}, {case.layers} layers")
        commit = environment["commit"]
        found = {"file": file, "commit": commit}
        found |= measure(case, list(options.contestants), logs_in_fp32(case, results, commit))
        results = [r for r in results if r["case"] != found["case"]] + [found]
        # After each case: a run that is stopped leaves what it has.
        common.write(output, {**content, "cases": results})


if __name__ == "__main__":
    main()
