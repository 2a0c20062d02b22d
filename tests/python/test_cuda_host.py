"""What the CUDA operators do that the CPU's do not, over emulated kernels (`make cuda-host-ops`).

The operators' own tests run over the emulation, too; here is the rest: graph capture, labels out of
range, chunks of rows, fp16's range.
"""

from __future__ import annotations

import cuda_host_ops
import fusedpo
import pytest
import torch
from logps_cases import IGNORE, METRICS, assert_same_bits, leaf, make_head, make_labels, make_logits

pytestmark = pytest.mark.skipif(
    not cuda_host_ops.LIBRARY, reason="needs the emulated CUDA operators: make cuda-host-ops"
)

BAD = 7  # the position of a label out of range


def linear(head, grad="hwbl", dtype=torch.float32, **options):
    """Outputs and gradients of a call whose loss weighs every position differently."""
    tensors = dict(zip("hwb", (head.hidden, head.weight, head.bias), strict=True))
    leaves = {name: leaf(t) if name in grad else t for name, t in tensors.items()}
    lora = head.lora
    if lora is not None and "l" in grad:
        lora = (leaf(lora[0]), leaf(lora[1]), lora[2])
    out = fusedpo.linear_token_logps(
        leaves["h"], leaves["w"], head.labels, bias=leaves["b"], lora=lora, **options
    )
    scale = torch.linspace(-1, 2, head.labels.numel())
    loss = (scale * out.logps).sum()
    if out.entropy is not None:
        loss = loss + (scale.flip(0) * out.entropy).sum()
    wanted = [t for name, t in leaves.items() if name in grad and t is not None]
    wanted += list(lora[:2]) if lora is not None and "l" in grad else []
    return tuple(x.detach() for x in out if x is not None), torch.autograd.grad(loss, wanted)


def assert_close(ours, theirs, **tolerance):
    for mine, his in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, his, **tolerance)


def assert_near(mine, his, share):
    """Within a share of the largest entry."""
    largest = his.abs().max().item()
    error = (mine.double() - his.double()).abs().max().item()
    assert error <= share * largest, f"off by {error}, the largest is {largest}"


CAPTURED = pytest.mark.parametrize("captured", [False, True])


def capturing(monkeypatch, captured):
    monkeypatch.setenv("FUSEDPO_TEST_CAPTURING", "1" if captured else "0")


# ---- graph capture ------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 20_000, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("metrics", [(), METRICS], ids=["logps", "all"])
def test_a_captured_step_gives_the_results_of_an_eager_one(monkeypatch, dtype, metrics, budget):
    head = make_head(45, 16, 331, seed=1, dtype=dtype, bias=True, rank=3, ignored=0.4)
    results = []
    for captured in (False, True):
        capturing(monkeypatch, captured)
        results.append(linear(head, metrics=metrics, logits_budget_bytes=budget))
    # Sums over rows run over other chunks.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert_close(results[0][1], results[1][1], rtol=tolerance, atol=tolerance)


@CAPTURED
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_at_ignored_positions_reaches_a_result(monkeypatch, captured, value):
    capturing(monkeypatch, captured)
    head = make_head(40, 16, 133, seed=2, bias=True, ignored=0.5)
    spoiled = head.hidden.masked_fill((head.labels == IGNORE)[:, None], value)
    for budget in (0, None):
        expected = linear(head, "hwb", metrics=METRICS, logits_budget_bytes=budget)
        got = linear(
            head._replace(hidden=spoiled), "hwb", metrics=METRICS, logits_budget_bytes=budget
        )
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])


@CAPTURED
def test_upstream_gradients_at_ignored_positions_reach_no_gradient(monkeypatch, captured):
    capturing(monkeypatch, captured)
    head = make_head(40, 16, 133, seed=3, ignored=0.5)
    for budget in (0, None):
        results = []
        for value in (0.0, float("nan")):
            hidden, weight = leaf(head.hidden), leaf(head.weight)
            logps = fusedpo.linear_token_logps(
                hidden, weight, head.labels, logits_budget_bytes=budget
            ).logps
            upstream = torch.ones(40).masked_fill(head.labels == IGNORE, value)
            results.append(torch.autograd.grad(logps, [hidden, weight], upstream))
        assert_same_bits(*results)


@pytest.mark.parametrize(("forward", "backward"), [(False, True), (True, False)])
def test_forward_and_backward_may_be_captured_apart(monkeypatch, forward, backward):
    head = make_head(40, 16, 133, seed=4, ignored=0.5)
    results = []
    for of_forward, of_backward in ((False, False), (forward, backward)):
        capturing(monkeypatch, of_forward)
        hidden, weight = leaf(head.hidden), leaf(head.weight)
        logps = fusedpo.linear_token_logps(hidden, weight, head.labels).logps
        capturing(monkeypatch, of_backward)
        results.append(torch.autograd.grad(logps.sum(), [hidden, weight]))
    assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_number_of_scored_rows_is_read_once_and_never_under_capture(monkeypatch):
    head = make_head(40, 16, 133, seed=5, ignored=0.5)
    arguments = (head.hidden, head.weight, None, None, None, head.labels, IGNORE, 1.0, 0.0, 1.0)
    counts = []
    for captured in (False, True):
        capturing(monkeypatch, captured)
        out = torch.ops.fusedpo.linear_token_logps(*arguments, 0, torch.float32, 4096, 1, 0)
        counts.append(out[-1].item())
    assert counts == [int((head.labels != IGNORE).sum()), -1]


# ---- labels out of range ------------------------------------------------------------------------


def with_bad_label(labels, label):
    return labels.index_fill(0, torch.tensor([BAD]), label)


@CAPTURED
@pytest.mark.parametrize("label", [-1, 133])
def test_a_label_out_of_range_gives_nan_in_its_own_row_of_logits(monkeypatch, captured, label):
    capturing(monkeypatch, captured)
    monkeypatch.setenv("FUSEDPO_CHECK", "0")
    logits, labels = make_logits(20, 133, seed=6), make_labels(20, 133, seed=6)
    results = []
    for y in (labels, with_bad_label(labels, label)):
        x = leaf(logits)
        out = fusedpo.token_logps(x, y, metrics=METRICS)
        out.logps.sum().backward()
        results.append((*(v.detach() for v in out), x.grad))
    for good, bad in zip(*results, strict=True):
        others = torch.arange(20) != BAD
        assert torch.equal(good[others], bad[others])
        assert not bad[BAD].any() if bad.dtype == torch.bool else bad[BAD].isnan().all()


@CAPTURED
def test_a_label_out_of_range_gives_nan_in_its_own_row_of_the_head(monkeypatch, captured):
    capturing(monkeypatch, captured)
    monkeypatch.setenv("FUSEDPO_CHECK", "0")
    head = make_head(20, 16, 133, seed=7)
    results = []
    for labels in (head.labels, with_bad_label(head.labels, 133)):
        hidden = leaf(head.hidden)
        out = fusedpo.linear_token_logps(hidden, head.weight, labels, metrics=METRICS)
        out.logps.sum().backward()
        results.append((*(v.detach() for v in out), hidden.grad))
    for good, bad in zip(*results, strict=True):
        others = torch.arange(20) != BAD
        assert torch.equal(good[others], bad[others])
        assert not bad[BAD].any() if bad.dtype == torch.bool else bad[BAD].isnan().all()


@pytest.mark.parametrize("name", ["token_logps", "linear_token_logps"])
def test_fusedpo_check_names_the_first_bad_label_but_not_under_capture(monkeypatch, name):
    head = make_head(20, 16, 133, seed=8)
    labels = with_bad_label(head.labels, 140)

    def call():
        if name == "token_logps":
            return fusedpo.token_logps(make_logits(20, 133, seed=8), labels)
        return fusedpo.linear_token_logps(head.hidden, head.weight, labels)

    monkeypatch.setenv("FUSEDPO_CHECK", "1")
    with pytest.raises(RuntimeError, match=r"\[0, 133\).*got 140 at position \(7,\)"):
        call()
    capturing(monkeypatch, True)
    assert call().logps[BAD].isnan()


# ---- chunks, casts and fp16's range -------------------------------------------------------------


@pytest.mark.parametrize("budget", [0, 12_000, 50_000, None])
@pytest.mark.parametrize("autocast", [False, True])
def test_many_chunks_and_cast_tiles_give_the_results_of_the_reference(
    monkeypatch, budget, autocast
):
    # 70 rows of 601 are five chunks; under autocast the weight is cast in three tiles.
    monkeypatch.setattr("fusedpo.logps._vocab_tile", lambda *_: 256)
    head = make_head(70, 48, 601, seed=9, bias=True, rank=3, ignored=0.2)
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for function in (fusedpo.linear_token_logps, fusedpo.reference.linear_token_logps):
            tensors = [leaf(t) for t in (head.hidden, head.weight, head.bias, *head.lora[:2])]
            hidden, weight, bias, lora_a, lora_b = tensors
            out = function(
                hidden,
                weight,
                head.labels,
                bias=bias,
                lora=(lora_a, lora_b, 0.5),
                softcap=20.0,
                logits_budget_bytes=budget,
            )
            upstream = torch.linspace(-1, 2, 70)
            results.append((out.logps, *torch.autograd.grad((upstream * out.logps).sum(), tensors)))
    for mine, his in zip(*results, strict=True):
        assert mine.dtype == his.dtype
        assert_near(mine, his, 6e-2 if autocast else 1e-4)


def test_a_weight_that_no_product_reads_in_place_is_copied_in_tiles(monkeypatch):
    # Neither rows nor columns are dense. 601 entries are three tiles.
    monkeypatch.setattr("fusedpo.logps._vocab_tile", lambda *_: 256)
    head = make_head(40, 48, 601, seed=12, ignored=0.2)
    spread = head.weight.repeat_interleave(2, 1)[:, ::2]
    results = []
    for budget in (0, None):
        for weight in (head.weight, spread):
            got = linear(head._replace(weight=weight), "hw", logits_budget_bytes=budget)
            results.append((*got[0], *got[1]))
    for other in results[1:]:
        assert_close(other, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=str)
def test_fp16_keeps_upstream_gradients_of_any_size(scale, budget, weight_dtype):
    head = make_head(24, 16, 133, seed=10, dtype=torch.float16)
    hidden, weight = leaf(head.hidden.to(weight_dtype)), leaf(head.weight.to(weight_dtype))
    plain = [leaf(t.double()) for t in (head.hidden, head.weight)]
    with torch.autocast("cpu", torch.float16, enabled=weight_dtype == torch.float32):
        out = fusedpo.linear_token_logps(hidden, weight, head.labels, logits_budget_bytes=budget)
    want = fusedpo.reference.linear_token_logps(*plain, head.labels)
    upstream = torch.linspace(-1, 1, 24) * scale
    ours = torch.autograd.grad(out.logps, [hidden, weight], upstream)
    theirs = torch.autograd.grad(want.logps, plain, upstream.double())
    for mine, his in zip(ours, theirs, strict=True):
        # A gradient that is returned in fp16 has its range.
        smallest = torch.finfo(weight_dtype).smallest_normal if weight_dtype == torch.float16 else 0
        error = (mine.double() - his).abs().max()
        largest = his.abs().max()
        if largest < 6e4 or weight_dtype == torch.float32:
            assert error <= 1e-2 * largest + smallest


@pytest.mark.parametrize("budget", [0, None])
@pytest.mark.parametrize("temperature", [0.004, 1.0, 250.0])
def test_fp16_holds_the_gradients_of_steep_and_of_flat_logits(budget, temperature):
    head = make_head(24, 16, 133, seed=13, dtype=torch.float16)
    ours = [leaf(head.hidden), leaf(head.weight)]
    out = fusedpo.linear_token_logps(
        *ours, head.labels, temperature=temperature, logits_budget_bytes=budget
    )
    ours = torch.autograd.grad(out.logps.sum() / 64, ours)
    plain = [leaf(t.double()) for t in (head.hidden, head.weight)]
    want = fusedpo.reference.linear_token_logps(*plain, head.labels, temperature=temperature)
    theirs = torch.autograd.grad(want.logps.sum() / 64, plain)
    for mine, his in zip(ours, theirs, strict=True):
        # Logits are rounded to fp16, and a steep softmax makes much of it: 20 / 0.004 nats apart.
        assert_near(mine, his, 2e-2)


def test_gradients_of_hidden_from_kept_rows_are_whole():
    # Not asked by the package itself, which forms them in forward; a caller of the operator may.
    head = make_head(30, 16, 133, seed=11, ignored=0.3)
    tensors = (head.hidden, head.weight, None, None, None)
    options = (IGNORE, 1.0, 0.0, 1.0)
    out = torch.ops.fusedpo.linear_token_logps(
        *tensors, head.labels, *options, 0, torch.float32, 4096, 1, 30
    )
    stats, unit, _, kept, anchors, count = out[5:]
    upstream = torch.linspace(-1, 2, 30)
    saved = (head.labels, None, stats, kept, anchors, count)
    recomputed = torch.ops.fusedpo.linear_token_logps_backward(
        upstream, None, *tensors, *saved, *options, torch.float32, 4096, 1
    )[0]
    scaled = torch.ops.fusedpo.linear_token_logps_backward_hidden(
        upstream, unit, head.labels, IGNORE, torch.float32
    )
    torch.testing.assert_close(recomputed, scaled, rtol=1e-5, atol=1e-5)


def test_logits_of_any_layout_are_written_in_place():
    # Five leading dimensions that do not merge: more than a kernel walks.
    base = torch.randn(2, 2, 2, 2, 2, 12)
    logits = base.permute(4, 2, 0, 3, 1, 5)
    labels = torch.randint(12, logits.shape[:-1])
    results = []
    for inplace in (False, True):
        x = leaf(logits)
        computed = (x * 1.0).permute(2, 4, 1, 3, 0, 5).contiguous().permute(4, 2, 0, 3, 1, 5)
        out = fusedpo.token_logps(computed, labels, inplace_backward=inplace)
        (out.logps * torch.arange(32.0).view(labels.shape)).sum().backward()
        results.append((out.logps.detach(), x.grad))
    assert_same_bits(*results)


# ---- losses -------------------------------------------------------------------------------------


def test_a_list_longer_than_the_kernel_takes_is_refused_with_the_remedy():
    logps = torch.zeros(3)
    names = ["sigmoid"] * 33
    with pytest.raises(RuntimeError, match=r"at most 32.*got 33.*adding their weights"):
        fusedpo.preference_loss(logps, logps, logps, logps, loss_type=names)


@pytest.mark.parametrize("kl", [-3.0, 0.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_kl_on_the_device_equals_the_number(kl, dtype):
    logps, ref = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -11.0])
    labels = torch.tensor([True, False])
    results = [
        fusedpo.unpaired_loss(logps, ref, labels, kl=value).loss
        for value in (kl, torch.tensor(kl, dtype=dtype))
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)
