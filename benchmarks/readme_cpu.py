"""The tables of the CPU benchmarks, made from their JSON alone."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks import judge
from benchmarks.common import ROOT, commits_of
from benchmarks.contest import timed
from benchmarks.head import CENTRE
from benchmarks.logits_cpu import CENTRE as LOGITS_CENTRE

DTYPES = {"fp32": "fp32", "bf16": "bf16", "amp": "fp32 under bf16 autocast"}
HEADS = {"frozen": "head frozen", "trained": "head trained", "nograd": "no gradient"}
PEERS = {
    "ours": "fusedpo",
    "trl": "TRL",
    "eager": "eager",
    "compile": "torch.compile",
    "torch_chunked": "torch chunked",
    "liger_dpo": "Liger DPO",
    "floor": "bare GEMMs",
    "floor_fp32": "the same in fp32",
}
LOGITS_PEERS = {
    "forward": {
        "ours": "fusedpo, log-probs",
        "eager": "eager, log-probs",
        "compile": "torch.compile, log-probs",
        "ours_all": "fusedpo, all five",
        "trl": "TRL <= 1.14, all five",
        "compile_all": "torch.compile, all five",
        "floor": "read of the bytes",
    },
    "backward": {
        "ours": "fusedpo",
        "ours_inplace": "fusedpo in place",
        "eager": "eager",
        "compile": "torch.compile",
        "trl": "TRL <= 1.14, all five",
        "floor": "read, read and write",
        "floor_inplace": "the same in place",
    },
}


def load(path: pathlib.Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def duration(result: Mapping[str, Any], unit: float = 1.0) -> str:
    if not timed(result):
        return "-"
    value = unit * result["median_s"]
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}" + ("\\*" if "extrapolated_from_V" in result else "")


def machine(env: Mapping[str, Any]) -> str:
    cpu = f"{env['cpu']}, {env['threads']} threads, {' '.join(env['flags'])}"
    return (
        f"{env['gpu']['name'] if env.get('gpu') else cpu}; torch "
        f"{env['versions']['torch']}, TRL {env['versions']['trl']}"
    )


def sources(path: pathlib.Path, commits: Mapping[str, Iterable[str | None]]) -> str:
    """Where a table comes from; `commits` by the name of what was measured at them."""
    names: dict[str, list[str]] = {}
    for name, found in commits.items():
        for commit in found:
            names.setdefault((commit or "?")[:7], []).append(name)
    if len(names) == 1:
        return f"From `{path.relative_to(ROOT)}`, commit `{next(iter(names))}`."
    at = (f"At commit `{commit}`: {'; '.join(found)}." for commit, found in names.items())
    return " ".join([f"From `{path.relative_to(ROOT)}`.", *at])


def name_of(case: Mapping[str, Any]) -> str:
    name: str = case["name"]
    return name


def rows(header: list[str], body: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *body]
    return ["| " + " | ".join(line) + " |" for line in lines]


def head_table(path: pathlib.Path) -> str:
    content = load(path)
    env = content["environment"]
    cases = {case["name"]: case for case in content["cases"] if "name" in case}
    found = [cases[case.name] for case in CENTRE if case.name in cases]
    memory_path = path.with_name("memory.json")
    names = [peer for peer in PEERS if any(peer in case["peers"] for case in found)]
    body = [
        [f"{DTYPES[case['dtype']]}, {HEADS[case['head']]}"]
        + [duration(case["peers"].get(peer, {})) for peer in names]
        for case in found
    ]
    cells = [cell for line in body for cell in line]
    scaled = any("\\*" in cell for cell in cells)
    text = [
        "512 positions, 256 of them completion, H = 896, V = 151,936 (Qwen2.5-0.5B's), with the "
        f"metrics TRL logs. {machine(env)}. Medians in seconds.",
        "",
        *rows(["", *(PEERS[name] for name in names)], body),
        "",
        "TRL and Liger score all positions; eager (`log_softmax` of the logits), torch.compile of "
        "it and torch's chunked `linear_cross_entropy` the completion rows only, without metrics. "
        "Bare GEMMs are the matrix products alone, into buffers that exist."
        + (
            " -: not measured, or it does not run here and the JSON says why."
            if "-" in cells
            else ""
        )
        + (" \\*: measured on a part of the vocabulary and scaled up." if scaled else ""),
    ]
    if memory_path.exists():
        text += ["", *memory_table(load(memory_path))]
    shown = {**content, "cases": found}
    return "\n".join([*text, "", sources(path, commits_of(shown, name_of))])


def memory_table(content: Mapping[str, Any]) -> list[str]:
    cases = [case for case in content["cases"] if case["level"] == "hidden"]
    names = [peer for peer in PEERS if any(peer in case["peers"] for case in cases)]
    body = []
    for case in cases:
        extra = [case["peers"].get(peer, {}).get("extra_bytes") for peer in names]
        cells = ["-" if value is None else f"{value / 1e6:,.0f}" for value in extra]
        body.append([f"{DTYPES[case['dtype']]}, {HEADS[case['head']]}", *cells])
    return [
        "Peak extra memory in MB, results included, with 4096 completion rows:",
        "",
        *rows(["", *(PEERS[name] for name in names)], body),
    ]


def logits_table(path: pathlib.Path) -> str:
    content = load(path)
    env = content["environment"]
    cases = {case["name"]: case for case in content["cases"]}
    text = [
        f"Logits that exist, 256 x 151,936. {machine(env)}. Medians in milliseconds.",
    ]
    for way, peers in LOGITS_PEERS.items():
        found = [cases[c.name] for c in LOGITS_CENTRE if c.way == way and c.name in cases]
        title = {"forward": "forward", "backward": "forward + backward"}[way]
        body = [
            [label, *(duration(case["peers"].get(peer, {}), 1e3) for case in found)]
            for peer, label in peers.items()
        ]
        text += ["", *rows([title, *(case["dtype"] for case in found)], body)]
    shown = {**content, "cases": [cases[c.name] for c in LOGITS_CENTRE if c.name in cases]}
    return "\n".join([*text, "", sources(path, commits_of(shown, name_of))])


def measured(row: Mapping[str, Any]) -> str:
    value = row["measured"]
    return "-" if value is None else f"{value:.3g} {row['unit']}".strip()


def step_targets(targets: list[Mapping[str, Any]]) -> list[str]:
    """Targets that each case has as a table with one column for each; in brackets what is shown
    beside a figure, unless it is the same."""
    if all(row["measured"] is None for row in targets):
        return ["Whole training steps (`dpo_step`): not measured."]
    kinds = {row["cell"][1]: row for row in targets}
    body: dict[str, list[str]] = {}
    for row in targets:
        beside = [f"{v:.3g}" for v in row.get("beside", {}).values() if v != row["measured"]]
        texts = [measured(row)]
        if row["measured"] is not None:
            texts += [f"({', '.join(beside)})"] if beside else []
            texts.append(judge.verdict(row))
        body.setdefault(row["cell"][0], []).append(" ".join(texts))
    return [
        "Whole training steps (`dpo_step`, contestants there).",
        "",
        *rows(
            ["", *(f"{kind}, {row['target']}" for kind, row in kinds.items())],
            [[case, *cells] for case, cells in body.items()],
        ),
        "",
        "Backbone: how many times faster `shared` is than TRL, over how many times fewer tokens it "
        "computes; both are in brackets. Step: `shared+store`; with LoRA the smaller of two ratios "
        "counts, as measured and with the time of 24 layers, and the other is in brackets. Memory: "
        "the peak of `shared+store` above the weights; in brackets that of the whole process.",
    ]


def targets_table(path: pathlib.Path) -> str:
    content = load(path)
    env = next(iter(content["environments"].values()))
    alone = [row for row in content["targets"] if "cell" not in row]
    of_steps = [row for row in content["targets"] if "cell" in row]
    body = [
        [
            row["case"],
            row["target"],
            measured(row),
            f"{row['at_floor']:.3g}" if "at_floor" in row else "",
            judge.verdict(row),
        ]
        for row in alone
        if row["measured"] is not None
    ]
    missing = len(alone) - len(body)
    images = [
        f"![{image.stem}]({image.relative_to(ROOT / 'benchmarks')})"
        for image in sorted(path.parent.glob("*.png"))
    ]
    return "\n".join(
        [
            f"{machine(env)}.",
            "",
            *rows(["", "target", "measured", "at the floor", "verdict"], body),
            "",
            "At the floor: what the ratio would be if fusedpo took as long as the bare matrix "
            "products, or as torch takes to move the bytes once, in the same run."
            + (f" {missing} more targets were not measured on this machine." if missing else ""),
            "",
            *([*step_targets(of_steps), ""] if of_steps else []),
            *images,
            "",
            sources(path, content["commits"]),
        ]
    )
