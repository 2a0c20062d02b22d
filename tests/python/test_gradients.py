"""Gradients of both operators against finite differences in float64 (torch.autograd.gradcheck)."""

from __future__ import annotations

import itertools

import fusedpo
import pytest
import torch
from logps_cases import IGNORE, leaf, make_head, make_logits

# Small: gradcheck evaluates twice per input entry. 7 columns leave a tail in every vector width.
ROWS, SIZE, VOCABULARY, RANK = 4, 3, 7, 2


def differentiable(out) -> tuple[torch.Tensor, ...]:
    return tuple(v for v in (out.logps, out.entropy) if v is not None)


# Whether other metrics are computed in the same pass must not touch the gradients.
METRIC_SETS = [
    (),
    ("entropy",),
    ("log_sum_sq_probs", "mean_logits", "is_top1"),
    ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
]


@pytest.mark.parametrize("metrics", METRIC_SETS, ids="+".join)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradcheck_of_token_logps(metrics, temperature):
    logits = leaf(make_logits(ROWS, VOCABULARY, seed=0, dtype=torch.float64) / 4)
    labels = torch.tensor([0, 6, IGNORE, 3])

    def function(x):
        return differentiable(
            fusedpo.token_logps(x, labels, temperature=temperature, metrics=metrics)
        )

    assert torch.autograd.gradcheck(function, (logits,))


@pytest.mark.parametrize("metrics", METRIC_SETS, ids="+".join)
@pytest.mark.parametrize(
    ("bias", "softcap", "logit_scale", "temperature", "lora"),
    list(itertools.product([False, True], [None, 2.0], [1.0, 0.5], [1.0, 0.6], [False, True])),
)
def test_gradcheck_of_linear_token_logps(metrics, bias, softcap, logit_scale, temperature, lora):
    head = make_head(ROWS, SIZE, VOCABULARY, 1, torch.float64, bias=bias, rank=RANK if lora else 0)
    labels = torch.tensor([0, 6, IGNORE, 3])
    inputs = [head.hidden, head.weight]
    inputs += [head.bias] if bias else []
    inputs += head.lora[:2] if lora else []

    def function(hidden, weight, *rest):
        rest = list(rest)
        return differentiable(
            fusedpo.linear_token_logps(
                hidden,
                weight,
                labels,
                bias=rest.pop(0) if bias else None,
                temperature=temperature,
                softcap=softcap,
                logit_scale=logit_scale,
                metrics=metrics,
                lora=(*rest, 0.5) if lora else None,
            )
        )

    assert torch.autograd.gradcheck(function, [leaf(t) for t in inputs])


@pytest.mark.parametrize("entropy", [False, True])
# Frozen; trained but recomputing all; trained with room for two rows.
@pytest.mark.parametrize(
    ("trained", "budget"), [(False, None), (True, 0), (True, 2 * VOCABULARY * 8)]
)
def test_gradcheck_of_the_frozen_and_the_recomputing_path(trained, budget, entropy):
    head = make_head(ROWS, SIZE, VOCABULARY, seed=2, dtype=torch.float64)
    labels = torch.tensor([5, 1, IGNORE, 2])
    metrics = ("entropy",) if entropy else ()
    weight = leaf(head.weight) if trained else head.weight

    def function(hidden, weight):
        return differentiable(
            fusedpo.linear_token_logps(
                hidden, weight, labels, metrics=metrics, logits_budget_bytes=budget
            )
        )

    assert torch.autograd.gradcheck(function, (leaf(head.hidden), weight))
