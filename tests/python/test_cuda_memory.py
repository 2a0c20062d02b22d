"""Peaks of a GPU's memory, and more logits than 2^31.

In a rehearsal (FUSEDPO_TEST_DEVICE=cpu, see cuda_cases.py) the same bodies run with smaller sizes.
"""

from __future__ import annotations

import fusedpo
import pytest
import torch
from cuda_cases import (  # noqa: F401  a fixture
    DEVICE,
    EMULATED,
    ON_GPU,
    Profile,
    arrives_late,
    captured,
    need_device,
    on_device,
    peak_bytes,
    side_stream,
    synchronize,
)
from fusedpo import reference
from logps_cases import (
    IGNORE,
    METRICS,
    autocast,
    leaf,
    make_head,
    make_logits,
    same_bits,
)

need_device()
pytestmark = pytest.mark.usefixtures("on_device")

# ---- memory -------------------------------------------------------------------------------------

MB, GB = 10**6, 10**9
# On a GPU the sizes and bounds of the target (Llama-3-8B's head, 8192 completion tokens).
N, H, V = (8192, 4096, 128_256) if ON_GPU else (1000, 64, 50_000)
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
BLOCKS = int(1.3 * GB) if ON_GPU else 40 * MB
BUDGET = int(2.5 * 2**30) if ON_GPU else 80 * MB
LOGITS = N * V * DTYPE.itemsize
needs_memory = pytest.mark.skipif(
    ON_GPU and torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24 * GB,
    reason="needs 24 GB of free GPU memory",
)


def large_problem():
    hidden = torch.randn(2, N, H, dtype=DTYPE)
    weight = torch.randn(V, H, dtype=DTYPE) / H**0.5
    labels = torch.randint(V, (2, N))
    labels[:, : N // 2] = IGNORE  # prompts: half of 2 N positions
    return hidden, weight, labels


@needs_memory
def test_the_measurement_sees_the_logits_of_the_plain_expression():
    hidden, weight, labels = large_problem()
    kept = hidden[labels != IGNORE]
    assert peak_bytes(lambda: (kept @ weight.T).log_softmax(-1)) >= 2 * LOGITS


@needs_memory
@pytest.mark.parametrize("cast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("head", ["no gradient", "frozen", "trained", "trained without budget"])
def test_peak_memory_is_bounded(head, cast):
    hidden, weight, labels = large_problem()
    if cast:
        hidden, weight = hidden.float(), weight.float()
    gradients = 0
    if head != "no gradient":
        hidden.requires_grad_()
        gradients += hidden.numel() * hidden.itemsize
    if head.startswith("trained"):
        weight.requires_grad_()
        gradients += weight.numel() * weight.itemsize
    budget = {"no gradient": 0, "frozen": 0, "trained": BUDGET, "trained without budget": 0}[head]

    def step():
        options = {"logits_budget_bytes": budget} if head.startswith("trained") else {}
        with autocast(enabled=cast):
            out = fusedpo.linear_token_logps(hidden, weight, labels, **options)
        if head != "no gradient":
            out.logps.sum().backward()

    allowed = BLOCKS + budget + gradients
    if head.startswith("trained"):
        allowed += V * H * 4  # the fp32 accumulator
    assert peak_bytes(step) < allowed


@needs_memory
@pytest.mark.parametrize("inplace", [False, True])
def test_log_probs_of_logits_hold_at_most_their_gradient(inplace):
    logits = torch.randn(N, V, dtype=DTYPE, requires_grad=True) * 1
    labels = torch.randint(V, (N,))

    def forward():
        return fusedpo.token_logps(logits, labels, metrics=METRICS, inplace_backward=inplace)

    assert peak_bytes(forward) < 10 * MB
    out = forward()
    peak = peak_bytes(lambda: torch.autograd.grad(out.logps.sum(), logits))
    assert peak < (10 * MB if inplace else LOGITS + 10 * MB)


# ---- more than 2^31 logits ----------------------------------------------------------------------


@needs_memory
@pytest.mark.parametrize("inplace", [False, True])
def test_every_row_of_more_than_2_to_the_31_logits_has_its_gradient(inplace):
    vocabulary = 151_936 if ON_GPU else 1519
    rows = (2**31 if ON_GPU else 2**19) // vocabulary + 50
    few = make_logits(7, vocabulary, seed=1, dtype=torch.bfloat16)
    pattern = torch.arange(rows) % 7
    few_labels = torch.arange(7) * (vocabulary // 7)
    logits, labels = few[pattern], few_labels[pattern]
    logits.requires_grad_()
    small = leaf(few)
    expected = fusedpo.token_logps(small, few_labels, metrics=METRICS)
    (small_gradient,) = torch.autograd.grad(expected.logps.sum(), small)
    scored = logits * 1 if inplace else logits
    out = fusedpo.token_logps(scored, labels, metrics=METRICS, inplace_backward=inplace)
    for mine, his in zip(out, expected, strict=True):
        assert same_bits(mine, his[pattern])
    (gradient,) = torch.autograd.grad(out.logps.sum(), scored)
    for start in range(0, rows, 1000):  # a comparison of all at once would need as much again
        part = slice(start, start + 1000)
        assert torch.equal(gradient[part], small_gradient[pattern[part]])


@needs_memory
def test_more_than_2_to_the_31_logits_behind_a_trained_head():
    # Offsets past 2^31 in every buffer that holds logits.
    vocabulary, size = (151_936, 64) if ON_GPU else (1519, 16)
    rows = (2**31 if ON_GPU else 2**19) // vocabulary + 50
    head = make_head(rows, size, vocabulary, seed=3, dtype=torch.bfloat16)
    hidden, weight = leaf(head.hidden), leaf(head.weight)
    budget = 5 * 2**30 if ON_GPU else 2**20
    out = fusedpo.linear_token_logps(hidden, weight, head.labels, logits_budget_bytes=budget)
    c = torch.zeros(rows)
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    c[some] = torch.tensor([1.0, -0.5, 2.0, 0.25, -1.0])
    gradients = torch.autograd.grad(out.logps, [hidden, weight], c)
    x, w = leaf(head.hidden[some].double()), leaf(head.weight.double())
    exact = reference.linear_token_logps(x, w, head.labels[some]).logps
    want = torch.autograd.grad(exact, [x, w], c[some].double())
    assert (out.logps[some].double() - exact).abs().max().item() < 0.1
    for mine, his in ((gradients[0][some], want[0]), (gradients[1], want[1])):
        assert ((mine.double() - his).norm() / his.norm()).item() < 0.02
    zero = torch.ones(rows, dtype=torch.bool)
    zero[some] = False
    assert not gradients[0][zero].any()
