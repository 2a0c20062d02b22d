"""python -m benchmarks.readme: writes README's table from benchmarks/results/<machine>/head.json.

Without an argument it rewrites README.md; with --check it only says whether README.md is up to date
(exit status 1 if not).
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from benchmarks.common import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN = "<!-- head: from benchmarks/results by `python -m benchmarks.readme` -->"
END = "<!-- /head -->"
DTYPES = {"fp32": "fp32", "bf16": "bf16", "amp": "fp32 under bf16 autocast"}
HEADS = {"frozen": "head frozen", "trained": "head trained", "nograd": "no gradient"}


def seconds(result: dict[str, Any]) -> str:
    if "median_s" not in result:
        return "-"
    mark = "*" if "extrapolated_from_V" in result else ""
    value = result["median_s"]
    return (f"{value:.2f}" if value < 10 else f"{value:.0f}") + mark


def mebibytes(result: dict[str, Any]) -> str:
    extra = result.get("memory", {}).get("extra_bytes")
    return "-" if extra is None else f"{extra / 2**20:.0f}"


def table(path: pathlib.Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    env, size = content["environment"], content["size"]
    lines = [
        f"{size['positions']} positions, {size['completion']} of them completion, "
        f"H = {size['H']}, V = {size['V']:,} (Qwen2.5-0.5B's), forward and backward, with the "
        f"metrics TRL logs. {env['cpu']}, {env['threads']} threads, {' '.join(env['flags'])}; "
        f"torch {env['versions']['torch']}, TRL {env['versions']['trl']}. "
        "Medians in seconds, peak extra memory in MiB.",
        "",
        "| | fusedpo | TRL | eager | bare GEMMs | the same in fp32 "
        "| fusedpo MiB | TRL MiB | eager MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in content["cases"]:
        peers = case["peers"]
        floors = ("floor", "floor_fp32" if "floor_fp32" in peers else "floor")
        cells = [seconds(peers[name]) for name in ("ours", "trl", "eager", *floors)]
        cells += [mebibytes(peers[name]) for name in ("ours", "trl", "eager")]
        title = f"{DTYPES[case['dtype']]}, {HEADS[case['head']]}"
        lines.append("| " + " | ".join([title, *cells]) + " |")
    if any("*" in line for line in lines):
        lines += [
            "",
            "\\* Measured on a part of the vocabulary and scaled up: this CPU has no bf16 "
            "instructions, and torch's bf16 products are very slow without them. fusedpo "
            "multiplies widened tiles in fp32 there, so the floor in fp32 is what bounds it.",
        ]
    lines += [
        "",
        "TRL scores all positions; eager (`log_softmax` of the logits) the completion rows only, "
        "without metrics. Bare GEMMs are the matrix products alone, into buffers that exist.",
    ]
    lines += ["", f"From `{path.relative_to(ROOT)}`, commit `{env['commit'][:7]}`."]
    return "\n".join(lines)


def updated(readme: str, text: str) -> str:
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    found = sorted(RESULTS.glob("*/head.json"))
    if not found:
        print("no benchmarks/results/*/head.json: run python -m benchmarks.head first")
        return 1
    newest = max(found, key=lambda p: json.loads(p.read_text())["environment"]["date"])
    old = README.read_text(encoding="utf-8")
    new = updated(old, table(newest))
    if options.check:
        print(
            "README.md is up to date" if new == old else "README.md is not: run benchmarks.readme"
        )
        return int(new != old)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
