"""Scoring: records in, log-probs of their completion tokens out.

One forward of the backbone per batch: one packed row (`fusedpo._packing`), or padded on the right
as TRL pads. The head runs on completion rows only (`fusedpo._head`), and sums over tokens are
formed in float64.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedpo._packing.layout import Group, pack
from fusedpo._packing.names import takes_packed_rows

from .records import Record

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}


def autocast_dtype(name: str) -> torch.dtype | None:
    """Return the dtype that `name` stands for; "auto" is what TRL's DPOConfig trains with."""
    if name == "auto":
        return torch.bfloat16
    if name not in AUTOCAST:
        raise ValueError(f"autocast must be auto, bf16, fp16 or no; got {name!r}.")
    return AUTOCAST[name]


@contextlib.contextmanager
def scoring_mode(
    model: Any, autocast: torch.dtype | None, *, inference_mode: bool
) -> Iterator[None]:
    """No gradient, no dropout, autocast as told; modes of all modules are restored.

    `inference_mode` is for models that are used for nothing else: tensors that a model keeps from
    such a forward (the frequencies of some rotary embeddings) cannot take part in a training.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    gradless = torch.inference_mode() if inference_mode else torch.no_grad()
    device = next(model.parameters()).device.type
    try:
        with gradless, torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the random states of torch, numpy and Python as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def score(model: Any, records: Sequence[Record], pad_token_id: int) -> list[NDArray[np.float32]]:
    """Return the log-probs of each record's completion tokens, in nats, float32 [num_tokens].

    `model` has the fused head; call within `scoring_mode`.
    """
    device = next(model.parameters()).device
    if takes_packed_rows(model):
        return _score_packed(model, records, device)
    ids, attention, labels = _padded(records, pad_token_id)
    log_probs: Tensor = model(
        input_ids=ids.to(device),
        attention_mask=attention.to(device),
        labels=labels.to(device),
        use_cache=False,
        fused_lm_head=True,
    ).log_probs
    # Prompt learning puts virtual tokens in front.
    values = log_probs[:, -(ids.shape[1] - 1) :].float().cpu().numpy()
    return [
        values[i, record.length - 1 - record.num_tokens : record.length - 1]
        for i, record in enumerate(records)
    ]


def _score_packed(
    model: Any, records: Sequence[Record], device: torch.device
) -> list[NDArray[np.float32]]:
    places: dict[bytes, list[int]] = {}
    for i, record in enumerate(records):
        places.setdefault(record.prompt.tobytes(), []).append(i)
    row = pack(
        [
            Group(records[members[0]].prompt, [records[i].completion for i in members])
            for members in places.values()
        ]
    )
    log_probs = model(packed=row.to(device), use_cache=False, fused_lm_head=True).log_probs
    values = np.split(log_probs.float().cpu().numpy(), np.cumsum(row.counts)[:-1])
    order = [i for members in places.values() for i in members]
    by_record = dict(zip(order, values, strict=True))
    return [by_record[i] for i in range(len(records))]


def sums(token_logps: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Sum each record's log-probs in float64, [N] nats."""
    return np.array([values.sum(dtype=np.float64) for values in token_logps], np.float64)


def _padded(records: Sequence[Record], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and labels [N, T]; labels are -100 on prompts and padding."""
    shape = len(records), max(record.length for record in records)
    ids = torch.full(shape, pad_token_id)
    attention = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for i, (prompt, completion) in enumerate(records):
        end = len(prompt) + len(completion)
        ids[i, : len(prompt)] = torch.from_numpy(prompt)
        ids[i, len(prompt) : end] = torch.from_numpy(completion)
        labels[i, len(prompt) : end] = ids[i, len(prompt) : end]
        attention[i, :end] = 1
    return ids, attention, labels
