"""The loss functions: derivatives, invariances, edge cases, and torch's own checks."""

from __future__ import annotations

import math
import warnings

import fusedpo
import pytest
import torch
from fusedpo import _load, reference
from loss_cases import (
    CASES,
    PAIRED,
    REFERENCE_FREE,
    SORTING,
    TYPES,
    UNPAIRED,
    WITH_REFERENCE,
    inputs_of,
    options_of,
)

needs_native = pytest.mark.skipif(not _load.native("cpu"), reason="C++ operators are not loaded")
LN2 = math.log(2)


def shift_of(name):
    return {"kto": {"kl": 0.3}, "bco": {"delta": 0.2}}.get(name, {})


def one_pair(r_chosen, r_rejected, **options):
    zero = torch.zeros(1, dtype=torch.float64)
    chosen, rejected = zero + r_chosen, zero + r_rejected
    return fusedpo.preference_loss(chosen, rejected, zero, zero, **options).loss.item()


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"loss_type": "sigmoid"}, 0.598138869),
        ({"loss_type": "cdpo", "label_smoothing": 0.1}, 0.618138869),
        ({"loss_type": "hinge"}, 0.8),
        ({"loss_type": "ipo_sum"}, 9.0),
        ({"loss_type": "robust", "label_smoothing": 0.1}, 0.573138869),
    ],
)
def test_hand_values_at_ratios_one_and_minus_one(options, value):
    assert one_pair(1.0, -1.0, **options) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"loss_type": "sigmoid"}, LN2),
        ({"loss_type": "hinge"}, 1.0),
        ({"loss_type": "apo_zero"}, 1.0),
        ({"loss_type": "nca_pair"}, 2 * LN2),
        ({"loss_type": "exo_pair", "label_smoothing": 1e-3}, 2.761230709),
    ],
)
def test_hand_values_at_equal_ratios(options, value):
    assert one_pair(0.0, 0.0, **options) == pytest.approx(value, abs=1e-9)


# ---- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "f"), CASES)
def test_gradcheck_of_every_loss_and_divergence(name, f):
    logps, needs = inputs_of(3)
    nll = needs.pop("chosen_nll")
    weights = None if name in SORTING else torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)
    options = options_of(name, f_divergence_type=f, pair_weights=weights, **needs)

    def loss_and_losses(*inputs):
        out = fusedpo.preference_loss(*inputs[:4], chosen_nll=inputs[4], **options)
        return out.loss, out.losses

    assert torch.autograd.gradcheck(loss_and_losses, (*logps, nll), atol=1e-7)


@pytest.mark.parametrize("name", UNPAIRED)
def test_gradcheck_of_unpaired_losses(name):
    logps, _ = inputs_of(4)
    labels = torch.tensor([True, False, False, True])
    options = {"loss_type": name, "undesirable_weight": 1.5, **shift_of(name)}

    def loss_and_losses(policy, ref):
        out = fusedpo.unpaired_loss(policy, ref, labels, **options)
        return out.loss, out.losses

    assert torch.autograd.gradcheck(loss_and_losses, tuple(logps[:2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "f"), CASES)
def test_operator_agrees_with_the_reference(name, f, dtype):
    logps, needs = inputs_of(9, dtype)
    names = [name, "sft", "aot"] if f == "reverse_kl" else [name, "sft", "hinge"]
    options = options_of(name, f_divergence_type=f, loss_weights=[0.7, -0.2, 1.5], **needs)
    options["loss_type"] = names
    upstream = torch.randn(9, dtype=dtype)
    results = []
    for module in (fusedpo, reference):
        out = module.preference_loss(*logps, **options)
        total = 0.3 * out.loss + (upstream * out.losses).sum()
        grads = torch.autograd.grad(total, [*logps, needs["chosen_nll"]], allow_unused=True)
        results.append((*out, *grads))
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    for got, want in zip(*results, strict=True):
        if want is None or got is None:
            assert got is None or not got.any()
            assert want is None or not want.any()
        else:
            torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_operator_agrees_with_the_reference(name):
    logps, _ = inputs_of(9)
    labels = torch.rand(9) > 0.5
    results = []
    for module in (fusedpo, reference):
        out = module.unpaired_loss(
            *logps[:2], labels, loss_type=name, desirable_weight=0.6, **shift_of(name)
        )
        grads = torch.autograd.grad(out.loss + (out.losses**2).sum(), logps[:2])
        results.append((*out, *grads))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_only_loss_and_losses_carry_gradients():
    logps, _ = inputs_of(2)
    out = fusedpo.preference_loss(*logps)
    assert [name for name, x in out._asdict().items() if x.requires_grad] == ["loss", "losses"]
    unpaired = fusedpo.unpaired_loss(*logps[:2], torch.tensor([True, False]), kl=0.0)
    assert not unpaired.rewards.requires_grad
    with torch.no_grad():
        assert not fusedpo.preference_loss(*logps).loss.requires_grad


def test_inputs_that_require_no_gradient_get_none():
    logps, _ = inputs_of(4)
    chosen, rejected, ref_chosen, ref_rejected = logps
    ref_chosen.requires_grad_(False)
    fusedpo.preference_loss(chosen, rejected.detach(), ref_chosen, ref_rejected).loss.backward()
    assert chosen.grad is not None
    assert ref_chosen.grad is None
    torch.testing.assert_close(ref_rejected.grad, chosen.grad)  # both enter with a plus sign


def test_graph_may_be_used_twice_and_gradients_accumulate():
    logps, _ = inputs_of(3)
    out = fusedpo.preference_loss(*logps, loss_type=["sigmoid", "aot"])
    out.loss.backward(retain_graph=True)
    once = logps[0].grad.clone()
    out.loss.backward()
    torch.testing.assert_close(logps[0].grad, 2 * once)


def test_upstream_gradients_may_be_expanded_or_strided():
    logps, _ = inputs_of(4)
    for upstream in (torch.ones(()).double().expand(4), torch.rand(8).double()[::2]):
        losses = fusedpo.preference_loss(*logps).losses
        (got,) = torch.autograd.grad(losses, logps[0], upstream)
        losses = reference.preference_loss(*logps).losses
        (want,) = torch.autograd.grad(losses, logps[0], upstream)
        torch.testing.assert_close(got, want)


def test_inputs_may_be_strided():
    both = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    got = fusedpo.preference_loss(*both.unbind(1), loss_type=["sigmoid", "aot"])
    want = fusedpo.preference_loss(
        *(x.clone() for x in both.unbind(1)), loss_type=["sigmoid", "aot"]
    )
    assert torch.equal(got.losses, want.losses)
    assert torch.equal(*(torch.autograd.grad(out.loss, both)[0] for out in (got, want)))


@needs_native
@pytest.mark.parametrize("direct", [False, True])
def test_second_derivatives_are_refused(direct):
    logps, _ = inputs_of(3)
    if direct:  # the registered rule, which direct callers of the operator use
        options = ([0], [1.0], [0.0], 0.1, 0.0, 0, 0.5, 0.05, 0.5, 0.0, 0, 15)
        out = torch.ops.fusedpo.preference_loss(*logps, None, None, None, None, *options)[0]
    else:
        out = fusedpo.preference_loss(*logps).loss
    (grad,) = torch.autograd.grad(out, logps[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        (out + grad.square().sum()).backward()


# ---- properties ---------------------------------------------------------------------------------


def detached(name, pairs=6, **others):
    logps, needs = inputs_of(pairs)
    needs["chosen_nll"] = needs["chosen_nll"].detach()
    return [x.detach() for x in logps], options_of(name, **needs, **others)


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_adding_the_same_to_policy_and_reference_changes_nothing(name):
    (c, r, ref_c, ref_r), options = detached(name)
    options["reduction"] = "none"
    plain = fusedpo.preference_loss(c, r, ref_c, ref_r, **options)
    # Both completions of a pair share their prompt: what is added to all four cancels in r.
    moved = fusedpo.preference_loss(c + 3, r + 3, ref_c + 3, ref_r + 3, **options)
    torch.testing.assert_close(moved.loss, plain.loss)
    torch.testing.assert_close(moved.chosen_rewards, plain.chosen_rewards)


# Functions of the difference s_c - s_r: with reverse_kl, adding to both policy log-probs cancels.
OF_THE_MARGIN = [
    "sigmoid", "cdpo", "hinge", "ipo_sum", "exo_pair", "robust", "discopop", "aot", "aot_unpaired",
    "cpo", "cpo_hinge", "orpo_logratio",
]  # fmt: skip


@pytest.mark.parametrize("name", PAIRED)
def test_shifting_both_policy_logps_matters_only_where_it_should(name):
    (c, r, ref_c, ref_r), options = detached(name)
    plain = fusedpo.preference_loss(c, r, ref_c, ref_r, **options)
    moved = fusedpo.preference_loss(c + 2, r + 2, ref_c, ref_r, **options)
    same = torch.allclose(plain.losses, moved.losses, rtol=1e-10, atol=1e-12)
    assert same == (name in OF_THE_MARGIN or name == "sft")


@pytest.mark.parametrize(
    ("name", "swapped_equals"),
    [("cdpo", 0.5), ("exo_pair", 0.5), ("aot_unpaired", 0.5), ("cpo", 0.5)],
)
def test_smoothing_of_one_half_makes_chosen_and_rejected_equal(name, swapped_equals):
    (c, r, ref_c, ref_r), options = detached(name)
    options["label_smoothing"] = swapped_equals
    options["chosen_nll"] = torch.zeros((), dtype=torch.float64)
    plain = fusedpo.preference_loss(c, r, ref_c, ref_r, **options)
    swapped = fusedpo.preference_loss(r, c, ref_r, ref_c, **options)
    torch.testing.assert_close(plain.loss, swapped.loss)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_swapping_the_sides_negates_the_margin(name):
    # ls(x) - ls(-x) = x
    (c, r, ref_c, ref_r), options = detached(name)
    n_c, n_r = options.pop("chosen_lengths"), options.pop("rejected_lengths")
    plain = fusedpo.preference_loss(
        c, r, ref_c, ref_r, chosen_lengths=n_c, rejected_lengths=n_r, **options
    )
    swapped = fusedpo.preference_loss(
        r, c, ref_r, ref_c, chosen_lengths=n_r, rejected_lengths=n_c, **options
    )
    torch.testing.assert_close(plain.margins, -swapped.margins)
    x = plain.margins
    if name == "sigmoid_norm":
        x = 0.1 * ((c - ref_c) / n_c - (r - ref_r) / n_r)
    torch.testing.assert_close(swapped.losses - plain.losses, x)


@pytest.mark.parametrize("name", PAIRED)
def test_permuting_the_pairs_permutes_the_results(name):
    logps, options = detached(name, pairs=8)
    order = torch.randperm(8)
    leaves = [x.clone().requires_grad_() for x in logps]
    moved_leaves = [x[order].clone().requires_grad_() for x in logps]
    plain = fusedpo.preference_loss(*leaves, **options)
    options["chosen_lengths"] = options["chosen_lengths"][order]
    options["rejected_lengths"] = options["rejected_lengths"][order]
    moved = fusedpo.preference_loss(*moved_leaves, **options)
    torch.testing.assert_close(moved.loss, plain.loss, rtol=1e-14, atol=1e-14)
    assert torch.equal(moved.margins, plain.margins[order])
    if name in SORTING:
        assert torch.equal(moved.losses, plain.losses)
    else:
        assert torch.equal(moved.losses, plain.losses[order])
    if plain.loss.requires_grad:
        (got,) = torch.autograd.grad(moved.loss, moved_leaves[0])
        (want,) = torch.autograd.grad(plain.loss, leaves[0])
        assert torch.equal(got, want[order])


def test_ties_are_sorted_in_their_order_and_are_not_accurate():
    chosen = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    zeros, upstream = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, 2.0, 3.0])
    out = fusedpo.preference_loss(chosen, zeros, zeros, zeros, loss_type="aot")
    assert out.accuracies.tolist() == [0.0, 0.0, 0.0]
    (grad,) = torch.autograd.grad(out.losses, chosen, upstream.double())
    assert grad.tolist() == pytest.approx([-0.05, -0.10, -0.15])


def test_reductions():
    logps, _ = inputs_of(5)
    weights = torch.rand(5, dtype=torch.float64)
    mean, total, none = (
        fusedpo.preference_loss(*logps, loss_type="nca_pair", pair_weights=weights, reduction=r)
        for r in ("mean", "sum", "none")
    )
    torch.testing.assert_close(mean.loss, none.losses.mean())
    torch.testing.assert_close(total.loss, none.losses.sum())
    assert none.loss is none.losses
    unpaired = [
        fusedpo.unpaired_loss(*logps[:2], torch.rand(5) > 2, kl=0.0, reduction=r)
        for r in ("mean", "sum", "none")
    ]
    torch.testing.assert_close(unpaired[0].loss, unpaired[2].losses.mean())
    torch.testing.assert_close(unpaired[1].loss, unpaired[2].loss.sum())


@pytest.mark.parametrize("name", PAIRED)
def test_no_pair_gives_zero_and_keeps_the_graph(name):
    logps, needs = inputs_of(0)
    out = fusedpo.preference_loss(*logps, **options_of(name, **needs))
    assert out.loss.item() == 0.0
    assert out.losses.shape == out.margins.shape == (0,)
    out.loss.backward()
    leaf = needs["chosen_nll"] if name == "sft" else logps[0]
    assert leaf.grad is not None
    assert not leaf.grad.any()


@pytest.mark.parametrize("name", PAIRED)
def test_one_pair_is_the_first_of_many(name):
    logps, options = detached(name, pairs=3)
    if name in SORTING:
        logps = [x[:1].expand(3) for x in logps]
    first = {k: v[:1] if "lengths" in k else v for k, v in options.items()}
    many = fusedpo.preference_loss(*logps, **options)
    one = fusedpo.preference_loss(*(x[:1] for x in logps), **first)
    assert one.losses[0] == many.losses[0]
    assert one.loss == one.losses[0]


@pytest.mark.parametrize("name", UNPAIRED)
@pytest.mark.parametrize("desirable", [True, False])
def test_unpaired_batches_of_one_class(name, desirable):
    logps, _ = inputs_of(3)
    labels = torch.full((3,), desirable)
    out = fusedpo.unpaired_loss(*logps[:2], labels, loss_type=name, **shift_of(name))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(out.losses.mean().item())
    assert (logps[0].grad < 0).all() if desirable else (logps[0].grad > 0).all()
    empty = fusedpo.unpaired_loss(
        logps[0][:0], logps[1][:0], labels[:0], loss_type=name, **shift_of(name)
    )
    assert empty.loss.item() == 0.0


def test_negative_kl_counts_as_zero_and_tensors_are_taken():
    logps, _ = inputs_of(4)
    labels = torch.tensor([True, False, True, False])
    zero = fusedpo.unpaired_loss(*logps[:2], labels, kl=0.0)
    for kl in (-3.0, torch.tensor(-3.0), torch.tensor([-1.0], dtype=torch.float64)):
        assert torch.equal(fusedpo.unpaired_loss(*logps[:2], labels, kl=kl).losses, zero.losses)
    delta = torch.tensor(0.5, requires_grad=True)
    out = fusedpo.unpaired_loss(*logps[:2], labels, loss_type="bco", delta=delta)
    out.loss.backward()
    assert delta.grad is None


@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_rewards_without_reference_are_those_of_the_losses_trainer(name):
    logps, options = detached(name)
    chosen = logps[0]
    mean = chosen / options["chosen_lengths"]
    want = {
        "cpo": chosen,
        "cpo_hinge": chosen,
        "orpo_logratio": chosen,
        "cpo_ipo": mean,
        "simpo": mean,
        "orpo": mean,
        "alphapo": (1 - (-0.25 * mean).exp()) / 0.25,
    }[name]
    out = fusedpo.preference_loss(*logps[:2], **options)
    torch.testing.assert_close(out.chosen_rewards, 0.1 * want)
    mixed = options | {"loss_type": [name, "sigmoid"]}
    out = fusedpo.preference_loss(*logps, **mixed)
    torch.testing.assert_close(out.chosen_rewards, 0.1 * (chosen - logps[2]))


def test_empty_completions_warn_once_and_count_as_zero():
    zero = torch.zeros(2, requires_grad=True)
    lengths = torch.tensor([0, 3])
    call = {"chosen_lengths": lengths, "rejected_lengths": lengths}
    for name in PAIRED:
        if "chosen_lengths" not in TYPES[name].needs:
            continue
        options = options_of(name, **call, chosen_nll=torch.zeros(2))
        with pytest.warns(UserWarning, match="no token to score") as caught:
            out = fusedpo.preference_loss(zero, zero, zero, zero, **options)
        assert len(caught) == 1
        (grad,) = torch.autograd.grad(out.loss, zero)
        assert out.losses.isfinite().all()
        assert grad.isfinite().all()
        assert out.margins.tolist() == [0.0, 0.0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedpo.preference_loss(zero, zero, zero, zero, **call)  # sigmoid does not look at lengths


# ---- torch's own checks -------------------------------------------------------------------------


def operator_arguments(name, needs, pairs=4, dtype=torch.float32):
    logps, others = inputs_of(pairs, dtype)
    plan = reference.losses.pair_plan(
        [name, "sft"], None, 0.1, 0.1 if "label_smoothing" in TYPES[name].options else 0.0,
        "reverse_kl", 0.5, 0.05, None, 0.5, 0.0,
    )  # fmt: skip
    return (
        *logps,
        others["chosen_lengths"],
        others["rejected_lengths"],
        others["chosen_nll"],
        None,
        *plan.operator_options,
        0,
        needs,
    )


@needs_native
@pytest.mark.parametrize("name", ["sigmoid", "aot", "orpo"])
@pytest.mark.parametrize("needs", [0, 1, 31])
def test_opcheck_of_preference_loss(name, needs):
    arguments = operator_arguments(name, needs)
    for bit, tensor in zip((1, 2, 4, 8, 16), (*arguments[:4], arguments[6]), strict=True):
        tensor.requires_grad_(bool(needs & bit))
    torch.library.opcheck(torch.ops.fusedpo.preference_loss, arguments)


@needs_native
@pytest.mark.parametrize("shift", [None, 0.4])
def test_opcheck_of_unpaired_loss(shift):
    logps, _ = inputs_of(4, torch.float32)
    labels = torch.tensor([True, False, True, True])
    kl = None if shift is None else torch.tensor(shift)
    call = (*logps[:2], labels, kl, 0, 0.1, 0.2, 1.0, 1.5, 0, 5)
    torch.library.opcheck(torch.ops.fusedpo.unpaired_loss, call)


@needs_native
def test_empty_completions_are_found_in_either_side():
    has_empty, one, none = torch.ops.fusedpo.has_empty_completion, torch.ones(3), torch.zeros(3)
    one, none = one.long(), none.long()
    assert not has_empty(one, one)
    assert has_empty(one, none)
    assert has_empty(none, one)
    assert not has_empty(one[:0], one[:0])
    assert not has_empty(torch.tensor([1, 0, 2, 0])[::2], torch.tensor([1, 2]))
    torch.library.opcheck(torch.ops.fusedpo.has_empty_completion, (one, one))


@needs_native
def test_opcheck_of_loss_backward():
    gradients, order = torch.randn(6, 4), torch.stack([torch.randperm(4) for _ in range(2)])
    call = (torch.ones(()), torch.randn(4), gradients, order, 31, 1, 0, True)
    torch.library.opcheck(torch.ops.fusedpo.loss_backward, call)


@pytest.mark.parametrize("name", [["sigmoid", "bco_pair", "sft"], "aot", "simpo"])
def test_compiled_functions_equal_eager_ones(name):
    torch._dynamo.reset()
    logps, needs = inputs_of(5, torch.float32)

    def call(*inputs):
        out = fusedpo.preference_loss(*inputs[:4], chosen_nll=inputs[4], loss_type=name, **lengths)
        return out.loss, out.losses, out.margins

    nll = needs.pop("chosen_nll")
    lengths = needs
    want = call(*logps, nll)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(*logps, nll)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    inputs = [*logps, nll]
    grads = [torch.autograd.grad(o[0] + o[1].sum(), inputs, allow_unused=True) for o in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert (a is None and b is None) or torch.equal(
            torch.zeros(()) if a is None else a, torch.zeros_like(a) if b is None else b
        )


def test_compiled_unpaired_loss_equals_eager():
    torch._dynamo.reset()
    logps, _ = inputs_of(5, torch.float32)
    labels = torch.rand(5) > 0.5

    def call(policy, ref, kl):
        return fusedpo.unpaired_loss(policy, ref, labels, kl=kl).loss

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    kl = torch.tensor(0.3)
    grads = [torch.autograd.grad(f(*logps[:2], kl), logps[:2]) for f in (call, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
