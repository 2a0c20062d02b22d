"""linear_token_logps under autocast follows F.linear: compute dtype, gradient dtypes, casts."""

from __future__ import annotations

import fusedpo
import pytest
import torch
from logps_cases import (
    METRICS,
    assert_same_bits,
    autocast,
    generator,
    leaf,
    make_head,
    needs_native,
    same_bits,
)

HALF = (torch.bfloat16, torch.float16)


def score(head, *, rank=False, **options):
    lora = head.lora if rank else None
    return fusedpo.linear_token_logps(
        head.hidden, head.weight, head.labels, bias=head.bias, lora=lora, metrics=METRICS, **options
    )


def rounded(head, dtype):
    """The head with every tensor cast beforehand."""
    lora = None if head.lora is None else (*(t.to(dtype) for t in head.lora[:2]), head.lora[2])
    return head._replace(
        hidden=head.hidden.to(dtype),
        weight=head.weight.to(dtype),
        bias=None if head.bias is None else head.bias.to(dtype),
        lora=lora,
    )


def grown(head):
    """The head with leaves, and those leaves."""
    leaves = [leaf(t) for t in (head.hidden, head.weight, head.bias)]
    return head._replace(hidden=leaves[0], weight=leaves[1], bias=leaves[2]), leaves


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("rank", [False, True])
def test_float32_inputs_under_autocast_give_the_bits_of_inputs_cast_beforehand(
    dtype, softcap, rank
):
    head = make_head(21, 24, 5003, seed=1, bias=True, rank=2, ignored=0.3)
    with autocast(dtype):
        ours = score(head, softcap=softcap, rank=rank)
    assert_same_bits(tuple(ours), tuple(score(rounded(head, dtype), softcap=softcap, rank=rank)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_any_mixture_of_dtypes_under_autocast_gives_the_same_bits(dtype):
    head = make_head(9, 24, 301, seed=2, bias=True)
    cast = rounded(head, dtype)
    with autocast(dtype):
        results = [
            score(head._replace(hidden=hidden, weight=weight, bias=bias))
            for hidden in (head.hidden, cast.hidden)
            for weight in (head.weight, cast.weight)
            for bias in (head.bias, cast.bias)
        ]
    for other in results[1:]:
        assert_same_bits(tuple(other), tuple(results[0]))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_come_back_in_the_dtypes_of_the_inputs(dtype, trained):
    head = make_head(9, 24, 301, seed=3, bias=True)
    mixtures = [(torch.float32, torch.float32), (dtype, torch.float32), (torch.float32, dtype)]
    for hidden_dtype, weight_dtype in mixtures:
        hidden, weight = leaf(head.hidden.to(hidden_dtype)), head.weight.to(weight_dtype)
        weight = leaf(weight) if trained else weight
        with autocast(dtype):
            out = fusedpo.linear_token_logps(hidden, weight, head.labels)
        out.logps.sum().backward()
        assert out.logps.dtype == torch.float32
        assert hidden.grad.dtype == hidden_dtype
        if trained:
            assert weight.grad.dtype == weight_dtype


@needs_native
@pytest.mark.parametrize("budget", [None, 0])
def test_the_gradient_of_a_float32_weight_is_never_rounded_to_the_autocast_dtype(budget):
    head, leaves = grown(make_head(40, 16, 200, seed=4, bias=True))
    with autocast():
        score(head, logits_budget_bytes=budget).logps.sum().backward()
    gradient = leaves[1].grad
    in_bf16 = gradient.bfloat16().float() == gradient
    # Values that happen to need only 8 bits are rare: about one in 65536, and exact zeros.
    assert in_bf16.float().mean() < 0.02


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_under_autocast_are_those_of_the_rounded_head(dtype):
    # Against float64 arithmetic on the rounded inputs. Our products are at most as coarse as those
    # of F.linear, whose logits are rounded to `dtype`.
    head = make_head(40, 16, 200, seed=5, bias=True, ignored=0.2)
    held, leaves = grown(head)
    with autocast(dtype):
        score(held).logps.sum().backward()
    exact, exact_leaves = grown(rounded(rounded(head, dtype), torch.float64))
    score(exact).logps.sum().backward()
    for mine, his in zip(leaves, exact_leaves, strict=True):
        error = (mine.grad.double() - his.grad).norm() / his.grad.norm()
        assert error < 8 * torch.finfo(dtype).eps


def test_backward_may_run_outside_of_autocast_or_inside():
    gradients = []
    for inside in (False, True):
        head, leaves = grown(make_head(9, 24, 301, seed=6, bias=True))
        with autocast():
            out = score(head)
            loss = out.logps.sum() + out.entropy.sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append(tuple(t.grad for t in leaves))
    assert_same_bits(*gradients)


def test_float64_inputs_are_not_cast():
    head = make_head(5, 16, 100, seed=7, dtype=torch.float64, bias=True)
    with autocast():
        inside = score(head)
    assert_same_bits(tuple(inside), tuple(score(head)))
    assert inside.logps.dtype == torch.float64


def test_autocast_that_is_switched_off_casts_nothing():
    head = make_head(5, 16, 100, seed=8, bias=True)
    with autocast(), autocast(enabled=False):
        inside = score(head)
    assert_same_bits(tuple(inside), tuple(score(head)))


def test_the_autocast_dtype_is_read_at_every_call():
    head = make_head(5, 16, 100, seed=9, bias=True)
    results = []
    for dtype in HALF:
        with autocast(dtype):
            results.append(score(head).logps)
        assert same_bits(results[-1], score(rounded(head, dtype)).logps)
    assert not torch.equal(*results)


def test_logits_under_autocast_are_scored_in_float32_at_least():
    logits = torch.randn(4, 50, generator=generator(0))
    labels = torch.arange(4)
    with autocast():
        inside = fusedpo.token_logps(logits, labels, metrics=METRICS)
    assert_same_bits(tuple(inside), tuple(fusedpo.token_logps(logits, labels, metrics=METRICS)))
