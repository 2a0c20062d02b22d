"""Attention within a packed row: every completion sees its prompt and itself, and nothing else.

It is a function registered with transformers, which every attention layer calls with its queries,
keys and values after the rotary embedding. The layout travels as a keyword argument from the
backbone's forward to each layer. So there is no state outside the call: threads, and the second
forward of gradient checkpointing, each have their own. Without that argument (generation, padded
batches) the model's former attention runs, to the bit.

A segment of `prompt | completion | completion ...` is one causal problem for prompt and first
completion together, and one for each further completion, whose keys are the prompt's and its own.
All problems of a row are one call where variable-length attention runs (varlen.py), else each is
one of scaled_dot_product_attention.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import varlen
from .names import NAMES, former_implementation, takes_packed_rows
from .table import SegmentTable


def use_packed_attention(model: Any) -> None:
    """Let `model` take packed rows; what it computes for others stays as it is.

    Raises:
        ValueError: it has an attention implementation that is not in NAMES.
    """
    original = former_implementation(model.config._attn_implementation)
    if original not in NAMES:
        raise ValueError(
            f"packed rows need attn_implementation {' or '.join(NAMES)}; got {original}."
        )
    model.config._attn_implementation = NAMES[original]


@contextlib.contextmanager
def packed_attention(model: Any, on: bool) -> Iterator[None]:
    """Let `model` take packed rows, or not, for a while."""
    before = model.config._attn_implementation
    if on:
        use_packed_attention(model)
    elif takes_packed_rows(model):
        model.config._attn_implementation = former_implementation(before)
    try:
        yield
    finally:
        if model.config._attn_implementation != before:
            model.config._attn_implementation = before


def attend_in_segments(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: SegmentTable,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within the segments of a packed row.

    Args:
        module: the attention layer.
        query: [1, heads, N, d]; key, value: [1, key heads, N, d].
        table: of this forward.
        scaling: factor on the scores; by default 1 / sqrt(d).
        dropout: must be 0: both completions would lose the same parts of their prompt.
        sliding_window: a token sees so many tokens, itself included, of prompt and completion.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: [heads] attention sinks: one more score for each head, without a value.

    Returns:
        [1, N, heads, d], and no attention weights.
    """
    if dropout:
        raise ValueError(
            f"packed rows need attention without dropout; {type(module).__name__} has {dropout}."
        )
    table.calls += 1
    table.windowed += sliding_window is not None
    forms_scores = softcap is not None or s_aux is not None
    attend = _scores if forms_scores else _fused
    problems = table.problems(query, key, value)
    at_once = not forms_scores and varlen.usable(query, value, table)
    if at_once and varlen.agrees(query, key, scaling, sliding_window):
        table.at_once += 1
        return varlen.attend(problems, table, scaling, sliding_window), None
    outputs = [
        # [1, heads, L, d] -> [1, L, heads, d]
        attend(q, k, v, table, scaling, sliding_window, softcap, s_aux).transpose(1, 2)
        for q, k, v in problems
    ]
    return torch.cat(outputs, 1), None


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: SegmentTable,
    scaling: float | None,
    window: int | None,
    *_: Any,
) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    plain = queries == keys and (window is None or keys <= window)
    shared = q.shape[1] // k.shape[1]  # query heads per key head
    if shared > 1 and q.device.type != "cpu" and not (plain and varlen.flash_takes(q, v)):
        # Of CUDA's fused kernels only flash attention takes fewer key heads, and it takes no mask:
        # all scores would be formed. Other devices' need not take fewer at all.
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if plain else table.mask(queries, keys, window, q),
        is_causal=plain,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: SegmentTable,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same with the scores formed, for what scaled_dot_product_attention lacks."""
    _, heads, queries, size = q.shape
    key_heads, keys = k.shape[1], k.shape[2]
    # Query heads of one key head are neighbours: [1, key heads, heads per key head, L, d].
    grouped = q.reshape(1, key_heads, heads // key_heads, queries, size)
    scores = grouped @ k.unsqueeze(2).transpose(-1, -2)
    scores = scores * (size**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + table.mask(queries, keys, window, scores)
    if sinks is not None:
        extra = sinks.to(scores.dtype).reshape(1, key_heads, heads // key_heads, 1, 1)
        scores = torch.cat([scores, extra.expand(-1, -1, -1, queries, -1)], -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype)[..., :keys]
    return (weights @ v.unsqueeze(2)).reshape(1, heads, queries, v.shape[-1])


def _own_eager_function(module: Any) -> Any:
    # Each modeling file has its own; wrappers (FSDP) derive classes elsewhere.
    for cls in type(module).__mro__:
        function = vars(sys.modules[cls.__module__]).get("eager_attention_forward")
        if function is not None:
            return function
    raise ValueError(f"{type(module).__name__} has no eager attention of transformers' form.")


# torch.compile would compile it anew for every batch: the segments are Python numbers.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _packed(*arguments: Any, packed_table: SegmentTable, **keywords: Any) -> Any:
    module, query, key, value, _ = arguments  # the mask is a placeholder
    return attend_in_segments(module, query, key, value, packed_table, **keywords)


def _over_sdpa(*arguments: Any, packed_table: SegmentTable | None = None, **keywords: Any) -> Any:
    if packed_table is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](*arguments, **keywords)
    # Older releases of transformers run Gemma-2 on "sdpa", which leaves its softcap out: what holds
    # for padded rows has to hold for packed ones. Newer ones refuse the combination.
    return _packed(*arguments, packed_table=packed_table, **keywords | {"softcap": None})


def _over_eager(*arguments: Any, packed_table: SegmentTable | None = None, **keywords: Any) -> Any:
    if packed_table is None:
        return _own_eager_function(arguments[0])(*arguments, **keywords)
    return _packed(*arguments, packed_table=packed_table, **keywords)


for _original, _function in (("sdpa", _over_sdpa), ("eager", _over_eager)):
    ALL_ATTENTION_FUNCTIONS.register(NAMES[_original], _function)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAMES[_original], ALL_MASK_ATTENTION_FUNCTIONS[_original])


def packed_arguments(table: SegmentTable, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a backbone for a packed row, besides its ids and positions.

    A mask of four dimensions is handed to the layers as it is: transformers builds none. The layers
    read the table instead.
    """
    placeholder = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return {"attention_mask": placeholder, "packed_table": table}
