"""token_logps and pair_logps as public functions: values, shapes, dtypes, layouts, metrics."""

from __future__ import annotations

import fusedpo
import pytest
import torch
from fusedpo import reference
from logps_cases import (
    DTYPES,
    IGNORE,
    METRICS,
    assert_same_bits,
    generator,
    leaf,
    make_labels,
    make_logits,
    same_bits,
)

# A few roundings of the compute type. The tight bounds are in test_accuracy.py; here the question
# is whether the right thing is computed.
CLOSE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 3e-6, "atol": 3e-6},
    torch.bfloat16: {"rtol": 1e-2, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-6},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Tails in every vector width and tile; one column is the degenerate softmax.
@pytest.mark.parametrize("vocabulary", [1, 2, 127, 1000, 4099])
def test_values_and_gradients_equal_the_reference(dtype, vocabulary):
    logits = make_logits(33, vocabulary, seed=vocabulary, dtype=dtype)
    labels = make_labels(33, vocabulary, seed=vocabulary, ignored=0.3)
    upstream = torch.randn(2, 33, generator=generator(1), dtype=torch.float64)
    results = []
    for function in (fusedpo.token_logps, reference.token_logps):
        x = leaf(logits)
        out = function(x, labels, temperature=0.7, metrics=METRICS)
        (upstream[0] * out.logps + upstream[1] * out.entropy).sum().backward()
        results.append((*out, x.grad))
    (*ours, our_grad), (*theirs, their_grad) = results
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, mine, his in zip(reference.TokenLogps._fields, ours, theirs, strict=True):
        assert mine.shape == labels.shape, name
        assert mine.dtype == (torch.bool if name == "is_top1" else wide), name
        torch.testing.assert_close(mine, his, **CLOSE[wide], msg=lambda m, n=name: f"{n}: {m}")
    assert our_grad.dtype == dtype
    torch.testing.assert_close(our_grad, their_grad, **CLOSE[dtype])


def test_a_metric_that_was_not_named_is_none():
    logits, labels = make_logits(5, 9, seed=0), make_labels(5, 9, seed=0)
    everything = fusedpo.token_logps(logits, labels, metrics=METRICS)
    assert fusedpo.token_logps(logits, labels)[1:] == (None,) * 4
    for name in METRICS:
        out = fusedpo.token_logps(logits, labels, metrics=[name])
        for field, value in out._asdict().items():
            if field in ("logps", name):
                assert same_bits(value, getattr(everything, field)), (name, field)
            else:
                assert value is None, (name, field)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (2, 3), (2, 1, 3)], ids=str)
def test_results_have_the_shape_of_the_labels(shape):
    rows = torch.Size(shape).numel()
    logits = make_logits(rows, 11, seed=1)
    labels = make_labels(rows, 11, seed=1)
    flat = fusedpo.token_logps(logits, labels, metrics=METRICS)
    x = leaf(logits.view(*shape, 11))
    out = fusedpo.token_logps(x, labels.view(shape), metrics=METRICS)
    assert all(value.shape == shape for value in out)
    assert_same_bits(tuple(v.reshape(-1) for v in out), tuple(flat))
    out.logps.sum().backward()
    assert x.grad.shape == x.shape


def test_only_logps_and_entropy_carry_gradients():
    logits, labels = leaf(make_logits(4, 9, seed=2)), make_labels(4, 9, seed=2)
    out = fusedpo.token_logps(logits, labels, metrics=METRICS)
    assert [f for f, v in out._asdict().items() if v.requires_grad] == ["logps", "entropy"]
    assert not any(
        v.requires_grad for v in fusedpo.token_logps(logits.detach(), labels, metrics=METRICS)
    )


# The ways in which a caller comes by logits that are not contiguous.
LAYOUTS = {
    "shifted slice": lambda x: torch.cat([x, x[:, -1:]], dim=1)[:, :-1],
    "padded vocabulary": lambda x: torch.cat([x, x], dim=2)[..., : x.shape[2]],
    "batch and time swapped": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "vocabulary outermost": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every second column": lambda x: x.repeat_interleave(2, dim=2)[..., ::2],
    "offset storage": lambda x: torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_logits_give_the_bits_of_contiguous_ones(layout, dtype):
    logits = make_logits(12, 133, seed=3, dtype=dtype).view(3, 4, 133)
    labels = make_labels(12, 133, seed=3, ignored=0.2).view(3, 4)
    results = []
    for x in (logits, LAYOUTS[layout](logits)):
        assert torch.equal(x, logits)
        x = x.detach().requires_grad_()
        out = fusedpo.token_logps(x, labels, metrics=METRICS)
        (out.logps - 0.1 * out.entropy).sum().backward()
        results.append((*out, x.grad))
    assert_same_bits(*results)


def test_expanded_logits_give_the_same_row_every_time():
    row, label = make_logits(1, 77, seed=4), make_labels(1, 77, seed=4)
    one = fusedpo.token_logps(row, label, metrics=METRICS)
    many = fusedpo.token_logps(row.expand(5, 77), label.expand(5), metrics=METRICS)
    assert_same_bits(tuple(many), tuple(v.expand(5) for v in one))


def test_non_contiguous_labels_give_the_bits_of_contiguous_ones():
    logits, labels = make_logits(8, 33, seed=5), make_labels(8, 33, seed=5)
    strided = labels.repeat_interleave(3)[::3]
    assert not strided.is_contiguous()
    assert_same_bits(
        tuple(fusedpo.token_logps(logits, strided, metrics=METRICS)),
        tuple(fusedpo.token_logps(logits, labels, metrics=METRICS)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_top1_names_the_first_maximum_of_a_tie(dtype):
    # Ties within a vector, across vectors, across tiles, and with the label last.
    for first, second in [(0, 1), (3, 70), (5, 4098), (0, 5000)]:
        logits = torch.zeros(3, 5001, dtype=dtype)
        logits[:, first] = logits[:, second] = 4.0
        labels = torch.tensor([first, second, second - 1])
        expected = [True, False, second - 1 == first]
        out = fusedpo.token_logps(logits, labels, metrics=("is_top1",))
        assert out.is_top1.tolist() == expected, (first, second)


def test_is_top1_is_the_argmax_of_the_logits():
    logits = make_logits(64, 1000, seed=6)
    best = logits.argmax(-1)
    labels = torch.where(torch.arange(64) % 2 == 0, best, make_labels(64, 1000, seed=6))
    out = fusedpo.token_logps(logits, labels, metrics=("is_top1",))
    assert torch.equal(out.is_top1, labels == best)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 12])
def test_any_ignore_index_marks_rows_even_one_inside_the_vocabulary(ignore_index):
    logits = leaf(make_logits(6, 9, seed=7))
    labels = torch.tensor([3, 0, 8, ignore_index, 5, ignore_index])
    skipped = labels == ignore_index
    out = fusedpo.token_logps(logits, labels, ignore_index=ignore_index, metrics=METRICS)
    assert all(not v[skipped].any() for v in out)
    full = fusedpo.token_logps(logits, labels.masked_fill(skipped, 1), ignore_index=-7)
    assert torch.equal(out.logps[~skipped], full.logps[~skipped])
    out.logps.sum().backward()
    assert not logits.grad[skipped].any()
    assert logits.grad[~skipped].any(dim=1).all()


def test_a_barred_token_has_probability_zero_and_a_finite_gradient():
    logits = make_logits(4, 100, seed=8)
    allowed = torch.ones(100, dtype=torch.bool)
    allowed[::7] = False
    labels = torch.tensor([1, 2, 3, 4])
    barred = leaf(logits.masked_fill(~allowed, -torch.inf))
    out = fusedpo.token_logps(barred, labels, metrics=("entropy", "log_sum_sq_probs"))
    (out.logps + out.entropy).sum().backward()
    renumbered = allowed.cumsum(0)[labels] - 1
    expected = reference.token_logps(
        logits[:, allowed], renumbered, metrics=("entropy", "log_sum_sq_probs")
    )
    for mine, his in zip(out[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, his, **CLOSE[torch.float32])
    assert barred.grad.isfinite().all()
    assert not barred.grad[:, ~allowed].any()


def test_a_nan_row_spoils_only_itself():
    logits, labels = make_logits(5, 40, seed=9), make_labels(5, 40, seed=9)
    clean = fusedpo.token_logps(logits, labels)
    logits[2, 17] = torch.nan
    out = fusedpo.token_logps(logits, labels)
    assert out.logps[2].isnan()
    rest = torch.arange(5) != 2
    assert torch.equal(out.logps[rest], clean.logps[rest])


def test_public_pair_logps_is_the_definition():
    g = generator(0)
    logps = -torch.rand(6, 40, generator=g)
    mask = (torch.rand(6, 40, generator=g) < 0.6).long()
    for ld_alpha in (None, 0.3):
        ours = fusedpo.pair_logps(logps, mask, ld_alpha=ld_alpha)
        assert type(ours) is reference.PairLogps
        assert_same_bits(tuple(ours), tuple(reference.pair_logps(logps, mask, ld_alpha=ld_alpha)))


def test_padding_the_batch_does_not_change_pair_logps():
    logits, labels = (
        make_logits(8, 50, seed=10).view(2, 4, 50),
        make_labels(8, 50, seed=10).view(2, 4),
    )
    padded_logits = torch.cat([logits, torch.full((2, 3, 50), torch.nan)], dim=1)
    padded_labels = torch.cat([labels, torch.full((2, 3), IGNORE)], dim=1)
    plain = fusedpo.pair_logps(fusedpo.token_logps(logits, labels).logps, labels != IGNORE)
    padded = fusedpo.pair_logps(
        fusedpo.token_logps(padded_logits, padded_labels).logps, padded_labels != IGNORE
    )
    assert_same_bits(tuple(plain), tuple(padded))
