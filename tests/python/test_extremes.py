"""The numerical contract at its edges: odd sizes, extreme values, more than 2^31 logits."""

from __future__ import annotations

import math

import fusedpo
import pytest
import torch
from contract_cases import (
    TokenCase,
    both,
    forward_and_gradients,
)
from fusedpo import reference
from logps_cases import (
    DTYPES,
    IGNORE,
    METRICS,
    assert_same_bits,
    leaf,
    make_head,
    make_logits,
    needs_native,
    same_bits,
    threads,
)


# Around every width that a vector, a segment or a tile may have.
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 7, 8, 9, 31, 33, 2047, 2049, 4095, 4097])
@both
def test_no_vocabulary_size_needs_to_be_a_multiple_of_anything(case_type, vocabulary):
    case = case_type(rows=5, vocabulary=vocabulary, ignored=0.0)
    # Each label once at the first and at the last column.
    labels = case.labels.clone()
    labels[0], labels[1] = 0, vocabulary - 1
    outputs, gradients = forward_and_gradients(case, labels=labels)
    wide = [t.double() for t in case.inputs]
    if case_type is TokenCase:
        exact = reference.token_logps(wide[0], labels, temperature=0.9, metrics=METRICS)
    else:
        exact = reference.linear_token_logps(
            wide[0], wide[1], labels, bias=wide[2], temperature=0.9, softcap=30.0, metrics=METRICS
        )
    for mine, his in zip(outputs[:4], exact[:4], strict=True):
        torch.testing.assert_close(mine.double(), his, rtol=1e-5, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_50_nats_below_the_maximum_keeps_its_precision(dtype):
    logits = torch.zeros(1, 3000, dtype=dtype)
    logits[0, 1500] = 50.0
    out = fusedpo.token_logps(logits, torch.tensor([7]), metrics=METRICS)
    rest = 2999 * math.exp(-50.0)
    exact = {
        "logps": -50.0 - math.log1p(rest),
        "entropy": math.log1p(rest) + 50.0 * rest / (1 + rest),
        "log_sum_sq_probs": -2 * math.log1p(rest),
        "mean_logits": 50.0 / 3000,
    }
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for name, value in exact.items():
        # Entropy and log sum p^2 vanish here: plain sums leave eps times the terms that cancel.
        noise = 0 if name in ("logps", "mean_logits") else 4 * eps
        assert getattr(out, name).item() == pytest.approx(value, rel=4 * eps, abs=noise), name


@needs_native  # the plain expression of the reference cancels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_confident_token_keeps_its_relative_precision(dtype):
    # logp = -log1p(rest) with rest = 2999 e^-30: lost in a difference of two numbers near 30.
    logits = torch.zeros(1, 3000, dtype=dtype)
    logits[0, 1500] = 30.0
    x = leaf(logits)
    out = fusedpo.token_logps(x, torch.tensor([1500]))
    out.logps.backward()
    rest = 2999 * math.exp(-30.0)
    eps = 1e-14 if dtype == torch.float64 else 1e-6
    assert out.logps.item() == pytest.approx(-math.log1p(rest), rel=eps)
    assert x.grad[0, 1500].item() == pytest.approx(rest / (1 + rest), rel=eps)


@both
@pytest.mark.parametrize("shift", [-3e4, 3e4])
def test_adding_a_constant_to_all_logits_changes_no_log_probability(case_type, shift):
    case = case_type(rows=6, vocabulary=300)
    shifted = list(case.inputs)
    shifted[-1] = shifted[-1] + shift  # the logits, or the bias
    options = {} if case_type is TokenCase else {"softcap": None}
    # The shift itself rounds the logits to 1/512 nat; the arithmetic adds nothing to that.
    rounded = list(case.inputs)
    if case_type is TokenCase:
        rounded[0] = shifted[0].double() - shift
        expected = case([rounded[0].float()], **options).logps
        tolerance = 1e-2  # the temperature divides after the rounding
    else:
        expected, tolerance = case(**options).logps, 3e-2
    torch.testing.assert_close(case(shifted, **options).logps, expected, rtol=0, atol=tolerance)


MEMORY_FOR_LARGE = 8 << 30


def large_rows(vocabulary: int) -> int:
    return (1 << 31) // vocabulary + 50


def skip_without_memory() -> None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            info = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    except OSError:
        pytest.skip("needs 8 GiB of free memory, and this system does not say how much there is")
    if info["MemAvailable"] < MEMORY_FOR_LARGE:
        pytest.skip(f"needs 8 GiB of free memory; {info['MemAvailable'] >> 20} MiB are free")


def test_more_than_2_to_the_31_logits_are_indexed_correctly():
    # The memory is reserved, and only three rows of it are ever written or read going forward.
    skip_without_memory()
    vocabulary = 151_936
    rows = large_rows(vocabulary)
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16)
    places = torch.tensor([0, rows // 2, rows - 1])
    few = make_logits(3, vocabulary, seed=1, dtype=torch.bfloat16)
    few_labels = torch.tensor([0, 77_777, vocabulary - 1])
    logits[places] = few
    labels = torch.full((rows,), IGNORE)
    labels[places] = few_labels
    logits.requires_grad_()
    out = fusedpo.token_logps(logits, labels, metrics=METRICS)
    small = leaf(few)
    expected = fusedpo.token_logps(small, few_labels, metrics=METRICS)
    assert_same_bits(tuple(v[places].detach() for v in out), tuple(v.detach() for v in expected))
    assert int(out.logps.count_nonzero()) == 3
    out.logps.sum().backward()
    expected.logps.sum().backward()
    assert same_bits(logits.grad[places], small.grad)
    assert not logits.grad[places[1] - 1].any()
    assert not logits.grad[places[2] - 1].any()


@needs_native
def test_more_than_2_to_the_31_expanded_logits_are_all_scored():
    # One row in memory, seen 14000 times: every logit is read, none is copied.
    vocabulary = 151_936
    rows = large_rows(vocabulary)
    row = make_logits(1, vocabulary, seed=2, dtype=torch.bfloat16)
    labels = torch.arange(rows) % 5
    out = fusedpo.token_logps(row.expand(rows, vocabulary), labels)
    expected = fusedpo.token_logps(row.expand(5, vocabulary), torch.arange(5))
    assert same_bits(out.logps, expected.logps[labels])


@needs_native
def test_more_than_2_to_the_31_logits_behind_a_head_are_all_scored():
    # A vocabulary of 2^19 makes the row count small; two features make the product cheap.
    vocabulary, size = 1 << 19, 2
    rows = large_rows(vocabulary)
    head = make_head(rows, size, vocabulary, seed=3)
    with threads(1):  # thousands of small products: on a busy machine threads wait for each other
        out = fusedpo.linear_token_logps(head.hidden, head.weight, head.labels)
    some = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1])
    exact = reference.linear_token_logps(
        head.hidden[some].double(), head.weight.double(), head.labels[some]
    )
    torch.testing.assert_close(out.logps[some].double(), exact.logps, rtol=1e-5, atol=1e-5)
