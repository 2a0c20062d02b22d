"""The two operators as objects with the same call, for tests that promise the same of both."""

from __future__ import annotations

import fusedpo
import pytest
import torch
from logps_cases import METRICS, generator, leaf, make_head, make_labels, make_logits

# A vocabulary that no vector width, segment or tile divides, and wider than one GEMM tile.
ODD_VOCABULARY = 5003


class TokenCase:
    """token_logps on 21 rows; `inputs` are the differentiable ones."""

    name = "token_logps"

    def __init__(self, dtype=torch.float32, rows=21, ignored=0.3, vocabulary=ODD_VOCABULARY):
        self.inputs = [make_logits(rows, vocabulary, seed=1, dtype=dtype)]
        self.labels = make_labels(rows, vocabulary, seed=1, ignored=ignored)

    def __call__(self, inputs=None, labels=None, **options):
        (logits,) = self.inputs if inputs is None else inputs
        options.setdefault("temperature", 0.9)
        return fusedpo.token_logps(logits, self.labels if labels is None else labels, **options)


class LinearCase:
    """linear_token_logps with a trained head and a bias on 21 rows."""

    name = "linear_token_logps"

    def __init__(self, dtype=torch.float32, rows=21, ignored=0.3, vocabulary=ODD_VOCABULARY):
        head = make_head(rows, 16, vocabulary, seed=1, dtype=dtype, bias=True, ignored=ignored)
        self.inputs = [head.hidden, head.weight, head.bias]
        self.labels = head.labels

    def __call__(self, inputs=None, labels=None, **options):
        hidden, weight, bias = self.inputs if inputs is None else inputs
        labels = self.labels if labels is None else labels
        options = {"temperature": 0.9, "softcap": 30.0, **options}
        return fusedpo.linear_token_logps(hidden, weight, labels, bias=bias, **options)


both = pytest.mark.parametrize("case_type", [TokenCase, LinearCase], ids=lambda c: c.name)


def upstream(shape, seed=3):
    return torch.randn(shape, generator=generator(seed))


def forward_and_gradients(case, inputs=None, labels=None, **options):
    """All outputs, and the gradients of a random combination of logps and entropy."""
    leaves = [leaf(t) for t in (case.inputs if inputs is None else inputs)]
    out = case(leaves, labels, metrics=METRICS, **options)
    loss = (
        upstream(out.logps.shape) * out.logps + upstream(out.logps.shape, 4) * out.entropy
    ).sum()
    return tuple(v.detach() for v in out), torch.autograd.grad(loss, leaves)
