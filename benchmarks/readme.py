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
from collections.abc import Mapping
from typing import Any

from benchmarks import common, judge, readme_cpu
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
    env, cases = content["environment"], _in_order(content["cases"])
    layers = sorted({case["case"]["layers"] for case in cases})
    lines = [
        "Whole steps of DPO on real prompts, Qwen2.5-0.5B's shape with "
        f"{' or '.join(map(str, layers))} of its 24 layers. {readme_cpu.machine(env)}. "
        "How many times faster than TRL's a step is (in brackets: with 24 layers, at the measured "
        "time per layer) and its peak memory above the weights as a share of TRL's.",
        "",
    ]
    names = [name for name in dict.fromkeys(n for c in cases for n in c["runs"]) if name != "trl"]
    body = []
    for case in cases:
        what, runs = case["case"], case["runs"]
        title = _title(case) + (f", {what['layers']} layers" if len(layers) > 1 else "")
        cells = [_step_cell(runs.get(name, {})) for name in names]
        cells += [_backbone_cell(runs.get("shared", {})), _shared_cell(runs)]
        body.append([title, f"{runs['trl']['step']['median_s']:.1f}", *cells])
    header = ["data, pairs per step, trained, precision", "TRL s/step", *names]
    lines += readme_cpu.rows(
        [*header, "shared: backbone", "shared+store against fused+store"], body
    )
    return "\n".join(
        [
            *lines,
            "",
            "Backbone: how many times faster the decoder layers of `shared` are than TRL's, for "
            "how many times fewer tokens; both score the reference in every step, too. The last "
            "column is what shared prompts alone bring to a step.",
            "",
            readme_cpu.sources(path, common.commits_of(content | {"cases": cases}, _title)),
        ]
    )


def _in_order(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """File by file, whatever was measured first."""
    files = list(dict.fromkeys(case["file"] for case in cases))

    def key(case: dict[str, Any]) -> tuple[Any, ...]:
        what = case["case"]
        return (
            files.index(case["file"]),
            what["pairs"],
            what["dtype"] != "fp32",
            what["train"] != "lora",
        )

    return sorted(cases, key=key)


def _title(case: Mapping[str, Any]) -> str:
    what = case["case"]
    return f"{case['file']}, {what['pairs']}, {what['train']}, {DTYPES[what['dtype']]}"


def _step_cell(run: dict[str, Any]) -> str:
    if "step" not in run:
        return "-"
    deep = run.get("faster_with_24_layers")
    deep = "" if deep is None else f" ({deep:.1f}x)"
    return f"{run['faster']:.1f}x{deep}, {run['memory_share']:.2f}"


def _backbone_cell(shared: dict[str, Any]) -> str:
    if "step" not in shared:
        return "-"
    return f"{shared['backbone_faster']:.1f}x for {shared['fewer_tokens']:.1f}x fewer tokens"


def _shared_cell(runs: dict[str, dict[str, Any]]) -> str:
    ours, padded = runs.get("shared+store", {}), runs.get("fused+store", {})
    if "step" not in ours or "step" not in padded:
        return "-"
    cell = f"{padded['step']['median_s'] / ours['step']['median_s']:.1f}x"
    if "step_of_24_layers_s" in ours:
        cell += f" ({padded['step_of_24_layers_s'] / ours['step_of_24_layers_s']:.1f}x)"
    return cell


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
    if (folder / "dpo_step.json").exists():
        lines += ["", step_table(folder / "dpo_step.json")]
    return "\n".join(lines)


# ---- README.md ----------------------------------------------------------------------------------


def results(benchmark: str, on_gpu: bool = False) -> list[pathlib.Path]:
    """The results of a benchmark on CPUs or on GPUs, the newest first."""
    dates = {}
    for path in RESULTS.glob(f"*/{benchmark}.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        environments = content.get("environments") or {benchmark: content["environment"]}
        found = environments.values()
        if any(env.get("gpu") for env in found) == on_gpu and not content.get("rehearsal"):
            dates[path] = max(env["date"] for env in found)
    return sorted(dates, key=lambda path: dates[path], reverse=True)


def updated(readme: str) -> str:
    """The README with new tables: of every machine's results, but of the newest store's only."""
    makers = {
        "step": ("dpo_step", step_table),
        "head": ("head", readme_cpu.head_table),
        "logits": ("logits", readme_cpu.logits_table),
        "targets": ("targets", readme_cpu.targets_table),
        "store": ("store", store_table),
    }
    texts = {}
    for name, (benchmark, make) in makers.items():
        paths = results(benchmark)[: 1 if name == "store" else None]
        texts[name] = "\n\n".join(map(make, paths)) or NO_FIGURE
    gpus = results("head", on_gpu=True)
    texts["gpu"] = gpu_table(gpus[0].parent) if gpus else NO_GPU_FIGURE
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
