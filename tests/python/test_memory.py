"""Peak extra memory: the high-water mark of a new process over what it held before the call.

Promised: O(row block x V) + [N, H], plus the budget and the weight's gradient when the weight is
trained. The sizes are such that the logits of the batch (200 MB) would stick out.
"""

from __future__ import annotations

import json
import pathlib
import sys

import pytest
from logps_cases import needs_native, run_python

pytestmark = [
    needs_native,
    pytest.mark.skipif(
        not sys.platform.startswith("linux"),
        reason="the high-water mark of a process can be reset on Linux only",
    ),
]

ROWS, SIZE, VOCABULARY = 1000, 64, 50_000
MB = 1_000_000
ROOT = str(pathlib.Path(__file__).resolve().parents[2])
LOGITS = ROWS * VOCABULARY * 4
WEIGHT = VOCABULARY * SIZE * 4
BUDGET = 80 * MB
# Blocks of logits and of the weight, [N, H] a few times, and what an allocator keeps for itself.
BLOCKS = 40 * MB

SCRIPT = f"""
import json, sys
sys.path.insert(0, {ROOT!r})
import torch, fusedpo
from benchmarks.common import PeakMemory
from fusedpo import reference

ROWS, SIZE, VOCABULARY, BUDGET = {ROWS}, {SIZE}, {VOCABULARY}, {BUDGET}

def peak(call):
    with PeakMemory() as memory:
        held = call()
    return memory.extra_bytes

def linear(function, grad, rows=ROWS, dtype=torch.float32, cast=False, **options):
    hidden = torch.randn(rows, SIZE).to(dtype).requires_grad_("h" in grad)
    weight = torch.randn(VOCABULARY, SIZE).to(dtype).requires_grad_("w" in grad)
    labels = torch.randint(VOCABULARY, (rows,))
    def call():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=cast):
            out = function(hidden, weight, labels, **options)
        if grad:
            out.logps.sum().backward()
        return out
    return call

def token(grad, inplace):
    logits = torch.randn(ROWS, VOCABULARY, requires_grad=grad)
    logits = logits * 1 if grad else logits
    labels = torch.randint(VOCABULARY, (ROWS,))
    def call():
        out = fusedpo.token_logps(logits, labels, inplace_backward=inplace)
        return torch.autograd.grad(out.logps.sum(), logits) if grad else out
    return call

ours = fusedpo.linear_token_logps
linear(ours, "hw", rows=8)()  # libraries and thread pools
results = dict(
    reference=peak(linear(reference.linear_token_logps, "")),
    no_gradient=peak(linear(ours, "")),
    frozen=peak(linear(ours, "h")),
    frozen_bf16=peak(linear(ours, "h", dtype=torch.bfloat16)),
    frozen_autocast=peak(linear(ours, "h", cast=True)),
    trained=peak(linear(ours, "hw", logits_budget_bytes=BUDGET)),
    trained_without_budget=peak(linear(ours, "hw", logits_budget_bytes=0)),
    trained_autocast=peak(linear(ours, "hw", cast=True, logits_budget_bytes=BUDGET)),
    token=peak(token(False, False)),
    token_gradient=peak(token(True, False)),
    token_inplace=peak(token(True, True)),
)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    return json.loads(run_python(SCRIPT).splitlines()[-1])


def test_the_measurement_sees_the_logits_of_the_plain_expression(peaks):
    assert peaks["reference"] > LOGITS


@pytest.mark.parametrize("case", ["no_gradient", "frozen", "frozen_bf16", "frozen_autocast"])
def test_with_a_frozen_head_only_blocks_and_hidden_sizes_are_held(peaks, case):
    assert peaks[case] < BLOCKS


@pytest.mark.parametrize("case", ["trained", "trained_autocast"])
def test_a_trained_head_adds_the_budget_and_the_gradient_of_the_weight(peaks, case):
    assert peaks[case] < BLOCKS + BUDGET + WEIGHT


def test_without_budget_a_trained_head_adds_only_the_gradient_of_the_weight(peaks):
    assert peaks["trained_without_budget"] < BLOCKS + WEIGHT


def test_log_probs_of_logits_hold_nothing_of_their_size(peaks):
    assert peaks["token"] < 10 * MB


def test_the_gradient_of_logits_is_one_tensor_of_their_size(peaks):
    assert 0.9 * LOGITS < peaks["token_gradient"] < LOGITS + 10 * MB


def test_a_gradient_written_over_the_logits_holds_nothing_of_their_size(peaks):
    assert peaks["token_inplace"] < 10 * MB
