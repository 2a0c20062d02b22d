"""python -m benchmarks.readme: writes tables from benchmarks/results/<machine>/*.json.

One per pair of marks that README.md and benchmarks/README.md have: `step` (whole steps), `head`,
`logits` and `targets` (CPU), `store`, `gpu`. Without an argument it rewrites both; with --check it
only says whether they are up to date (exit status 1 if not). Rehearsals of the GPU benchmarks never
get into them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from benchmarks import judge, readme_cpu
from benchmarks.common import RESULTS, ROOT

READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
MARKS = {
    name: (
        f"<!-- {name}: from benchmarks/results by `python -m benchmarks.readme` -->",
        f"<!-- /{name} -->",
    )
    for name in ("step", "head", "logits", "targets", "store", "gpu")
}
NO_FIGURE = "Nothing has been measured yet."
NO_GPU_FIGURE = "Nothing has been measured on a GPU yet: there is no figure to show."
DTYPES = {"fp32": "fp32", "bf16": "bf16", "amp": "fp32 under bf16 autocast"}


def step_table(path: pathlib.Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    env, cases = content["environment"], content["cases"]
    layers = cases[0]["case"]["layers"]
    lines = [
        "Whole steps of DPO on real prompts, Qwen2.5-0.5B's shape with "
        f"{layers} of its 24 layers. {env['cpu']}, {env['threads']} threads, "
        f"{' '.join(env['flags'])}; torch {env['versions']['torch']}, "
        f"TRL {env['versions']['trl']}. "
        "How many times faster than TRL's a step is (in brackets: with 24 layers, at the measured "
        "time per layer) and its peak memory above the weights as a share of TRL's.",
        "",
    ]
    names = [name for name in cases[0]["runs"] if name != "trl"]
    lines += [
        "| data, pairs per step, trained, precision | TRL s/step | " + " | ".join(names) + " |"
    ]
    lines += ["|---" * (len(names) + 2) + "|"]
    for case in cases:
        what, runs = case["case"], case["runs"]
        cells = [f"{runs['trl']['step']['median_s']:.1f}"]
        for name in names:
            run = runs.get(name, {})
            if "step" not in run:
                cells.append("-")
                continue
            deep = run.get("faster_with_24_layers")
            deep = "" if deep is None else f" ({deep:.1f}x)"
            cells.append(f"{run['faster']:.1f}x{deep}, {run['memory_share']:.2f}")
        title = f"{case['file']}, {what['pairs']}, {what['train']}, {DTYPES[what['dtype']]}"
        lines.append("| " + " | ".join([title, *cells]) + " |")
    lines += ["", f"From `{path.relative_to(ROOT)}`, commit `{env['commit'][:7]}`."]
    return "\n".join(lines)


def store_table(path: pathlib.Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    env, results = content["environment"], content["results"]
    ours = results["fusedpo"]
    lines = [
        f"{ours['records'] / 1e6:.0f} million records, {env['cpu']}. Appending to LMDB and SQLite "
        "sorts, too; the store sorts when it merges, which took "
        f"{ours['merge']['wall_s']:.1f} s and "
        f"{ours['merge']['resident_peak_bytes'] / 2**20:.0f} MiB.",
        "",
        "| | append, records/s | lookup, keys/s | open, ms | bytes per record |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        lines.append(
            f"| {name} | {result['append']['per_s']:,.0f} | {result['lookup']['per_s']:,.0f} "
            f"| {1e3 * result['open']['wall_s']:.2f} | {result['bytes'] / result['records']:.0f} |"
        )
    lines += ["", f"From `{path.relative_to(ROOT)}`, commit `{env['commit'][:7]}`."]
    return "\n".join(lines)


# ---- GPU ----------------------------------------------------------------------------------------

PEERS = {"ours": "fusedpo", "trl": "TRL", "compile": "torch.compile", "eager": "eager"}
PEERS |= {"liger_ce": "Liger CE", "liger_dpo": "Liger DPO", "floor": "bare GEMMs"}


def milliseconds(result: dict[str, Any]) -> str:
    return f"{1e3 * result['median_s']:.1f}" if "median_s" in result else "-"


def gpu_table(folder: pathlib.Path) -> str:
    content = json.loads((folder / "head.json").read_text(encoding="utf-8"))
    env = content["environment"]
    completion = content["cases"][0]["size"]["completion"]
    lines = [
        f"{env['gpu']['name']}, torch {env['versions']['torch']}, TRL {env['versions']['trl']}, "
        f"Liger {env['versions']['liger-kernel']}. From hidden states, forward and backward, "
        f"{completion} completion tokens. Medians in milliseconds, extra memory in MB.",
        "",
        "| | " + " | ".join(PEERS.values()) + " | fusedpo MB | TRL MB |",
        "|---" * (len(PEERS) + 3) + "|",
    ]
    for case in content["cases"]:
        peers = case["peers"]
        cells = [milliseconds(peers.get(peer, {})) for peer in PEERS]
        for peer in ("ours", "trl"):
            memory = peers.get(peer, {}).get("memory")
            cells.append(f"{memory['extra_bytes'] / 1e6:.0f}" if memory else "-")
        lines.append("| " + " | ".join([case["case"].replace("/", ", "), *cells]) + " |")
    targets = folder / "targets.json"
    if targets.exists():
        lines += ["", "| target | floor | wanted | measured | met |", "|---|---|---|---|---|"]
        for row in json.loads(targets.read_text(encoding="utf-8"))["targets"]:
            value = row["measured"]
            measured = "never measured" if value is None else f"{value:.3g} {row['unit']}"
            lines.append(
                f"| {row['case']} | {row['floor']} | {row['target']} | {measured} "
                f"| {judge.verdict(row)} |"
            )
    lines += ["", f"From `{folder.relative_to(ROOT)}`, commit `{(env['commit'] or '?')[:7]}`."]
    return "\n".join(lines)


# ---- README.md ----------------------------------------------------------------------------------


def newest(benchmark: str, on_gpu: bool = False) -> pathlib.Path | None:
    """The newest result of a benchmark on a CPU or on a GPU."""
    dates = {}
    for path in RESULTS.glob(f"*/{benchmark}.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        environments = content.get("environments") or {benchmark: content["environment"]}
        env = next(iter(environments.values()))
        if bool(env.get("gpu")) == on_gpu and not content.get("rehearsal"):
            dates[path] = env["date"]
    return max(dates, key=lambda path: dates[path]) if dates else None


def updated(readme: str) -> str:
    makers = {
        "step": ("dpo_step", step_table),
        "head": ("head", readme_cpu.head_table),
        "logits": ("logits", readme_cpu.logits_table),
        "targets": ("targets", readme_cpu.targets_table),
        "store": ("store", store_table),
    }
    texts = {}
    for name, (benchmark, make) in makers.items():
        path = newest(benchmark)
        texts[name] = NO_FIGURE if path is None else make(path)
    gpu = newest("head", on_gpu=True)
    texts["gpu"] = NO_GPU_FIGURE if gpu is None else gpu_table(gpu.parent)
    for name, (begin, end) in MARKS.items():
        if begin in readme:
            before, rest = readme.split(begin)
            readme = f"{before}{begin}\n\n{texts[name]}\n\n{end}{rest.split(end)[1]}"
    return readme


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    outdated = 0
    for path in READMES:
        old = path.read_text(encoding="utf-8")
        new = updated(old)
        outdated += new != old
        if options.check:
            state = "is up to date" if new == old else "is not: run benchmarks.readme"
            print(path.relative_to(ROOT), state)
        else:
            path.write_text(new, encoding="utf-8")
    return int(options.check and outdated > 0)


if __name__ == "__main__":
    sys.exit(main())
