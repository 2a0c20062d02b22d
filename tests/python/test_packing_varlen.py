"""A packed row in one call of variable-length attention, with a plain stand-in for torch's kernel;
and stand-ins that are wrong, each in its own way, which must not be used."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="packed attention is registered with transformers")

from fusedpo._packing import varlen
from fusedpo._packing.attention import attend_in_segments
from fusedpo._packing.layout import pack
from fusedpo._packing.table import SegmentTable
from packing_helpers import LENGTHS, make_groups, plain_varlen, visible, whole_row
from torch import Tensor
from torch.utils.checkpoint import checkpoint

HEADS, SIZE = 4, 8
KERNEL = "torch.nn.attention.varlen.varlen_attn"
# Single completions, shorter than any window: their queries are their keys, and all are seen.
SINGLE = ((1, (1,)), (0, (2,)))


def aligned_at_the_start(*arguments: Any, **keywords: Any) -> Tensor:
    return plain_varlen(*arguments, from_start=True, **keywords)


def one_key_more_in_the_window(*arguments: Any, window_size: Any, **keywords: Any) -> Tensor:
    left, right = window_size
    return plain_varlen(*arguments, window_size=(left + (left >= 0), right), **keywords)


def without_the_window(*arguments: Any, window_size: Any, **keywords: Any) -> Tensor:
    return plain_varlen(*arguments, window_size=(-1, window_size[1]), **keywords)


def gradient_of_keys_too_large(q: Tensor, k: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
    return plain_varlen(q, 1.1 * k - (0.1 * k).detach(), *arguments, **keywords)


def gradient_of_values_not_a_number(
    q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **keywords: Any
) -> Tensor:
    v = v.clone()
    if v.requires_grad:
        v.register_hook(lambda gradient: gradient * float("nan"))
    return plain_varlen(q, k, v, *arguments, **keywords)


def no_kernel(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nMore lines.")


def not_implemented(*_: Any, **__: Any) -> Tensor:
    raise NotImplementedError("no such operator")


def other_parameters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise AssertionError("never called with three arguments")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU passes for a GPU with flash attention, about which nothing is known yet."""
    monkeypatch.setattr(varlen, "has_flash", lambda device: True)
    monkeypatch.setattr(varlen, "_agrees", {})
    monkeypatch.setattr(KERNEL, plain_varlen)


@pytest.fixture
def any_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """float64, too, so that rounding hides nothing."""
    monkeypatch.setattr(varlen, "usable", lambda *_: True)


def make_inputs(lengths: Any, key_heads: int = HEADS, **kind: Any) -> tuple[Any, list[Tensor]]:
    """Segments and query, key and value of their row."""
    row = pack(make_groups(lengths))
    shapes = [(1, heads, row.tokens, SIZE) for heads in (HEADS, key_heads, key_heads)]
    return row.segments, [torch.randn(shape, requires_grad=True, **kind) for shape in shapes]


def attend(segments: Any, inputs: Any, window: int | None = None) -> Tensor:
    output, _ = attend_in_segments(
        torch.nn.Identity(), *inputs, SegmentTable(segments), scaling=0.7, sliding_window=window
    )
    return output


def assert_attends_as_a_whole_row(
    lengths: Any, key_heads: int, window: int | None, attend: Callable[..., Tensor] = attend
) -> None:
    segments, inputs = make_inputs(lengths, key_heads, dtype=torch.float64)
    got = attend(segments, inputs, window)
    want = whole_row(*inputs, visible(lengths, window), 0.7, None, None)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(want)
    for one, other in zip(
        torch.autograd.grad(got, inputs, upstream),
        torch.autograd.grad(want, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-11)


# ---- the kernel as it should be ------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("any_dtype")
@pytest.mark.parametrize(("key_heads", "window"), list(itertools.product((1, 2, 4), (None, 1, 3))))
def test_one_call_attends_as_a_whole_row(key_heads: int, window: int | None) -> None:
    assert_attends_as_a_whole_row(LENGTHS, key_heads, window)
    assert list(varlen._agrees.values()) == [True]


@pytest.mark.usefixtures("any_dtype")
def test_a_kernel_is_tried_once_for_each_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def counted(query: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        rows.append(len(query))
        return plain_varlen(query, *arguments, **keywords)

    monkeypatch.setattr(KERNEL, counted)
    segments, inputs = make_inputs(LENGTHS)
    own = inputs[0].shape[2]
    before = torch.get_rng_state()
    for window in (None, None, 3, 5):
        attend(segments, inputs, window)
    trial = next(n for n in rows if n != own)
    assert rows == [trial, own, own, trial, own, own]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("any_dtype")
@pytest.mark.parametrize("reentrant", [True, False])
def test_trying_a_kernel_disturbs_no_checkpoint(reentrant: bool) -> None:
    def recomputed(segments: Any, inputs: Any, window: int | None) -> Tensor:
        output: Tensor = checkpoint(
            lambda *x: attend(segments, x, window), *inputs, use_reentrant=reentrant
        )
        return output

    segments, inputs = make_inputs(LENGTHS, dtype=torch.float64)
    output = recomputed(segments, inputs, 3)
    output.sum().backward()
    want = whole_row(*inputs, visible(LENGTHS, 3), 0.7, None, None)
    torch.testing.assert_close(output, want)
    for each, gradient in zip(inputs, torch.autograd.grad(want.sum(), inputs), strict=True):
        torch.testing.assert_close(each.grad, gradient)
    assert list(varlen._agrees.values()) == [True]


@pytest.mark.usefixtures("any_dtype")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_kernel_is_tried_backward_where_gradients_are_off(context: Any) -> None:
    segments, inputs = make_inputs(LENGTHS)
    with context():
        attend(segments, inputs)
    assert list(varlen._agrees.values()) == [True]


def test_ends_are_made_once_for_all_layers() -> None:
    segments, inputs = make_inputs(LENGTHS)
    table = SegmentTable(segments)
    cpu = torch.device("cpu")
    ends = table.ends(cpu)
    assert table.ends(cpu) is ends
    lengths = [[each.shape[2] for each in problem[:2]] for problem in table.problems(*inputs)]
    assert ends.diff().T.tolist() == lengths == [list(each) for each in table.lengths]


# ---- kernels that must not be used ---------------------------------------------------------------


@pytest.mark.usefixtures("any_dtype")
@pytest.mark.parametrize(
    ("wrong", "window", "told"),
    [
        (aligned_at_the_start, None, "differs"),
        (aligned_at_the_start, 3, "differs"),
        (one_key_more_in_the_window, 3, "differs"),
        (without_the_window, 3, "differs"),
        (gradient_of_keys_too_large, None, "differs"),
        (gradient_of_values_not_a_number, None, "differs .* by nan"),
        (no_kernel, None, r"fails \(FlashAttention only supports Ampere GPUs or newer\.\)"),
        (not_implemented, None, r"fails \(no such operator\)"),
        (other_parameters, None, r"fails \(.*unexpected keyword argument"),
    ],
)
@pytest.mark.parametrize("key_heads", [2, 4])
def test_a_wrong_kernel_is_told_and_not_used(
    wrong: Any, window: int | None, told: str, key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the first row, of single completions, does not show it."""
    monkeypatch.setattr(KERNEL, wrong)
    with pytest.warns(UserWarning, match=f"variable-length attention {told}"):
        assert_attends_as_a_whole_row(SINGLE, key_heads, window)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # told once
        assert_attends_as_a_whole_row(LENGTHS, key_heads, window)


@pytest.mark.usefixtures("any_dtype")
def test_no_kernel_is_tried_within_a_backward() -> None:
    """Its thread would wait for the trial's own backward, and that for the thread."""
    segments, inputs = make_inputs(LENGTHS)
    known = []

    def again(gradient: Tensor) -> None:
        attend(segments, [each.detach() for each in inputs])
        known.append(dict(varlen._agrees))

    start = torch.ones(1, requires_grad=True)
    start.register_hook(again)
    (2 * start).backward()
    assert known == [{}]
    attend(segments, inputs)
    assert list(varlen._agrees.values()) == [True]


def test_flash_attention_that_is_turned_off_is_not_used() -> None:
    _, (query, _, value) = make_inputs(LENGTHS, dtype=torch.bfloat16)
    assert varlen.flash_takes(query, value)
    before = torch.backends.cuda.flash_sdp_enabled()
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert not varlen.flash_takes(query, value)
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


@pytest.mark.usefixtures("any_dtype")
def test_a_lack_of_memory_tells_nothing_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks_memory(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    segments, inputs = make_inputs(LENGTHS)
    monkeypatch.setattr(KERNEL, lacks_memory)
    with pytest.raises(torch.OutOfMemoryError):
        attend(segments, inputs)
    monkeypatch.setattr(KERNEL, plain_varlen)
    attend(segments, inputs)
    assert list(varlen._agrees.values()) == [True]


# ---- where it may serve --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [((7, 5), True, False), ((8, 0), True, True), ((9, 0), True, True), ((9, 0), False, False)],
)
def test_flash_attention_needs_ampere_and_a_build_with_it(
    capability: Any, built: bool, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    uncached = varlen.has_flash.__wrapped__
    assert uncached(torch.device("cuda", 0)) is runs
    assert not uncached(torch.device("cpu"))


def test_choice_of_attention_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    segments, (q, *_) = make_inputs(LENGTHS, dtype=torch.bfloat16)
    table = SegmentTable(segments)
    assert varlen.usable(q, q, table)
    assert not varlen.usable(q.float(), q.float(), table)
    assert not varlen.usable(q, q[..., :4], table)
    monkeypatch.setattr(varlen, "has_flash", lambda device: False)
    assert not varlen.usable(q, q, table)
    monkeypatch.setattr(varlen, "has_flash", lambda device: True)
    monkeypatch.setenv("FUSEDPO_PACKED_ATTENTION", "segments")
    assert not varlen.usable(q, q, SegmentTable(segments))
    monkeypatch.setenv("FUSEDPO_PACKED_ATTENTION", "flash")
    with pytest.raises(ValueError, match="must be segments or varlen; got 'flash'"):
        SegmentTable(segments)


@pytest.mark.parametrize("window", [None, 3])
def test_one_call_serves_fp32_weights_under_autocast(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rotary embeddings make queries and keys fp32, values are bf16."""
    segments, inputs = make_inputs(LENGTHS, key_heads=2)
    upstream = torch.randn(1, inputs[0].shape[2], HEADS, SIZE, dtype=torch.bfloat16)
    results = []
    for choice in ("varlen", "segments"):
        monkeypatch.setenv("FUSEDPO_PACKED_ATTENTION", choice)
        table = SegmentTable(segments)
        with torch.autocast("cpu", torch.bfloat16):
            q, k, v = inputs
            output, _ = attend_in_segments(
                torch.nn.Identity(), q, k, v.bfloat16(), table, sliding_window=window
            )
        assert table.at_once == (choice == "varlen")
        assert output.dtype == torch.bfloat16
        gradients = torch.autograd.grad(output, inputs, upstream)
        results.append([output, *gradients])
    for one, other in zip(*results, strict=True):
        assert (one.double() - other.double()).norm() <= 1e-2 * other.double().norm()
    assert [kind.dtype for kind in varlen._agrees] == [torch.bfloat16]


def test_autocast_leaves_float64_as_it_is() -> None:
    segments, inputs = make_inputs(LENGTHS, dtype=torch.float64)
    want = whole_row(*inputs, visible(LENGTHS, None), 0.7, None, None)
    with torch.autocast("cpu", torch.bfloat16):
        got = attend(segments, inputs)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
