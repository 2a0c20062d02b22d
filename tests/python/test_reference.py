"""fusedpo.reference against values worked out by hand, plain float64 torch, and TRL's own code."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from fusedpo import reference
from logps_cases import IGNORE, METRICS, leaf, make_head, make_labels, make_logits


def test_hand_values_of_a_two_token_vocabulary():
    # p = (3/4, 1/4): every quantity is known.
    logits = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    out = reference.token_logps(logits, torch.tensor([1]), metrics=METRICS)
    assert out.logps.item() == pytest.approx(math.log(0.25), rel=1e-15)
    assert out.entropy.item() == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-15
    )
    assert out.log_sum_sq_probs.item() == pytest.approx(math.log(10 / 16), rel=1e-15)
    assert out.mean_logits.item() == pytest.approx(math.log(3.0) / 2, rel=1e-15)
    assert out.is_top1.item() is False


def test_a_uniform_distribution_has_entropy_log_v():
    out = reference.token_logps(torch.zeros(3, 50), torch.tensor([0, 7, 49]), metrics=METRICS)
    torch.testing.assert_close(out.entropy, torch.full((3,), math.log(50)))
    torch.testing.assert_close(out.log_sum_sq_probs, torch.full((3,), -math.log(50)))
    assert out.is_top1.tolist() == [True, False, False]


def test_a_barred_token_has_probability_zero_and_a_finite_gradient():
    logits = torch.tensor([[1.0, -math.inf, 2.0]], requires_grad=True)
    out = reference.token_logps(logits, torch.tensor([0]), metrics=("entropy",))
    (out.logps + out.entropy).sum().backward()
    without = reference.token_logps(
        torch.tensor([[1.0, 2.0]]), torch.tensor([0]), metrics=("entropy",)
    )
    torch.testing.assert_close(out.entropy, without.entropy)
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 1] == 0


def test_logits_are_scaled_then_capped_then_divided_by_the_temperature():
    head = make_head(5, 8, 11, seed=0, dtype=torch.float64, bias=True)
    out = reference.linear_token_logps(
        head.hidden,
        head.weight,
        head.labels,
        bias=head.bias,
        temperature=0.5,
        softcap=3.0,
        logit_scale=2.0,
        metrics=("mean_logits",),
    )
    z = 3.0 * torch.tanh(2.0 * (head.hidden @ head.weight.T + head.bias) / 3.0) / 0.5
    expected = z.log_softmax(-1)[torch.arange(5), head.labels]
    torch.testing.assert_close(out.logps, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out.mean_logits, z.mean(-1), rtol=1e-13, atol=1e-13)


def test_lora_is_the_head_with_the_merged_weight():
    head = make_head(6, 8, 13, seed=1, dtype=torch.float64, rank=2)
    lora_a, lora_b, scale = head.lora
    ours = reference.linear_token_logps(head.hidden, head.weight, head.labels, lora=head.lora)
    merged = reference.linear_token_logps(
        head.hidden, head.weight + scale * lora_b @ lora_a, head.labels
    )
    torch.testing.assert_close(ours.logps, merged.logps, rtol=1e-12, atol=1e-12)


def test_per_token_values_equal_trl():
    trl = pytest.importorskip(
        "trl.trainer.utils", reason="compares with TRL, which is not installed"
    )
    head = make_head(9, 16, 101, seed=2, bias=True)
    temperature, softcap, logit_scale = 0.8, 5.0, 1.3
    theirs = trl._ChunkedLogProbFunction.apply(
        head.hidden,
        head.weight,
        head.bias,
        head.labels,
        temperature,
        32,
        softcap,
        logit_scale,
        METRICS,
    )
    ours = reference.linear_token_logps(
        head.hidden,
        head.weight,
        head.labels,
        bias=head.bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        metrics=METRICS,
    )
    for name, mine, his in zip(reference.TokenLogps._fields, ours, theirs, strict=True):
        torch.testing.assert_close(
            mine, his, rtol=2e-6, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_gradients_of_logps_and_entropy_equal_trl():
    trl = pytest.importorskip(
        "trl.trainer.utils", reason="compares with TRL, which is not installed"
    )
    head = make_head(9, 16, 101, seed=3, bias=True)
    gradients = []
    for ours in (True, False):
        hidden, weight, bias = leaf(head.hidden), leaf(head.weight), leaf(head.bias)
        if ours:
            logps, entropy, *_ = reference.linear_token_logps(
                hidden, weight, head.labels, bias=bias, softcap=5.0, metrics=METRICS
            )
        else:
            logps, entropy, *_ = trl._ChunkedLogProbFunction.apply(
                hidden, weight, bias, head.labels, 1.0, 32, 5.0, 1.0, METRICS
            )
        (logps.sum() - 0.3 * entropy.sum()).backward()
        gradients.append((hidden.grad, weight.grad, bias.grad))
    for mine, his in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, his, rtol=1e-5, atol=1e-6)


def test_selective_log_softmax_of_trl_gives_the_same_logps():
    trl = pytest.importorskip(
        "trl.trainer.utils", reason="compares with TRL, which is not installed"
    )
    logits, labels = make_logits(12, 301, seed=4), make_labels(12, 301, seed=4)
    ours = reference.token_logps(logits, labels).logps
    theirs = trl.selective_log_softmax(logits, labels)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_half_precision_logits_are_widened_before_the_first_reduction():
    logits, labels = (
        make_logits(8, 1000, seed=5, dtype=torch.bfloat16),
        make_labels(8, 1000, seed=5),
    )
    ours = reference.token_logps(logits, labels, metrics=METRICS)
    wide = reference.token_logps(logits.float(), labels, metrics=METRICS)
    assert all(torch.equal(a, b) for a, b in zip(ours, wide, strict=True))


def test_pair_logps_sums_each_half_over_its_mask():
    logps = torch.tensor([[-1.0, -2.0, -4.0], [-8.0, -16.0, -32.0]] * 2)
    mask = torch.tensor([[0, 1, 1], [0, 0, 1], [1, 1, 1], [0, 1, 0]])
    pair = reference.pair_logps(logps, mask)
    assert pair.chosen.tolist() == [-6.0, -32.0]
    assert pair.rejected.tolist() == [-7.0, -16.0]
    assert pair.chosen_lengths.tolist() == [2, 1]
    assert pair.rejected_lengths.tolist() == [3, 1]


def test_pair_logps_desensitises_what_is_longer_than_the_shorter_completion():
    logps = torch.tensor([[-1.0, -2.0, -4.0, -8.0], [-16.0, -32.0, -64.0, -128.0]])
    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    pair = reference.pair_logps(logps, mask, ld_alpha=0.25)
    assert pair.chosen.tolist() == [-2.0 - 4.0 + 0.25 * -8.0]
    assert pair.rejected.tolist() == [-48.0]
    off = reference.pair_logps(logps, mask, ld_alpha=1.0)
    assert off.chosen.tolist() == [-14.0]


def test_pair_logps_ignores_what_stands_at_masked_positions():
    logps = torch.tensor([[math.nan, -1.0], [-2.0, math.inf]], requires_grad=True)
    pair = reference.pair_logps(logps, torch.tensor([[False, True], [True, False]]))
    assert pair.chosen.tolist() == [-1.0]
    assert pair.rejected.tolist() == [-2.0]
    (pair.chosen - pair.rejected).sum().backward()
    assert logps.grad.tolist() == [[0.0, 1.0], [-1.0, 0.0]]


def test_pair_logps_sums_long_completions_in_float64_and_rounds_once():
    logps = -torch.rand(2, 30_000, generator=torch.Generator().manual_seed(0))
    exact = logps.double().sum(1).float()
    pair = reference.pair_logps(logps, torch.ones(2, 30_000, dtype=torch.int64))
    assert torch.equal(torch.cat([pair.chosen, pair.rejected]), exact)


def test_an_empty_completion_has_logp_zero_and_one_warning():
    mask = torch.tensor([[0, 0], [1, 1]])
    with pytest.warns(UserWarning, match="no token to score") as caught:
        pair = reference.pair_logps(torch.full((2, 2), -1.0), mask)
    assert len(caught) == 1
    assert pair.chosen.tolist() == [0.0]
    assert pair.chosen_lengths.tolist() == [0]


def test_no_pairs_are_allowed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair = reference.pair_logps(torch.zeros(0, 4), torch.zeros(0, 4, dtype=torch.int64))
    assert pair.chosen.shape == (0,)


def test_sigmoid_loss_of_hand_values():
    out = reference.preference_loss(
        torch.tensor([-1.0, -3.0]),
        torch.tensor([-2.0, -1.0]),
        torch.tensor([-1.5, -3.0]),
        torch.tensor([-1.5, -1.0]),
        beta=0.5,
    )
    # delta = (0.5, 0) - (-0.5, 0) = (1, 0)
    first, second = math.log1p(math.exp(-0.5)), math.log(2.0)
    assert out.losses.tolist() == pytest.approx([first, second], rel=1e-7)
    assert out.loss.item() == pytest.approx((first + second) / 2, rel=1e-7)
    assert out.chosen_rewards.tolist() == [0.25, 0.0]
    assert out.rejected_rewards.tolist() == [-0.25, 0.0]
    assert out.margins.tolist() == [0.5, 0.0]
    assert out.accuracies.tolist() == [1.0, 0.0]  # a tie is not a win


def test_sigmoid_loss_and_gradient_stay_finite_for_any_margin():
    chosen = torch.tensor([1e5, -1e5, 0.0], requires_grad=True)
    zeros = torch.zeros(3)
    out = reference.preference_loss(chosen, zeros, zeros, zeros, beta=0.1)
    out.loss.backward()
    assert out.losses.tolist() == pytest.approx([0.0, 1e4, math.log(2.0)], rel=1e-6, abs=1e-30)
    assert chosen.grad.isfinite().all()
    assert chosen.grad[1].item() == pytest.approx(-0.1 / 3, rel=1e-6)


def test_only_loss_and_losses_carry_gradients():
    chosen = torch.zeros(2, requires_grad=True)
    zeros = torch.zeros(2)
    out = reference.preference_loss(chosen, zeros, zeros, zeros)
    assert [field for field, x in out._asdict().items() if x.requires_grad] == ["loss", "losses"]


def test_reductions_and_weights_of_the_sigmoid_loss():
    chosen, zeros = torch.tensor([1.0, -2.0, 0.5]), torch.zeros(3)
    weights = torch.tensor([0.5, 1.0, 0.25])
    call = {"loss_weights": [3.0], "loss_type": ["sigmoid"], "pair_weights": weights}
    none = reference.preference_loss(chosen, zeros, zeros, zeros, reduction="none", **call)
    plain = reference.preference_loss(chosen, zeros, zeros, zeros)
    torch.testing.assert_close(none.losses, 3.0 * weights * plain.losses)
    assert torch.equal(none.loss, none.losses)
    total = reference.preference_loss(chosen, zeros, zeros, zeros, reduction="sum", **call)
    torch.testing.assert_close(total.loss, none.losses.sum())


def test_ignored_rows_stay_out_even_when_they_are_nan():
    logits = make_logits(4, 7, seed=6)
    labels = torch.tensor([1, IGNORE, 2, IGNORE])
    poisoned = leaf(logits)
    with torch.no_grad():
        poisoned[1], poisoned[3] = math.nan, math.inf
    out = reference.token_logps(poisoned, labels, metrics=METRICS)
    clean = reference.token_logps(logits, labels, metrics=METRICS)
    assert all(torch.equal(a, b) for a, b in zip(out, clean, strict=True))
    (out.logps + out.entropy).sum().backward()
    assert poisoned.grad.isfinite().all()
    assert not poisoned.grad[1::2].any()
