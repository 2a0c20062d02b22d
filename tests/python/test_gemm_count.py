"""How much work reaches the matrix products: counted from what the BLAS library itself reports.

The operators call torch's products without its dispatcher, so profilers see nothing; MKL can print
every call with its sizes. Counted are multiply-adds, in units of one product of all kept rows with
the whole weight: kept rows x V x H.
"""

from __future__ import annotations

import re

import pytest
import torch
from logps_cases import needs_native, run_python

pytestmark = [
    needs_native,
    pytest.mark.skipif(
        not torch.backends.mkl.is_available(),
        reason="counts products by MKL's own report, and this build of torch has no MKL",
    ),
]

ROWS, KEPT, SIZE, VOCABULARY = 40, 12, 32, 9001

SCRIPT = f"""
import ctypes, sys
import fusedpo, torch

ROWS, KEPT, SIZE, VOCABULARY = {ROWS}, {KEPT}, {SIZE}, {VOCABULARY}
flush_c = ctypes.CDLL(None).fflush  # MKL prints through C's stdout, which has a buffer of its own
g = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(ROWS, SIZE, generator=g)
WEIGHT = torch.randn(VOCABULARY, SIZE, generator=g)
LABELS = torch.full((ROWS,), -100)
LABELS[torch.randperm(ROWS, generator=g)[:KEPT]] = torch.arange(KEPT) * 500
ROW_BYTES = VOCABULARY * 4

def run(name, grad="", labels=LABELS, dtype=torch.float32, output="logps", metrics=(), **options):
    hidden = HIDDEN.to(dtype, copy=True).requires_grad_("h" in grad)
    weight = WEIGHT.to(dtype, copy=True).requires_grad_("w" in grad)
    print("CASE", name)
    sys.stdout.flush()
    with torch.backends.mkl.verbose(torch.backends.mkl.VERBOSE_ON):
        out = fusedpo.linear_token_logps(hidden, weight, labels, metrics=metrics, **options)
        if grad:
            getattr(out, output).sum().backward()
    flush_c(None)

for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    run(f"no gradient {{dtype}}", dtype=dtype)
    run(f"frozen {{dtype}}", "h", dtype=dtype)
    run(f"trained {{dtype}}", "hw", dtype=dtype)
run("all metrics", metrics=fusedpo.reference.METRICS)
run("all metrics frozen", "h", metrics=fusedpo.reference.METRICS)
run("weight only", "w")
run("trained without budget", "hw", logits_budget_bytes=0)
run("trained with a third of the budget", "hw", logits_budget_bytes=KEPT // 3 * ROW_BYTES)
run("entropy frozen", "h", output="entropy", metrics=("entropy",))
run("all rows kept", "h", labels=torch.arange(ROWS))
run("all rows ignored", "hw", labels=torch.full((ROWS,), -100))
"""


@pytest.fixture(scope="module")
def products() -> dict[str, float]:
    """Multiply-adds of every case, in units of KEPT x VOCABULARY x SIZE."""
    # Where bf16 has instructions its products are oneDNN's, which MKL does not report.
    printed = run_python(SCRIPT, FUSEDPO_BF16_GEMM="widened")
    counts: dict[str, float] = {}
    for line in printed.splitlines():
        if line.startswith("CASE "):
            case = line[5:]
            counts[case] = 0.0
        elif "GEM" in line:
            found = re.search(r"MKL_VERBOSE [SD]GEMM\(\w,\w,(\d+),(\d+),(\d+),", line)
            assert found, f"a product that this test cannot count: {line}"
            m, n, k = map(int, found.groups())
            counts[case] += m * n * k / (KEPT * VOCABULARY * SIZE)
    return counts


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_gradient_there_is_one_product(products, dtype):
    assert products[f"no gradient {dtype}"] == pytest.approx(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_head_takes_two_products(products, dtype):
    assert products[f"frozen {dtype}"] == pytest.approx(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trained_head_takes_three_products_within_the_budget(products, dtype):
    assert products[f"trained {dtype}"] == pytest.approx(3)


def test_a_weight_alone_takes_two_products(products):
    assert products["weight only"] == pytest.approx(2)


def test_past_the_budget_the_logits_are_recomputed_and_no_more_than_that(products):
    assert products["trained without budget"] == pytest.approx(4)
    assert products["trained with a third of the budget"] == pytest.approx(3 + 2 / 3)


def test_metrics_cost_no_product(products):
    assert products["all metrics"] == pytest.approx(1)
    assert products["all metrics frozen"] == pytest.approx(2)


def test_only_the_gradient_of_the_entropy_recomputes(products):
    # Forward 2, then the logits again and the product with the weight.
    assert products["entropy frozen"] == pytest.approx(4)


def test_ignored_rows_never_reach_a_product(products):
    # Every count above is exact in kept rows already; with all rows kept it grows in proportion.
    assert products["all rows kept"] == pytest.approx(2 * ROWS / KEPT)
    assert products["all rows ignored"] == 0


def test_the_count_covers_all_cases(products):
    assert len(products) == 3 * len(DTYPES) + 8
