"""A tiny model and a data set on disk, and what a run of precompute left behind."""

from __future__ import annotations

import json
import pathlib
from typing import Any, NamedTuple

import torch
from fusedpo import RefStore
from fusedpo._precompute.records import Record
from trl_helpers import make_model, make_pairs, make_tokenizer


class Inputs(NamedTuple):
    model: str
    data: str


def write_inputs(folder: pathlib.Path, rows: int = 60, family: str = "llama") -> Inputs:
    """A checkpoint with its tokenizer, and pairs as JSON lines."""
    make_model(family).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return Inputs(str(folder / "model"), write_pairs(folder / "pairs.jsonl", make_pairs(rows)))


def write_pairs(path: pathlib.Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def snapshot_bytes(path: str | pathlib.Path) -> bytes:
    """Merge the store and return its one snapshot; nothing else may be left."""
    report = RefStore(path, "a").merge(abandoned=True)
    files = sorted(each.name for each in pathlib.Path(path).iterdir())
    assert files == sorted(["identity.json", str(report.snapshot)]), files
    return (pathlib.Path(path) / str(report.snapshot)).read_bytes()


def contents(path: str | pathlib.Path) -> dict[bytes, float]:
    """Every record of a store: key -> sum of log-probs."""
    return {
        key.tobytes(): float(logp)
        for keys, logps, *_ in RefStore(path).batches()
        for key, logp in zip(keys, logps, strict=True)
    }


class Exact(NamedTuple):
    """A completion under a model in float64: the sum, and what rounding errors are measured by."""

    logp: float
    scale: float  # sum of |logp_t| + the largest |logit|


def exact(model: Any, record: Record) -> Exact:
    """Score with transformers' own forward and log_softmax, in float64, without batch or padding.

    `model` is in float64."""
    ids = torch.tensor([record.prompt.tolist() + record.completion.tolist()])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    rows = slice(ids.shape[1] - 1 - record.num_tokens, None)
    token_logps = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[rows]
    logp = float(token_logps.sum())
    return Exact(logp, float(token_logps.abs().sum() + logits[rows].abs().max()))
