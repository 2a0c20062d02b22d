"""Rows of logits on several threads: the same bits on any number, and few rows keep all busy."""

from __future__ import annotations

import json
import sys

import fusedpo
import pytest
import torch
from logps_cases import (
    METRICS,
    assert_same_bits,
    leaf,
    make_head,
    make_labels,
    make_logits,
    needs_native,
    run_python,
    same_bits,
    threads,
)
from test_linear_logps import call as call_head

pytestmark = needs_native

COUNTS = (1, 2, 3, 8)
# Rows and columns whose work, shared out by stretches of columns or by rows, makes more tasks than
# there are threads. The last stretch of a row is not full.
SHAPES = [(1, 300_007), (3, 120_001), (80, 40_003)]
VOCABULARY = 40_003


def outputs_and_gradient(logits, labels):
    x = leaf(logits)
    out = fusedpo.token_logps(x, labels, metrics=METRICS)
    (gradient,) = torch.autograd.grad((out.logps - 0.3 * out.entropy).sum(), x)
    return (*(v.detach() for v in out), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
def test_no_bit_depends_on_the_thread_count(rows, vocabulary, dtype):
    logits, labels = make_logits(rows, vocabulary, 1, dtype), make_labels(rows, vocabulary, 1)
    first, *others = on_any_number(lambda: outputs_and_gradient(logits, labels))
    for other in others:
        assert_same_bits(other, first)


# Fewer rows than threads; a block of rows; several blocks.
@pytest.mark.parametrize("rows", [1, 5, 8, 256, 600])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_hidden_states_no_bit_does_that_torchs_products_keep(rows, dtype):
    """The products are torch's. MKL sums some small ones in another order on other numbers of
    threads; then results are near, and in every other case the same."""
    head = make_head(rows, 896, 10_007, seed=3, dtype=dtype)

    def call():
        out, leaves = call_head(fusedpo.linear_token_logps, head, "hw", metrics=METRICS)
        loss = (out.logps - 0.3 * out.entropy).sum()
        return (*(v.detach() for v in out), *torch.autograd.grad(loss, leaves))

    first, *others = on_any_number(call)
    torchs_first, *torchs_others = on_any_number(lambda: products(head))
    kept = all(same_bits(a, b) for t in torchs_others for a, b in zip(t, torchs_first, strict=True))
    for other in others:
        if kept:
            assert_same_bits(other, first)
        else:
            rtol = 1e-4 if dtype == torch.float32 else 1.6e-2
            torch.testing.assert_close(other, first, rtol=rtol, atol=1e-4)


def products(head) -> tuple[torch.Tensor, ...]:
    """Those of the head's first tile and of its last, on as many rows as a block has."""
    rows = head.hidden.reshape(-1, 896)[:300]
    results = []
    for dtype in {head.hidden.dtype, torch.float32}:
        x = rows.to(dtype)
        for tile in head.weight.to(dtype).split(fusedpo.logps._vocab_tile(896, "cpu"))[::4]:
            e = x @ tile.T
            results += [e, e @ tile, e.T @ x]
    return tuple(results)


def on_any_number(call):
    for count in COUNTS:
        with threads(count):
            yield call()


def test_a_row_has_the_same_bits_alone_and_among_many():
    logits, labels = make_logits(80, VOCABULARY, 2), make_labels(80, VOCABULARY, 2)
    many = outputs_and_gradient(logits, labels)
    for rows in (slice(5, 6), slice(7, 47)):
        alone = outputs_and_gradient(logits[rows], labels[rows])
        assert_same_bits(alone, tuple(v[rows] for v in many))


BUSY = """
import json, pathlib
import torch, fusedpo

torch.set_num_threads(2)
logits = torch.randn(1, 3_000_000)
labels = torch.zeros(1, dtype=torch.int64)

def spent():  # nanoseconds on a processor, by thread
    tasks = pathlib.Path("/proc/self/task").iterdir()
    return {t.name: int((t / "schedstat").read_text().split()[0]) for t in tasks}

def busy(call):
    call()
    before = spent()
    for _ in range(60):  # the kernel counts in ticks
        call()
    used = [now - before.get(task, 0) for task, now in spent().items()]
    return sum(u > 0.2 * sum(used) for u in used)

x = logits.clone().requires_grad_()
loss = fusedpo.token_logps(x, labels).logps.sum()
print(json.dumps([
    busy(lambda: fusedpo.token_logps(logits, labels, metrics=("entropy",))),
    busy(lambda: torch.autograd.grad(loss, x, retain_graph=True)),
    busy(lambda: logits.cumsum(-1)),
]))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads what each thread used from /proc"
)
def test_one_row_keeps_two_threads_busy():
    forward, backward, one_after_the_other = json.loads(
        run_python(BUSY, OMP_WAIT_POLICY="passive").splitlines()[-1]
    )
    assert one_after_the_other == 1  # a waiting thread does not count as busy
    assert (forward, backward) == (2, 2)
