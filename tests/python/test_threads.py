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
    make_labels,
    make_logits,
    needs_native,
    run_python,
    threads,
)

pytestmark = needs_native

# Several stretches of columns per row, the last one not full, and more than one task per thread.
VOCABULARY = 40_003
COUNTS = (1, 2, 3, 8)


def outputs_and_gradient(logits, labels):
    x = leaf(logits)
    out = fusedpo.token_logps(x, labels, metrics=METRICS)
    (gradient,) = torch.autograd.grad((out.logps - 0.3 * out.entropy).sum(), x)
    return (*(v.detach() for v in out), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 80])  # stretches are shared out, or rows
def test_no_bit_depends_on_the_thread_count(rows, dtype):
    logits, labels = make_logits(rows, VOCABULARY, 1, dtype), make_labels(rows, VOCABULARY, 1)
    results = []
    for count in COUNTS:
        with threads(count):
            results.append(outputs_and_gradient(logits, labels))
    for other in results[1:]:
        assert_same_bits(other, results[0])


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
