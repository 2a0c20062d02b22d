"""Figures of imaginary runs of the step benchmark; `benchmarks` must be importable when called."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
needs_project = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "dpo_step.py").exists(), reason="needs the project's own folder"
)


@pytest.fixture(scope="module")
def project_on_path() -> Iterator[None]:
    """`benchmarks` is importable from the project's folder only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield


ENVIRONMENT = {
    "date": "2026-01-01T00:00:00+00:00",
    "cpu": "A CPU",
    "flags": ["avx2"],
    "cpus": 2,
    "threads": 2,
    "versions": {"torch": "2.13.0", "trl": "1.16.0"},
    "commit": "0123456789abcdef",
}
LOGGED = {
    "loss": 0.5,
    "entropy": 4.0,
    "logps/chosen": -200.0,
    "rewards/margins": 0.0,
    "rewards/accuracies": 0.5,
    "learning_rate": 1e-4,
    "epoch": 0.5,
}


def case(**changes: Any) -> Any:
    """A case of the benchmark."""
    from benchmarks.dpo_step_run import Case

    default = {"data": "pairs.jsonl", "tokenizer": "tokens", "pairs": 4, "train": "lora"}
    default |= {"dtype": "fp32", "layers": 4, "steps": 3, "device": "cpu"}
    return Case(**default | changes)


def run_of(
    step: float = 10.0,
    backbone: float = 4.0,
    tokens: int = 800,
    extra: float = 4e9,
    entropy: float = 4.0,
) -> dict[str, Any]:
    """What a contestant's process reports."""
    return {
        "logs": [LOGGED | {"entropy": entropy}],
        "products": ["float32"],
        "step": {"median_s": step},
        "backbone_s": backbone,
        "tokens": {"computed": tokens, "per_s": tokens / step},
        "peak_bytes": extra + 2e9,
        "extra_bytes": extra,
    }


def imaginary_cases(train: Any = ("lora", "full"), missing: Any = (), **changes: Any) -> Any:
    """Cases of a run that meets each target, with some contestants' figures changed."""
    from benchmarks import dpo_step, targets_step

    cases = []
    for file in targets_step.FILES:
        for trained in train:
            runs = {
                "trl": run_of(),
                "fused+store": run_of(4.0, 3.0),
                "shared": run_of(3.0, 2.0, 400, 2e9),
                "shared+store": run_of(2.0, 1.0, 400, 2e9),
            }
            for name, change in changes.items():
                runs[name.replace("_", "+")].update(change)
            each = case(data=f"{file}.jsonl", train=trained)
            for run in runs.values():
                dpo_step.compare(run, runs["trl"], each)
            kept = {name: run for name, run in runs.items() if name not in missing}
            found = {"file": file, "commit": ENVIRONMENT["commit"], "case": each._asdict()}
            cases.append(found | {"runs": kept})
    return {"environment": ENVIRONMENT, "cases": cases}
