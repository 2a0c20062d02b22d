"""The numerical contract of docs/design.md, one test per promise, for both operators."""

from __future__ import annotations

import math

import fusedpo
import pytest
import torch
from fusedpo import reference
from logps_cases import (
    DTYPES,
    IGNORE,
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

# A vocabulary that no vector width, segment or tile divides, and wider than one GEMM tile.
ODD_VOCABULARY = 5003


class TokenCase:
    """token_logps on 21 rows; `inputs` are the differentiable ones."""

    name = "token_logps"

    def __init__(self, dtype=torch.float32, rows=21, ignored=0.3, vocabulary=ODD_VOCABULARY):
        self.inputs = [make_logits(rows, vocabulary, seed=1, dtype=dtype)]
        self.labels = make_labels(rows, vocabulary, seed=1, ignored=ignored)

    def __call__(self, inputs=None, labels=None, **options):
        (logits,) = self.inputs if inputs is None else inputs
        options.setdefault("temperature", 0.9)
        return fusedpo.token_logps(logits, self.labels if labels is None else labels, **options)


class LinearCase:
    """linear_token_logps with a trained head and a bias on 21 rows."""

    name = "linear_token_logps"

    def __init__(self, dtype=torch.float32, rows=21, ignored=0.3, vocabulary=ODD_VOCABULARY):
        head = make_head(rows, 16, vocabulary, seed=1, dtype=dtype, bias=True, ignored=ignored)
        self.inputs = [head.hidden, head.weight, head.bias]
        self.labels = head.labels

    def __call__(self, inputs=None, labels=None, **options):
        hidden, weight, bias = self.inputs if inputs is None else inputs
        labels = self.labels if labels is None else labels
        options = {"temperature": 0.9, "softcap": 30.0, **options}
        return fusedpo.linear_token_logps(hidden, weight, labels, bias=bias, **options)


both = pytest.mark.parametrize("case_type", [TokenCase, LinearCase], ids=lambda c: c.name)


def upstream(shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def forward_and_gradients(case, inputs=None, labels=None, **options):
    """All outputs, and the gradients of a random combination of logps and entropy."""
    leaves = [leaf(t) for t in (case.inputs if inputs is None else inputs)]
    out = case(leaves, labels, metrics=METRICS, **options)
    loss = (
        upstream(out.logps.shape) * out.logps + upstream(out.logps.shape, 4) * out.entropy
    ).sum()
    return tuple(v.detach() for v in out), torch.autograd.grad(loss, leaves)


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
from test_contract import TokenCase, LinearCase, forward_and_gradients
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
    for count in (2, 3, 7):
        with threads(count):
            many = forward_and_gradients(case)
        assert_same_bits(many[0], one[0])
        assert_same_bits(many[1], one[1])


def test_batch_order_only_permutes_the_results():
    case = TokenCase(rows=50)
    outputs, (gradient,) = forward_and_gradients(case)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
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
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
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


# --- sizes and extremes --------------------------------------------------------------------------


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
