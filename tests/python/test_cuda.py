"""What only a GPU has: bad labels without an error, streams, graphs, launches, waits.

In a rehearsal (FUSEDPO_TEST_DEVICE=cpu, see cuda_cases.py) the same bodies run with smaller sizes.
"""

from __future__ import annotations

import math

import fusedpo
import pytest
import torch
from contract_cases import ODD_VOCABULARY, LinearCase, both, forward_and_gradients, upstream
from cuda_cases import (  # noqa: F401  a fixture
    DEVICE,
    EMULATED,
    ON_GPU,
    Profile,
    arrives_late,
    captured,
    need_device,
    on_device,
    peak_bytes,
    side_stream,
    synchronize,
)
from fusedpo import reference
from logps_cases import (
    DTYPES,
    IGNORE,
    METRICS,
    assert_same_bits,
    autocast,
    leaf,
    make_head,
    make_logits,
    run_python,
    same_bits,
)
from loss_cases import PAIRED, SORTING, inputs_of, options_of

need_device()
pytestmark = pytest.mark.usefixtures("on_device")
gpu_only = pytest.mark.skipif(not ON_GPU, reason="rehearsal: holds on CUDA only")
cuda_only = pytest.mark.skipif(
    not (ON_GPU or EMULATED), reason="rehearsal: the CPU operators raise instead"
)

# ---- labels out of range ------------------------------------------------------------------------

BAD_LABELS = {3: -1, 8: ODD_VOCABULARY, 20: 2**40}


@cuda_only
@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_label_out_of_range_gives_nan_in_its_row_and_nowhere_else(case_type, dtype, monkeypatch):
    monkeypatch.delenv("FUSEDPO_CHECK", raising=False)
    case = case_type(dtype, ignored=0.0)
    labels, good = case.labels.clone(), torch.ones_like(case.labels, dtype=torch.bool)
    for row, value in BAD_LABELS.items():
        labels[row], good[row] = value, False
    clean, spoilt = forward_and_gradients(case), forward_and_gradients(case, labels=labels)
    for before, after in zip(clean[0], spoilt[0], strict=True):
        assert same_bits(after[good], before[good])
        assert not after[~good].any() if after.dtype == torch.bool else after[~good].isnan().all()
    assert same_bits(spoilt[1][0][good], clean[1][0][good])  # of logits, of hidden
    assert spoilt[1][0][~good].isnan().all()


CHECK = f"""
import torch, fusedpo
torch.set_default_device("{DEVICE}")
labels = torch.tensor([[1, 2, -100], [3, 99, -7]])
hidden, weight = torch.zeros(2, 3, 8), torch.zeros(50, 8)
for call in (
    lambda: fusedpo.token_logps(hidden @ weight.T, labels),
    lambda: fusedpo.linear_token_logps(hidden, weight, labels),
):
    try:
        call()
        print("no error")
    except RuntimeError as error:
        print(error)
"""


def test_fusedpo_check_names_the_first_bad_label():
    lines = run_python(CHECK, FUSEDPO_CHECK="1").splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "labels must be in [0, 50) or equal ignore_index (-100)" in line
        assert "got 99 at position (1, 1)" in line


def test_tensors_on_two_devices_are_refused_by_name():
    other = "cpu" if ON_GPU else "meta"
    labels = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="labels must be on the device of logits"):
        fusedpo.token_logps(torch.zeros(2, 5), labels.to(other))
    with pytest.raises(ValueError, match="weight must be on the device of hidden"):
        fusedpo.linear_token_logps(torch.zeros(2, 3), torch.zeros(5, 3, device=other), labels)


# ---- reproducibility ----------------------------------------------------------------------------

PRINT_DIGEST = f"""
import hashlib, torch
torch.set_default_device("{DEVICE}")
from contract_cases import LinearCase, TokenCase, forward_and_gradients
digest = hashlib.sha256()
for case_type in (TokenCase, LinearCase):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for tensors in forward_and_gradients(case_type(dtype, rows=300)):
            for t in tensors:
                digest.update(t.contiguous().view(torch.uint8).cpu().numpy().tobytes())
print(digest.hexdigest())
"""


def test_results_are_bit_equal_from_process_to_process():
    assert run_python(PRINT_DIGEST) == run_python(PRINT_DIGEST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_many_rows_in_several_chunks_are_bit_equal_from_run_to_run(dtype):
    rows = 9000 if ON_GPU else 300  # more than one chunk of rows, and a remainder
    case = LinearCase(dtype, rows=rows)
    first = forward_and_gradients(case)
    for _ in range(3):
        again = forward_and_gradients(case)
        assert_same_bits(again[0], first[0])
        assert_same_bits(again[1], first[1])


def test_a_batch_scored_whole_equals_its_halves_to_rounding():
    case = LinearCase(rows=9000 if ON_GPU else 300, ignored=0.1)
    whole = case(metrics=METRICS)
    half = len(case.labels) // 2
    for part in (slice(0, half), slice(half, None)):
        out = case([case.inputs[0][part], *case.inputs[1:]], case.labels[part], metrics=METRICS)
        for mine, his in zip(out[:4], whole[:4], strict=True):
            torch.testing.assert_close(mine, his[part], rtol=1e-5, atol=1e-5)


# ---- streams and devices ------------------------------------------------------------------------


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_another_stream_is_used_and_waits_for_a_late_producer(case_type, dtype):
    case = case_type(dtype)
    expected = forward_and_gradients(case)
    synchronize()
    with side_stream():
        *inputs, labels = arrives_late(*case.inputs, case.labels)
        results = forward_and_gradients(case, inputs, labels)
    assert_same_bits(results[0], expected[0])
    assert_same_bits(results[1], expected[1])


def test_a_loss_on_another_stream_waits_for_a_late_producer():
    logps, _ = inputs_of(9, torch.float32)
    expected = fusedpo.preference_loss(*logps, loss_type=["sigmoid", "aot"])
    synchronize()
    with side_stream():
        late = [t.requires_grad_() for t in arrives_late(*(t.detach() for t in logps))]
        out = fusedpo.preference_loss(*late, loss_type=["sigmoid", "aot"])
        gradient = torch.autograd.grad(out.loss, late[0])[0]
    assert_same_bits(
        (*(v.detach() for v in out), gradient),
        (*(v.detach() for v in expected), torch.autograd.grad(expected.loss, logps[0])[0]),
    )


@both
def test_tensors_on_a_device_that_is_not_the_current_one_stay_there(case_type):
    if ON_GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = case_type()
    expected = forward_and_gradients(case)
    device = torch.device("cuda", 1) if ON_GPU else DEVICE
    inputs, labels = [t.to(device) for t in case.inputs], case.labels.to(device)
    leaves = [leaf(t) for t in inputs]
    out = case(leaves, labels, metrics=METRICS)
    gradients = torch.autograd.grad(out.logps.sum() + out.entropy.sum(), leaves)
    assert all(t.device == device for t in (*out, *gradients))
    assert_same_bits(tuple(v.detach().to(DEVICE) for v in out), expected[0])


# ---- CUDA graphs --------------------------------------------------------------------------------


def change(tensors, seed):
    """New values in the old memory, as a training loop over a captured graph writes them."""
    with torch.no_grad():
        for index, t in enumerate(tensors):
            t.add_(0.3 * upstream(t.shape, seed + index).to(t.dtype))


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_scores_new_inputs_and_other_ignored_rows(case_type, dtype):
    case = case_type(dtype)
    leaves, labels = [leaf(t) for t in case.inputs], case.labels.clone()
    c = upstream(labels.shape)

    def step():
        out = case(leaves, labels, metrics=METRICS)
        gradients = torch.autograd.grad([out.logps, out.entropy], leaves, [c, c])
        return (*(v.detach() for v in out), *gradients)

    replay, results = captured(step)
    for seed in (5, 6):
        change(leaves, seed)
        labels.copy_(labels.roll(seed))  # as many rows are scored, but others
        labels[seed] = IGNORE  # and now one less
        replay()
        synchronize()
        ignored = labels == IGNORE
        assert not any(v[ignored].any() for v in results[:6])  # five outputs, the first gradient
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for mine, his in zip(results, step(), strict=True):
            if case_type is not LinearCase:  # behind a GEMM other rows give other roundings
                assert same_bits(mine, his)
            elif mine.dtype != torch.bool:
                limit = tolerance * max(1.0, his.abs().max().item())
                assert (mine.double() - his.double()).abs().max().item() <= limit


def test_a_graph_of_log_probs_and_loss_trains_as_eager_does():
    """Forward, loss, backward and the optimiser's step of a small head, replayed."""
    head = make_head(32, 16, 700, seed=2, ignored=0.2)
    labels = head.labels.view(4, 8)
    ref = fusedpo.linear_token_logps(head.hidden.view(4, 8, 16), head.weight, labels).logps
    ref_sums = ref.sum(1)

    def trainer():
        weight = leaf(head.weight)
        hidden = head.hidden.view(4, 8, 16)

        def step():
            logps = fusedpo.linear_token_logps(hidden, weight, labels).logps.sum(1)
            loss = fusedpo.preference_loss(
                *logps.chunk(2), *ref_sums.chunk(2), loss_type=["sigmoid", "hinge"]
            ).loss
            (gradient,) = torch.autograd.grad(loss, weight)
            with torch.no_grad():
                weight.sub_(0.05 * gradient)
            return (loss.detach(),)

        return weight, step

    eager_weight, eager = trainer()
    graph_weight, step = trainer()
    replay, (loss,) = captured(step)
    with torch.no_grad():
        graph_weight.copy_(head.weight)  # warming up has trained
    for _ in range(4):
        (expected,) = eager()
        if ON_GPU:
            replay()
        else:
            (loss,) = step()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(graph_weight, eager_weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in PAIRED if n != "sft"])
def test_every_loss_can_be_captured(name):
    logps, needs = inputs_of(6, torch.float32)
    needs["chosen_nll"] = needs["chosen_nll"].detach()
    options = options_of(name, **needs)

    def step():
        out = fusedpo.preference_loss(*logps, **options)
        return (out.loss.detach(), *torch.autograd.grad(out.loss, logps[:2]))

    replay, results = captured(step)
    change(logps, 3)
    replay()
    synchronize()
    assert_same_bits(results, step())
    assert name in SORTING or results[0].isfinite()


def test_an_unpaired_loss_can_be_captured():
    logps, _ = inputs_of(6, torch.float32)
    labels = torch.arange(6) % 2 == 0
    kl = torch.tensor(0.3)

    def step():
        out = fusedpo.unpaired_loss(*logps[:2], labels, kl=kl)
        return (out.loss.detach(), *torch.autograd.grad(out.loss, logps[:2]))

    replay, results = captured(step)
    change([kl, *logps], 4)
    replay()
    synchronize()
    assert_same_bits(results, step())


# ---- waits, launches, products ------------------------------------------------------------------


def linear_step(head, trained, **options):
    hidden = leaf(head.hidden)
    leaves = [hidden, leaf(head.weight)] if trained else [hidden]
    weight = leaves[-1] if trained else head.weight
    c = upstream(head.labels.shape)

    def step():
        out = fusedpo.linear_token_logps(hidden, weight, head.labels, **options)
        return torch.autograd.grad(out.logps, leaves, c)

    return step


@pytest.mark.parametrize("trained", [False, True])
def test_one_read_of_the_row_count_is_the_only_wait_behind_a_head(trained):
    head = make_head(300, 16, 1000, seed=1, ignored=0.3, dtype=torch.bfloat16)
    waits = Profile(linear_step(head, trained, metrics=METRICS)).synchronisations()
    assert len(waits) == (1 if ON_GPU else 0), waits


def test_log_probs_of_logits_never_wait():
    logits = leaf(make_logits(40, 1000, seed=1))
    labels = torch.arange(40)
    c = torch.ones(40)

    def step():
        out = fusedpo.token_logps(logits, labels, metrics=METRICS)
        return torch.autograd.grad(out.logps, logits, c)

    assert Profile(step).synchronisations() == []


LISTS = [
    ["sigmoid"],
    ["sigmoid", "bco_pair", "sft"],
    ["robust", "nca_pair", "aot"],
    ["ipo", "sigmoid_norm", "hinge"],
]


@pytest.mark.parametrize("names", LISTS, ids="+".join)
def test_a_list_of_losses_takes_two_launches_and_no_wait(names):
    logps, needs = inputs_of(64, torch.float32)
    options = {"loss_type": names, **needs}
    leaves = [*logps[:2], *([needs["chosen_nll"]] if "sft" in names else [])]
    one = torch.ones(())

    def step():
        out = fusedpo.preference_loss(*logps, **options)
        return torch.autograd.grad(out.loss, leaves, one)

    profile = Profile(step)
    # Empty completions are looked for on the CPU only, by an operator that launches nothing.
    launches = [name for name in profile.launches() if ON_GPU or "has_empty" not in name]
    assert 1 <= len(launches) <= 2, launches
    assert profile.synchronisations() == []


def test_the_profile_counts_multiply_adds():
    a, b = torch.ones(7, 11), torch.ones(11, 13)
    out, c = torch.ones(7, 13), torch.ones(7, 13)

    def step():
        torch.mm(a, b, out=out)
        torch.addmm(c, a, b)

    assert Profile(step).products() == 2 * 7 * 11 * 13


ROWS, KEPT, SIZE, VOCABULARY = 400, 128, 64, 5000


@gpu_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("case", "products"),
    [("no gradient", 1), ("frozen", 2), ("trained", 3), ("trained without budget", 4)],
)
def test_so_many_products_reach_the_gpu_and_no_more(case, products, dtype):
    # The CPU's counts are in test_gemm_count.py: MKL reports them, not torch's profiler.
    head = make_head(ROWS, SIZE, VOCABULARY, seed=1, dtype=dtype)
    head.labels[KEPT:] = IGNORE
    if case == "no gradient":
        profile = Profile(lambda: fusedpo.linear_token_logps(*head[:3], metrics=METRICS))
    else:
        budget = {"logits_budget_bytes": 0} if "without" in case else {}
        profile = Profile(linear_step(head, case != "frozen", metrics=METRICS, **budget))
    assert profile.products() / (KEPT * SIZE * VOCABULARY) == pytest.approx(products)


# ---- small gradients in half precision ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**12])
def test_small_and_large_upstream_gradients_stay_in_range(dtype, scale):
    # fp16 ends at 65504 and 6e-8: what is multiplied before the upstream gradient must be scaled.
    head = make_head(64, 16, 3000, seed=4, dtype=dtype)
    weight = leaf(head.weight.float())
    hidden = leaf(head.hidden.float())
    with autocast(dtype):
        out = fusedpo.linear_token_logps(hidden, weight, head.labels)
    gradients = torch.autograd.grad(out.logps, [hidden, weight], torch.full((64,), scale))
    x, w = leaf(head.hidden.double()), leaf(head.weight.double())
    exact = reference.linear_token_logps(x, w, head.labels).logps
    want = torch.autograd.grad(exact, [x, w], torch.full((64,), scale, dtype=torch.float64))
    for mine, his in zip(gradients, want, strict=True):
        assert mine.isfinite().all()
        assert ((mine.double() - his).norm() / his.norm()).item() < 16 * torch.finfo(dtype).eps
    assert math.isfinite(out.logps.sum().item())
