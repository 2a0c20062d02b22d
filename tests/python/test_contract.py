"""The numerical contract of docs/design.md, one test per promise, for both operators."""

from __future__ import annotations

import math

import fusedpo
import pytest
import torch
from contract_cases import (
    ODD_VOCABULARY,
    LinearCase,
    TokenCase,
    both,
    forward_and_gradients,
    upstream,
)
from logps_cases import (
    DTYPES,
    IGNORE,
    METRICS,
    assert_same_bits,
    generator,
    leaf,
    needs_native,
    run_python,
    same_bits,
    threads,
)

# --- precision of sums ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_over_half_precision_logits_run_in_float32_at_least(dtype):
    # 40000 equal terms: a sum in bf16 stalls at 256, one in fp16 at 2048.
    out = fusedpo.token_logps(
        torch.zeros(1, 40_000, dtype=dtype), torch.tensor([3]), metrics=METRICS
    )
    assert out.logps.dtype == torch.float32
    assert out.logps.item() == pytest.approx(-math.log(40_000), rel=1e-6)
    assert out.entropy.item() == pytest.approx(math.log(40_000), rel=1e-6)
    ones = fusedpo.token_logps(
        torch.ones(1, 40_000, dtype=dtype), torch.tensor([3]), metrics=("mean_logits",)
    )
    assert ones.mean_logits.item() == pytest.approx(1.0, rel=1e-6)


@both
def test_float64_inputs_are_computed_in_float64(case_type):
    case = case_type(torch.float64)
    outputs, gradients = forward_and_gradients(case)
    assert all(v.dtype in (torch.float64, torch.bool) for v in (*outputs, *gradients))
    # Noise below float32's resolution must be visible in the result.
    moved = [t + 1e-11 * upstream(t.shape, 7).double() for t in case.inputs]
    before, after = case().logps, case(moved).logps
    changed = (after - before).abs()
    assert 0 < changed.max() < 1e-8


# --- reproducibility -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logps_with_and_without_gradient_are_bit_equal(case_type, dtype):
    case = case_type(dtype)
    plain = case(metrics=METRICS)
    with torch.no_grad():
        assert_same_bits(tuple(case([leaf(t) for t in case.inputs], metrics=METRICS)), tuple(plain))
    with torch.inference_mode():
        inference = tuple(case(metrics=METRICS))
    assert_same_bits(tuple(v.clone() for v in inference), tuple(plain))
    for wanted in range(1, 2 ** len(case.inputs)):
        inputs = [leaf(t) if wanted >> i & 1 else t for i, t in enumerate(case.inputs)]
        out = case(inputs, metrics=METRICS)
        assert out.logps.requires_grad
        assert_same_bits(tuple(v.detach() for v in out), tuple(plain))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_asking_for_a_metric_changes_no_bit_of_logps_or_of_its_gradient(case_type, dtype):
    case = case_type(dtype)
    results = []
    for metrics in ((), ("entropy",), ("is_top1", "mean_logits"), METRICS):
        leaves = [leaf(t) for t in case.inputs]
        logps = case(leaves, metrics=metrics).logps
        gradients = torch.autograd.grad((upstream(logps.shape) * logps).sum(), leaves)
        results.append((logps.detach(), *gradients))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_are_bit_equal_from_run_to_run(case_type, dtype):
    case = case_type(dtype)
    first = forward_and_gradients(case)
    for _ in range(3):
        again = forward_and_gradients(case)
        assert_same_bits(again[0], first[0])
        assert_same_bits(again[1], first[1])


PRINT_DIGEST = """
import hashlib
import torch
from contract_cases import LinearCase, TokenCase, forward_and_gradients
digest = hashlib.sha256()
for case_type in (TokenCase, LinearCase):
    for dtype in (torch.float32, torch.bfloat16):
        for tensors in forward_and_gradients(case_type(dtype)):
            for t in tensors:
                digest.update(t.contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_results_are_bit_equal_from_process_to_process():
    assert run_python(PRINT_DIGEST) == run_python(PRINT_DIGEST)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_thread_count_does_not_change_the_result(case_type, dtype):
    case = case_type(dtype, rows=67)
    with threads(1):
        one = forward_and_gradients(case)
    for count in (2, 3, 8):
        with threads(count):
            many = forward_and_gradients(case)
        assert_same_bits(many[0], one[0])
        assert_same_bits(many[1], one[1])


def test_batch_order_only_permutes_the_results():
    case = TokenCase(rows=50)
    outputs, (gradient,) = forward_and_gradients(case)
    order = torch.randperm(50, generator=generator(2))
    for name, whole, alone in zip(
        ("logps", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        outputs,
        case([case.inputs[0][order]], case.labels[order], metrics=METRICS),
        strict=True,
    ):
        assert same_bits(whole[order], alone), name
    leaves = [leaf(case.inputs[0][order])]
    out = case(leaves, case.labels[order], metrics=METRICS)
    loss = (upstream((50,))[order] * out.logps + upstream((50,), 4)[order] * out.entropy).sum()
    assert same_bits(torch.autograd.grad(loss, leaves)[0], gradient[order])


def test_batch_order_behind_a_gemm_permutes_the_results_to_rounding():
    case = LinearCase(rows=50)
    order = torch.randperm(50, generator=generator(2))
    hidden, weight, bias = case.inputs
    whole = case(metrics=METRICS)
    moved = case([hidden[order], weight, bias], case.labels[order], metrics=METRICS)
    torch.testing.assert_close(moved.logps, whole.logps[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.entropy, whole.entropy[order], rtol=1e-5, atol=1e-5)


# --- ignored positions ---------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("junk", [1e4, math.nan, math.inf], ids=str)
def test_values_at_ignored_positions_change_nothing_bit_for_bit(case_type, dtype, junk):
    case = case_type(dtype)
    ignored = case.labels == IGNORE
    assert 0 < ignored.sum() < len(ignored)
    spoilt = case.inputs[0].masked_fill(ignored.unsqueeze(1), junk)
    inputs = [spoilt, *case.inputs[1:]]
    clean, poisoned = forward_and_gradients(case), forward_and_gradients(case, inputs)
    assert_same_bits(poisoned[0], clean[0])
    assert_same_bits(poisoned[1], clean[1])
    assert not poisoned[1][0][ignored].any()


@both
def test_upstream_gradients_at_ignored_positions_change_nothing_bit_for_bit(case_type):
    case = case_type()
    ignored = case.labels == IGNORE
    gradients = []
    for junk in (0.0, 1e6, math.nan):
        leaves = [leaf(t) for t in case.inputs]
        out = case(leaves, metrics=("entropy",))
        g = upstream(out.logps.shape).masked_fill(ignored, junk)
        gradients.append(torch.autograd.grad([out.logps, out.entropy], leaves, [g, g]))
    assert_same_bits(gradients[1], gradients[0])
    assert_same_bits(gradients[2], gradients[0])


@both
def test_padding_changes_nothing(case_type):
    # Behind a GEMM, too: padding rows never reach it, so it sees the same matrices.
    case = case_type()
    padded = [torch.cat([case.inputs[0], torch.full_like(case.inputs[0][:9], math.nan)])]
    labels = torch.cat([case.labels, torch.full((9,), IGNORE)])
    rows = len(case.labels)
    plain = case(metrics=METRICS)
    out = case(padded + case.inputs[1:], labels, metrics=METRICS)
    assert_same_bits(tuple(v[:rows] for v in out), tuple(plain))
    assert not any(v[rows:].any() for v in out)


@both
def test_where_the_ignored_rows_stand_changes_nothing(case_type):
    case = case_type(ignored=0.0)
    rows = len(case.labels)
    slots = torch.arange(rows) * 2 + 1
    spread = torch.full((2 * rows + 1, case.inputs[0].shape[1]), math.nan)
    spread[slots] = case.inputs[0]
    labels = torch.full((2 * rows + 1,), IGNORE)
    labels[slots] = case.labels
    out = case([spread, *case.inputs[1:]], labels, metrics=METRICS)
    assert_same_bits(tuple(v[slots] for v in out), tuple(case(metrics=METRICS)))


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_rows_ignored_gives_zeros_and_a_connected_graph(case_type, dtype):
    case = case_type(dtype)
    outputs, gradients = forward_and_gradients(case, labels=torch.full_like(case.labels, IGNORE))
    assert all(not v.any() for v in outputs)
    for gradient, tensor in zip(gradients, case.inputs, strict=True):
        assert gradient.shape == tensor.shape
        assert gradient.dtype == tensor.dtype
        assert not gradient.any()


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)], ids=str)
def test_no_rows_give_empty_results_and_zero_gradients(case_type, dtype, shape):
    case = case_type(dtype, rows=0)
    first = (
        case.inputs[0].view(*shape, -1)
        if 0 not in shape
        else case.inputs[0].new_zeros(*shape, case.inputs[0].shape[1])
    )
    outputs, gradients = forward_and_gradients(
        case, [first, *case.inputs[1:]], torch.zeros(shape, dtype=torch.int64)
    )
    assert all(v.shape == shape for v in outputs)
    assert gradients[0].shape == first.shape
    assert not any(g.any() for g in gradients[1:])


# --- labels --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("value", [-1, -101, ODD_VOCABULARY, 2**40])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_label_out_of_range_is_named_with_its_first_position(case_type, value, gradient):
    case = case_type(rows=24)
    labels = case.labels.clone().view(2, 3, 4)
    labels[1, 0, 2] = value
    labels[1, 2, 3] = value - 1
    inputs = [case.inputs[0].view(2, 3, 4, -1), *case.inputs[1:]]
    inputs = [leaf(t) for t in inputs] if gradient else inputs
    with pytest.raises(RuntimeError) as error:
        case(inputs, labels)
    message = str(error.value)
    assert f"labels must be in [0, {ODD_VOCABULARY}) or equal ignore_index (-100)" in message
    assert f"got {value} at position (1, 0, 2)" in message


@both
def test_the_position_of_a_bad_label_reads_as_an_index_in_one_dimension(case_type):
    case = case_type()
    labels = case.labels.clone()
    labels[7] = -3
    with pytest.raises(RuntimeError, match=r"got -3 at position \(7,\)"):
        case(labels=labels)


# --- use of the graph ----------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_second_backward_through_a_retained_graph_gives_the_same_bits(case_type, dtype):
    case = case_type(dtype)
    leaves = [leaf(t) for t in case.inputs]
    out = case(leaves, metrics=("entropy",))
    loss = (upstream(out.logps.shape) * out.logps - out.entropy).sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_same_bits(second, first)
    # And another loss of the same outputs still finds everything intact.
    third = torch.autograd.grad(3 * out.logps.sum(), leaves)
    fresh = [leaf(t) for t in case.inputs]
    assert_same_bits(third, torch.autograd.grad(3 * case(fresh).logps.sum(), fresh))


@both
def test_gradients_accumulate_over_micro_batches(case_type):
    case = case_type()
    leaves = [leaf(t) for t in case.inputs]
    expected = [torch.zeros_like(t) for t in leaves]
    for step in range(3):
        case(leaves).logps.mul(step + 1).sum().backward()
        alone = [leaf(t) for t in case.inputs]
        gradients = torch.autograd.grad(case(alone).logps.mul(step + 1).sum(), alone)
        expected = [e + g for e, g in zip(expected, gradients, strict=True)]
    assert_same_bits(tuple(t.grad for t in leaves), tuple(expected))


@both
def test_upstream_gradients_may_be_expanded_or_strided(case_type):
    case = case_type(rows=24)
    labels = case.labels.view(4, 6)

    def gradients(upstream_gradient):
        inputs = [leaf(case.inputs[0].view(4, 6, -1)), *(leaf(t) for t in case.inputs[1:])]
        out = case(inputs, labels, metrics=("entropy",))
        g = [upstream_gradient, upstream_gradient]
        return torch.autograd.grad([out.logps, out.entropy], inputs, g)

    ones = gradients(torch.ones(4, 6))
    assert_same_bits(gradients(torch.ones(()).expand(4, 6)), ones)
    dense = upstream((4, 6))
    expected = gradients(dense)
    assert_same_bits(gradients(dense.t().contiguous().t()), expected)
    assert_same_bits(gradients(dense.repeat_interleave(2, dim=1)[:, ::2]), expected)
    assert_same_bits(
        gradients(upstream((4, 1)).expand(4, 6)), gradients(upstream((4, 1)).repeat(1, 6))
    )


@both
def test_upstream_gradients_of_either_output_may_be_missing(case_type):
    case = case_type()

    def gradients(weights):
        leaves = [leaf(t) for t in case.inputs]
        out = case(leaves, metrics=("entropy",))
        return torch.autograd.grad(
            sum((w * v).sum() for w, v in zip(weights, out[:2], strict=True) if w), leaves
        )

    for logps_alone, entropy_alone, together in zip(
        gradients((1.0, None)), gradients((None, 1.0)), gradients((1.0, 1.0)), strict=True
    ):
        torch.testing.assert_close(logps_alone + entropy_alone, together, rtol=1e-4, atol=2e-5)


@both
def test_a_zero_upstream_gradient_gives_a_zero_gradient(case_type):
    case = case_type()
    leaves = [leaf(t) for t in case.inputs]
    out = case(leaves)
    (0.0 * out.logps).sum().backward()
    assert not any(t.grad.any() for t in leaves)


@needs_native
@both
def test_changing_an_input_before_backward_is_noticed(case_type):
    case = case_type()
    held = [leaf(t) for t in case.inputs]
    inputs = [t * 1 for t in held]
    loss = case(inputs, metrics=("entropy",)).entropy.sum()
    with torch.no_grad():
        inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_native
@both
def test_a_second_derivative_is_refused(case_type):
    case = case_type()
    leaves = [leaf(t) for t in case.inputs]
    first = torch.autograd.grad(case(leaves).logps.sum(), leaves, create_graph=True)
    norm = sum(g.square().sum() for g in first)
    with pytest.raises(RuntimeError, match="second derivative"):
        norm.backward()


# --- writing the gradient over the logits --------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_written_over_the_logits_has_the_bits_of_a_new_one(dtype):
    case = TokenCase(dtype)
    gradients = []
    for inplace in (False, True):
        x = leaf(case.inputs[0])
        out = case([x * 1], metrics=METRICS, inplace_backward=inplace)
        (upstream(out.logps.shape) * out.logps - out.entropy).sum().backward()
        gradients.append((x.grad,))
    assert_same_bits(*gradients)


@needs_native
def test_inplace_backward_uses_the_memory_of_the_logits_and_bumps_their_version():
    case = TokenCase()
    x = leaf(case.inputs[0])
    logits = x * 1
    seen = []
    logits.register_hook(lambda g: seen.append(g.data_ptr()))
    version = logits._version
    case([logits], inplace_backward=True).logps.sum().backward()
    assert seen == [logits.data_ptr()]
    assert logits._version > version


@needs_native
def test_inplace_backward_refuses_a_second_backward():
    case = TokenCase()
    logits = leaf(case.inputs[0]) * 1
    loss = case([logits], inplace_backward=True).logps.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        loss.backward()


@needs_native
def test_inplace_backward_is_noticed_by_others_who_need_the_logits():
    case = TokenCase()
    logits = leaf(case.inputs[0]) * 1
    other = logits.square().sum()  # needs the logits in its backward
    case([logits], inplace_backward=True).logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
