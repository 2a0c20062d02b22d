"""linear_token_logps as a public function: values, gradients, options, layouts."""

from __future__ import annotations

import itertools

import fusedpo
import pytest
import torch
from fusedpo import reference
from logps_cases import (
    DTYPES,
    METRICS,
    Head,
    assert_same_bits,
    generator,
    leaf,
    make_head,
    same_bits,
)

# Relative to the largest entry of the tensor compared; the tight bounds are in test_accuracy.py.
# In half precision the logits themselves are rounded on some GEMM routes, hence nats, not ulps.
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.bfloat16: 4e-2,
    torch.float16: 5e-3,
}


def call(function, head: Head, gradient: str = "", **options):
    """Runs `function`; `gradient` lists which of hwbl (hidden, weight, bias, lora) need one."""
    hidden, weight = head.hidden.clone(), head.weight.clone()
    bias = None if head.bias is None else head.bias.clone()
    lora = None if head.lora is None else (head.lora[0].clone(), head.lora[1].clone(), head.lora[2])
    leaves = []
    for letter, tensors in zip("hwbl", ([hidden], [weight], [bias], (lora or ())[:2]), strict=True):
        if letter in gradient:
            leaves += [t.requires_grad_() for t in tensors if t is not None]
    out = function(hidden, weight, head.labels, bias=bias, lora=lora, **options)
    return out, leaves


def loss_of(out) -> torch.Tensor:
    g = generator(5)
    loss = (torch.randn(out.logps.shape, generator=g, dtype=torch.float64) * out.logps).sum()
    if out.entropy is not None:
        loss = loss + (torch.randn(out.logps.shape, generator=g) * out.entropy).sum()
    return loss


def assert_near(ours, theirs, dtype) -> None:
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None)
        if a is None or a.dtype == torch.bool:
            continue
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        limit = TOLERANCE[dtype] * max(1.0, b.abs().max().item() if b.numel() else 0.0)
        difference = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        assert difference <= limit, f"entry {index}: differs by {difference}, allowed {limit}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# On and off for each of the five: 32 small problems with a vocabulary that no width divides.
@pytest.mark.parametrize(
    ("bias", "softcap", "logit_scale", "temperature", "rank"),
    list(itertools.product([False, True], [None, 8.0], [1.0, 0.4], [1.0, 0.7], [0, 3])),
)
def test_values_and_gradients_equal_the_reference(
    dtype, bias, softcap, logit_scale, temperature, rank
):
    head = make_head(19, 24, 331, seed=1, dtype=dtype, bias=bias, rank=rank, ignored=0.3)
    options = {
        "softcap": softcap,
        "logit_scale": logit_scale,
        "temperature": temperature,
        "metrics": METRICS,
    }
    results = []
    for function in (fusedpo.linear_token_logps, reference.linear_token_logps):
        out, leaves = call(function, head, "hwbl", **options)
        results.append((*out, *torch.autograd.grad(loss_of(out), leaves)))
    assert_near(*results, dtype)


@pytest.mark.parametrize("gradient", ["h", "w", "hw", "b", "l", "hb", "hl", "wbl"])
@pytest.mark.parametrize("entropy", [False, True])
def test_any_subset_of_the_inputs_may_want_a_gradient(gradient, entropy):
    head = make_head(9, 16, 301, seed=2, bias=True, rank=2, ignored=0.2)
    metrics = ("entropy",) if entropy else ()
    results = []
    for function in (fusedpo.linear_token_logps, reference.linear_token_logps):
        out, leaves = call(function, head, gradient, metrics=metrics)
        results.append(torch.autograd.grad(loss_of(out), leaves))
    assert_near(*results, torch.float32)


@pytest.mark.parametrize("used", ["logps", "entropy"])
def test_a_loss_of_one_output_alone_is_differentiable(used):
    head = make_head(9, 16, 301, seed=3, bias=True)
    results = []
    for function in (fusedpo.linear_token_logps, reference.linear_token_logps):
        out, leaves = call(function, head, "hwb", metrics=("entropy",))
        results.append(torch.autograd.grad(getattr(out, used).sum(), leaves))
    assert_near(*results, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# Nothing kept, part of the rows kept, everything kept.
@pytest.mark.parametrize("budget", [0, 20_000, None])
def test_the_budget_changes_no_result(dtype, budget):
    head = make_head(40, 16, 500, seed=4, dtype=dtype, bias=True)
    results = []
    for logits_budget_bytes in (budget, None):
        out, leaves = call(
            fusedpo.linear_token_logps,
            head,
            "hwb",
            metrics=METRICS,
            logits_budget_bytes=logits_budget_bytes,
        )
        results.append((tuple(out), torch.autograd.grad(loss_of(out), leaves)))
    assert_same_bits(results[0][0], results[1][0])
    assert_near(results[0][1], results[1][1], dtype)


def test_more_rows_than_any_block_holds_equal_the_reference():
    # 700 rows of 5000 are several row blocks and several vocabulary tiles in every implementation.
    head = make_head(700, 8, 5000, seed=5, bias=True, ignored=0.1)
    results = []
    for function in (fusedpo.linear_token_logps, reference.linear_token_logps):
        out, leaves = call(function, head, "hwb", metrics=METRICS)
        results.append((*out, *torch.autograd.grad(loss_of(out), leaves)))
    assert_near(*results, torch.float32)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3)], ids=str)
def test_results_have_the_shape_of_the_labels(shape):
    head = make_head(torch.Size(shape).numel(), 8, 50, seed=6)
    flat = fusedpo.linear_token_logps(head.hidden, head.weight, head.labels, metrics=METRICS)
    hidden = leaf(head.hidden.view(*shape, 8))
    out = fusedpo.linear_token_logps(hidden, head.weight, head.labels.view(shape), metrics=METRICS)
    assert all(v.shape == shape for v in out)
    assert_same_bits(tuple(v.reshape(-1) for v in out), tuple(flat))
    out.logps.sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_only_logps_and_entropy_carry_gradients():
    out, _ = call(fusedpo.linear_token_logps, make_head(4, 8, 30, seed=7), "h", metrics=METRICS)
    assert [f for f, v in out._asdict().items() if v.requires_grad] == ["logps", "entropy"]
    out, _ = call(fusedpo.linear_token_logps, make_head(4, 8, 30, seed=7), metrics=METRICS)
    assert not any(v.requires_grad for v in out)


LAYOUTS = {
    "hidden is a shifted slice": lambda h: h._replace(
        hidden=torch.cat([h.hidden.view(3, 4, -1), h.hidden.view(3, 4, -1)], dim=1)[:, :4]
    ),
    "hidden is transposed": lambda h: h._replace(
        hidden=h.hidden.view(3, 4, -1).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    ),
    "weight is transposed": lambda h: h._replace(weight=h.weight.t().contiguous().t()),
    "weight has padded rows": lambda h: h._replace(
        weight=torch.cat([h.weight, h.weight], dim=1)[:, : h.weight.shape[1]]
    ),
    "bias has a step": lambda h: h._replace(bias=h.bias.repeat_interleave(2)[::2]),
    "lora matrices are transposed": lambda h: h._replace(
        lora=(h.lora[0].t().contiguous().t(), h.lora[1].t().contiguous().t(), h.lora[2])
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_non_contiguous_inputs_give_the_results_of_contiguous_ones(layout):
    # Not bit for bit: a GEMM library may choose its blocking by the layout.
    head = make_head(12, 16, 133, seed=8, bias=True, rank=2, ignored=0.2)
    head = head._replace(labels=head.labels.view(3, 4), hidden=head.hidden.view(3, 4, 16))
    results = []
    for one in (head, LAYOUTS[layout](head)):
        tensors = [one.hidden, one.weight, one.bias, *one.lora[:2]]
        hidden, weight, bias, lora_a, lora_b = (t.detach().requires_grad_() for t in tensors)
        out = fusedpo.linear_token_logps(
            hidden, weight, one.labels, bias=bias, lora=(lora_a, lora_b, 0.5), metrics=METRICS
        )
        gradients = torch.autograd.grad(loss_of(out), [hidden, weight, bias, lora_a, lora_b])
        results.append((*out, *gradients))
    assert_near(*results, torch.float32)


def test_lora_with_zero_b_gives_the_plain_head_and_a_gradient_for_b_only():
    head = make_head(7, 16, 90, seed=9, rank=3)
    lora_a, lora_b = leaf(head.lora[0]), leaf(torch.zeros_like(head.lora[1]))
    plain = fusedpo.linear_token_logps(head.hidden, head.weight, head.labels)
    out = fusedpo.linear_token_logps(
        head.hidden, head.weight, head.labels, lora=(lora_a, lora_b, 2.0)
    )
    torch.testing.assert_close(out.logps, plain.logps, rtol=1e-6, atol=1e-6)
    out.logps.sum().backward()
    assert not lora_a.grad.any()
    assert lora_b.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_policy_and_reference_with_equal_weights_have_margin_zero(dtype):
    # The policy's pass wants gradients, the reference's does not; a run starts at margin 0 exactly.
    head = make_head(32, 16, 700, seed=10, dtype=dtype)
    policy, _ = call(fusedpo.linear_token_logps, head, "hw")
    ref, _ = call(fusedpo.linear_token_logps, head)
    assert same_bits(policy.logps.detach(), ref.logps)


def test_logps_from_hidden_states_equal_logps_from_logits():
    head = make_head(16, 16, 400, seed=11, ignored=0.2)
    linear = fusedpo.linear_token_logps(head.hidden, head.weight, head.labels, metrics=METRICS)
    token = fusedpo.token_logps(head.hidden @ head.weight.T, head.labels, metrics=METRICS)
    assert_near(tuple(linear), tuple(token), torch.float32)


def test_tied_weights_receive_both_gradients():
    # The head's weight is the embedding: its gradient adds up over both uses.
    head = make_head(6, 16, 60, seed=12)
    tokens = torch.arange(6)
    gradients = []
    for function in (fusedpo.linear_token_logps, reference.linear_token_logps):
        table = leaf(head.weight)
        hidden = torch.tanh(table[tokens]) * 2
        function(hidden, table, head.labels).logps.sum().backward()
        gradients.append((table.grad,))
    assert_near(*gradients, torch.float32)
