"""All completions of a packed row in one call of torch's variable-length flash attention.

Queries are the row itself, cut into (prompt + first completion) and the further completions; keys
and values are those of each, with its prompt. Flash attention aligns a causal mask at the end of
queries and keys, so that a completion's queries see its whole prompt.

A GPU is given one kernel for a layer, where scaled_dot_product_attention would be one for each
completion. Before the first call of every kind, the kernel is compared with that on a small problem
in which a wrong alignment, window or gradient shows; where they differ it is left alone.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from .._check import linear_compute_dtype
from .layout import Segment
from .table import Problem, SegmentTable

# What `varlen_attn` takes (window_size, enable_gqa, scale) is known from this release on.
_KNOWN = Version(torch.__version__).release >= Version("2.13").release
_LARGEST_HEAD = 256

# The problem of the comparison: completions after a prompt have fewer queries than keys, and some
# tokens more keys before them than the window lets them see; both are longer than a kernel's tiles.
_TRIAL = (Segment(0, 150, (70, 130, 1)), Segment(351, 0, (40,)))
_TRIAL_WINDOW = 24
# Half precision rounds by 2^-8 (bf16), as do sums in the softmax. One key too many or too few is
# an error of 0.06 and more here.
_ALLOWED = 0.02


class Kind(NamedTuple):
    """What may decide whether the kernel is right."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    size: int
    scaling: float | None
    has_window: bool


_agrees: dict[Kind, bool] = {}


@functools.cache
def has_flash(device: torch.device) -> bool:
    """Whether torch is built with flash attention, and the device is a GPU that has it: Ampere or
    newer."""
    return (
        device.type == "cuda"
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def flash_takes(query: Tensor, value: Tensor) -> bool:
    """Whether flash attention computes heads of this size and dtype, the one under autocast, and
    nobody has turned it off."""
    size = query.shape[-1]
    return (
        has_flash(query.device)
        and torch.backends.cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]
        and linear_compute_dtype(query) in (torch.bfloat16, torch.float16)
        and size == value.shape[-1]
        and size % 8 == 0
        and size <= _LARGEST_HEAD
    )


def usable(query: Tensor, value: Tensor, table: SegmentTable) -> bool:
    """Whether one variable-length call may serve: FUSEDPO_PACKED_ATTENTION=segments forbids it."""
    return table.may_be_at_once and _KNOWN and flash_takes(query, value)


def attend(
    problems: list[Problem], table: SegmentTable, scaling: float | None, window: int | None
) -> Tensor:
    """Attend within every completion at once.

    Args:
        problems: as the table cuts a row.
        table: of this row.
        scaling: factor on the scores; by default 1 / sqrt(d).
        window: a token sees so many tokens, itself included.

    Returns:
        [1, N, heads, d].
    """
    from torch.nn.attention.varlen import varlen_attn

    dtype = linear_compute_dtype(problems[0][0])

    def joined(which: int) -> Tensor:
        # [1, heads, L, d] of each -> [sum of L, heads, d]
        row = torch.cat([problem[which][0].transpose(0, 1) for problem in problems])
        # As autocast does for scaled_dot_product_attention, and like it after the cut: what the
        # completions give back for their prompt is added in the model's precision.
        return row.to(dtype)

    query, key, value = (joined(which) for which in range(3))
    query_ends, key_ends = table.ends(query.device).unbind()
    output: Any = varlen_attn(
        query,
        key,
        value,
        query_ends,
        key_ends,
        max(queries for queries, _ in table.lengths),
        max(keys for _, keys in table.lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    row: Tensor = output[None]
    return row


def agrees(query: Tensor, key: Tensor, scaling: float | None, window: int | None) -> bool:
    """Whether `attend` gives what scaled_dot_product_attention gives, to the dtype's rounding,
    forward and backward. Tried once for every kind of call."""
    dtype = linear_compute_dtype(query)
    heads, size = query.shape[1], query.shape[3]
    kind = Kind(query.device, dtype, heads, key.shape[1], size, scaling, window is not None)
    if kind not in _agrees:
        if torch._C._current_graph_task_id() != -1:
            return False  # within a backward, whose thread the trial's own backward would wait for
        # In a thread of its own, where nothing of the caller's is on: autocast, inference mode, the
        # hooks and the recomputation of gradient checkpointing.
        with ThreadPoolExecutor(1) as thread:
            problem = thread.submit(_what_is_wrong, kind).result()
        _agrees[kind] = problem is None
        if problem is not None:
            warnings.warn(
                f"fusedpo: torch's variable-length attention {problem} here ({dtype}, {heads} "
                f"heads of {size}, {key.shape[1]} of keys, window {window}); packed rows run "
                "without it. Report your GPU and the version of torch.",
                stacklevel=2,
            )
    return _agrees[kind]


def _what_is_wrong(kind: Kind) -> str | None:
    on_cuda = kind.device.type == "cuda"
    try:
        # The current device is each thread's own.
        with torch.cuda.device(kind.device) if on_cuda else contextlib.nullcontext():
            error = _trial_error(kind)
    except torch.OutOfMemoryError:
        raise  # tells nothing of the kernel
    except Exception as reason:  # a later torch may not even know its parameters
        first_line = str(reason).partition("\n")[0]
        return f"fails ({first_line})"
    if error <= _ALLOWED:  # not so for NaN
        return None
    return f"differs from scaled_dot_product_attention by {error:.1e}"


def _trial_error(kind: Kind) -> float:
    """The largest difference of output and gradients from those of scaled_dot_product_attention in
    float32, as a share of their norm."""
    window = _TRIAL_WINDOW if kind.has_window else None
    table = SegmentTable(_TRIAL)
    numbers = torch.Generator().manual_seed(0)  # leaves the training's own alone

    def random(heads: int) -> Tensor:
        values = torch.randn(1, heads, sum(table.pieces), kind.size, generator=numbers)
        return values.to(kind.device, kind.dtype)

    inputs = [random(heads).requires_grad_() for heads in (kind.heads, *[kind.key_heads] * 2)]
    exact = [each.detach().float().requires_grad_() for each in inputs]
    upstream = random(kind.heads).transpose(1, 2)
    got = attend(table.problems(*inputs), table, kind.scaling, window)
    want = _plain(table, exact, kind.scaling, window)
    got_all = (got.detach(), *torch.autograd.grad(got, inputs, upstream))
    want_all = (want.detach(), *torch.autograd.grad(want, exact, upstream.float()))
    errors = [(a.float() - b).norm() / b.norm() for a, b in zip(got_all, want_all, strict=True)]
    return float(torch.stack(errors).max())  # NaN if one is


def _plain(
    table: SegmentTable, inputs: list[Tensor], scaling: float | None, window: int | None
) -> Tensor:
    outputs = []
    for q, k, v in table.problems(*inputs):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        mask = table.mask(q.shape[2], k.shape[2], window, q)
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling))
    return torch.cat(outputs, 2).transpose(1, 2)
