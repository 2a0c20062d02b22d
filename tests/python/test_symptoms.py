"""Every mistake of the operators that was found, as a test named after its symptom."""

import json
import os
import subprocess
import sys

import fusedpo
import pytest
import torch
from fusedpo import _load, reference

native = pytest.mark.skipif(not _load.native("cpu"), reason="needs the C++ operators")


def head(rows=6, size=8, vocabulary=50, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    hidden = torch.randn(rows, size, dtype=dtype)
    weight = torch.randn(vocabulary, size, dtype=dtype)
    return hidden, weight, torch.randint(vocabulary, (rows,))


@native
def test_a_gradient_penalty_through_a_frozen_head_is_refused_not_zero():
    hidden, weight, labels = head()
    hidden.requires_grad_()
    total = fusedpo.linear_token_logps(hidden, weight, labels).logps.sum()
    (gradient,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.pow(2).sum().backward()


@native
def test_a_gradient_penalty_through_a_lora_a_is_refused_not_zero():
    hidden, weight, labels = head()
    lora_a = torch.randn(2, 8, requires_grad=True)
    out = fusedpo.linear_token_logps(
        hidden, weight, labels, lora=(lora_a, torch.randn(50, 2), 0.5)
    ).logps.sum()
    (gradient,) = torch.autograd.grad(out, lora_a, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        gradient.pow(2).sum().backward()


@native
def test_forward_mode_derivatives_are_refused_not_zero():
    hidden, weight, labels = head()

    def logps(h):
        return fusedpo.linear_token_logps(h, weight, labels).logps

    with pytest.raises(NotImplementedError, match="reverse-mode"):
        torch.func.jvp(logps, (hidden,), (torch.ones_like(hidden),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(hidden, torch.ones_like(hidden))
        with pytest.raises(NotImplementedError, match="reverse-mode"):
            logps(dual)


@native
def test_forward_mode_derivatives_of_a_loss_are_refused_not_zero():
    zero = torch.zeros(4)

    def loss(chosen):
        return fusedpo.preference_loss(chosen, zero, zero, zero).loss

    with pytest.raises(NotImplementedError, match="reverse-mode"):
        torch.func.jvp(loss, (zero,), (torch.ones(4),))


@pytest.mark.parametrize("above", [12.0, 15.0, 18.0])
def test_the_label_of_a_confident_token_keeps_a_precise_gradient_for_any_upstream(above):
    # 0.7 is no power of two: a product with it is rounded, and a difference would show that.
    logits = torch.zeros(1, 9)
    logits[0, 4] = above
    exact = -0.7 * torch.expm1(torch.log_softmax(logits.double(), -1)[0, 4])
    x = logits.clone().requires_grad_()
    (0.7 * fusedpo.token_logps(x, torch.tensor([4])).logps).sum().backward()
    assert abs(x.grad[0, 4].item() / exact.item() - 1) < 1e-6


@pytest.mark.parametrize("budget", [None, 0])
def test_the_weight_of_a_confident_token_keeps_a_precise_gradient_for_any_upstream(budget):
    weight = torch.zeros(9, 1)
    weight[4] = 15.0
    exact = -0.7 * torch.expm1(torch.log_softmax(weight.double()[:, 0], -1)[4])
    w = weight.clone().requires_grad_()
    out = fusedpo.linear_token_logps(
        torch.ones(1, 1), w, torch.tensor([4]), logits_budget_bytes=budget
    )
    (0.7 * out.logps).sum().backward()
    assert abs(w.grad[4, 0].item() / exact.item() - 1) < 1e-6


_REPEATED_LABELS = """
import json, torch, fusedpo
torch.manual_seed(0)
hidden = torch.ones(2000, 4).bfloat16()
weight = (torch.randn(16, 4) * 0.1).bfloat16().requires_grad_()
labels = torch.zeros(2000, dtype=torch.int64)
fusedpo.linear_token_logps(hidden, weight, labels).logps.sum().backward()
w = weight.detach().double().requires_grad_()
fusedpo.reference.linear_token_logps(hidden.double(), w, labels).logps.sum().backward()
print(json.dumps(((weight.grad.double() - w.grad).abs().max() / w.grad.abs().max()).item()))
"""


@native
@pytest.mark.parametrize("route", ["native", "widened"])
def test_a_label_that_repeats_does_not_stall_the_bf16_weight_gradient(route):
    environment = {**os.environ, "FUSEDPO_BF16_GEMM": route}
    done = subprocess.run(
        [sys.executable, "-c", _REPEATED_LABELS], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) < 2**-7


@pytest.mark.parametrize("view", [lambda x: x[:, :-1], lambda x: x.view(2, 5, 7)])
def test_inplace_backward_does_not_overwrite_a_leaf_through_a_view(view):
    leaf = torch.randn(2, 5, 7, requires_grad=True)
    logits = view(leaf)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    with pytest.raises(ValueError, match="view of one"):
        fusedpo.token_logps(logits, labels, inplace_backward=True)


def test_inplace_backward_refuses_rows_that_overlap():
    logits = (torch.randn(40, requires_grad=True) * 2).unfold(0, 11, 3)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    with pytest.raises(ValueError, match="do not share memory"):
        fusedpo.token_logps(logits, labels, inplace_backward=True)


def test_a_single_label_for_many_rows_is_a_shape_error():
    hidden, weight, _ = head()
    with pytest.raises(ValueError, match=r"labels must have shape \[6\]"):
        fusedpo.linear_token_logps(hidden, weight, torch.tensor(1))


@native
def test_a_vocabulary_tile_of_zero_does_not_kill_the_process():
    hidden, weight, labels = head()
    scoring = (-100, 1.0, 0.0, 1.0, 0, torch.float32, 0, 0, 0)
    with pytest.raises(RuntimeError, match="vocab_tile"):
        torch.ops.fusedpo.linear_token_logps(hidden, weight, None, None, None, labels, *scoring)


@native
def test_the_operator_refuses_to_compute_narrow_operands_in_float64():
    hidden, weight, labels = head()
    scoring = (-100, 1.0, 0.0, 1.0, 0, torch.float64, 64, 0, 0)
    with pytest.raises(RuntimeError, match="float64 operands"):
        torch.ops.fusedpo.linear_token_logps(hidden, weight, None, None, None, labels, *scoring)


@pytest.mark.parametrize("row", ["all masked", "infinite label", "infinite other"])
def test_rows_without_a_finite_maximum_are_nan_as_in_torch(row):
    logits = torch.full((1, 5), -torch.inf) if row == "all masked" else torch.zeros(1, 5)
    if row != "all masked":
        logits[0, 0 if row == "infinite label" else 3] = torch.inf
    labels = torch.tensor([0])
    metrics = ("entropy", "log_sum_sq_probs", "is_top1")
    x, y = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    ours = fusedpo.token_logps(x, labels, metrics=metrics)
    plain = reference.token_logps(y, labels, metrics=metrics)
    for mine, his in zip(ours, plain, strict=True):
        assert mine is his or torch.equal(mine.isnan(), his.isnan())
    assert torch.equal(ours.is_top1, plain.is_top1)
    ours.logps.sum().backward()
    assert x.grad.isnan().all()


def test_subnormal_half_logits_survive_flushing():
    logits = torch.full((4, 300), 2.0**-20, dtype=torch.float16)
    labels = torch.zeros(4, dtype=torch.int64)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        mean = fusedpo.token_logps(logits, labels, metrics=("mean_logits",)).mean_logits
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(mean, torch.full((4,), 2.0**-20))


@native
def test_training_only_lora_a_keeps_no_gradient_of_the_hidden_states():
    hidden, weight, labels = head()
    lora_a = torch.randn(2, 8, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.shape) or t, lambda t: t
    ):
        fusedpo.linear_token_logps(hidden, weight, labels, lora=(lora_a, torch.randn(50, 2), 0.5))
    assert (6, 2) in saved  # the unit gradient of lora_hidden
    assert saved.count((6, 8)) == 1  # hidden itself, for A's own product


@native
def test_a_transposed_weight_is_read_where_it_lies():
    hidden, weight, labels = head(rows=9, size=33, vocabulary=700)
    weight_t = weight.T.contiguous()
    ours = [h.clone().requires_grad_() for h in (hidden, weight_t)]
    out = fusedpo.linear_token_logps(ours[0], ours[1].T, labels, metrics=("entropy",))
    plain = [h.double().requires_grad_() for h in (hidden, weight_t)]
    want = reference.linear_token_logps(plain[0], plain[1].T, labels, metrics=("entropy",))
    torch.testing.assert_close(out.logps.double(), want.logps, rtol=1e-5, atol=1e-5)
    out.logps.sum().backward()
    want.logps.sum().backward()
    for mine, his in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine.grad.double(), his.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["ipo", "ipo_sum", "sigmoid", "hinge"])
@pytest.mark.parametrize("coefficient", [0.99, 0.996, 0.9999, 1.00001, 1.001, 1.01])
@pytest.mark.parametrize("ratio", [-9e4, 9e4])
def test_alpha_divergence_near_one_does_not_overflow_float32(loss_type, coefficient, ratio):
    chosen = torch.tensor([ratio], requires_grad=True)
    zero, lengths = torch.zeros(1), torch.ones(1, dtype=torch.int64)
    for module in (fusedpo, reference):
        loss = module.preference_loss(
            chosen,
            -chosen,
            zero,
            zero,
            loss_type=loss_type,
            beta=0.1,
            f_divergence_type="alpha_divergence",
            f_alpha_divergence_coef=coefficient,
            chosen_lengths=lengths,
            rejected_lengths=lengths,
        ).loss
        (gradient,) = torch.autograd.grad(loss, chosen)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_ld_alpha_zero_drops_an_impossible_token_past_the_shorter_length():
    logps = torch.tensor([[-1.0, -2.0, 0.0], [-1.0, -2.0, -torch.inf]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert fusedpo.pair_logps(logps, mask, ld_alpha=0.0).rejected.item() == -3.0


def test_a_loss_used_twice_without_retain_graph_is_an_error():
    chosen, zero = torch.zeros(3, requires_grad=True), torch.zeros(3)
    loss = fusedpo.preference_loss(chosen, zero, zero, zero).loss
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@native
def test_a_foreign_order_does_not_write_out_of_bounds():
    order = torch.tensor([[10**7, 0], [0, 1]])
    with pytest.raises(RuntimeError, match="positions"):
        torch.ops.fusedpo.loss_backward(
            None, torch.ones(2), torch.ones(2, 2), order, 1, 1, 0, False
        )
