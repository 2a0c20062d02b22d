"""python -m benchmarks.packed_attention: attention over a packed row of preference pairs, alone.

A packed row's attention can be one call of scaled_dot_product_attention for each completion
("segments"), one for the whole row with a mask, FlexAttention, or one variable-length call (CUDA).
Beside them stand the padded rows of TRL's layout, which hold each prompt twice. Forward and
backward; output and gradients of every contestant are compared with float64 first. Timed is what a
layer does: masks, tables and compilation, which serve all layers of a model, come before.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from fusedpo._packing.attention import attend_in_segments
from fusedpo._packing.layout import Group, Segment, pack
from fusedpo._packing.table import SegmentTable
from torch import Tensor

from benchmarks import common, device

# Median tokens of prompt, chosen and rejected of four public sets of pairs.
LENGTHS = {
    "anthropic-evals": (31, 1, 1),
    "llmbar": (25, 37, 73),
    "pandalm": (35, 46, 29),
    "dpo-en": (182, 316, 340),
}
HEADS, KEY_HEADS, SIZE = 14, 2, 64  # Qwen2.5-0.5B's
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # of the norm of what float64 gives


class Problem(NamedTuple):
    segments: tuple[Segment, ...]
    inputs: list[Tensor]  # query, key, value of the row
    upstream: Tensor


def make_problem(lengths: tuple[int, int, int], pairs: int, **kind: Any) -> Problem:
    numbers = np.random.default_rng(0)

    def tokens(median: int) -> Any:
        return np.ones(max(1, round(median * numbers.uniform(0.5, 1.5))), np.int64)

    prompt, chosen, rejected = lengths
    row = pack([Group(tokens(prompt), [tokens(chosen), tokens(rejected)]) for _ in range(pairs)])
    torch.manual_seed(0)
    inputs = [
        torch.randn(1, heads, row.tokens, SIZE, **kind).requires_grad_()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    return Problem(row.segments, inputs, torch.randn(1, row.tokens, HEADS, SIZE, **kind))


Attention = Callable[..., Tensor]  # of query, key and value


def sdpa(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
    if q.is_cuda and ("attn_mask" in keywords or q.dtype not in (torch.bfloat16, torch.float16)):
        # Only flash attention takes fewer key heads there, and no mask; all scores would be formed.
        k, v = (each.repeat_interleave(HEADS // KEY_HEADS, 1) for each in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **keywords)
    return out.transpose(1, 2)


def packed(problem: Problem, choice: str) -> Attention:
    with mock.patch.dict("os.environ", FUSEDPO_PACKED_ATTENTION=choice):
        table = SegmentTable(problem.segments)
    layer = torch.nn.Identity()

    def attend(*inputs: Tensor) -> Tensor:
        before = table.at_once
        out, _ = attend_in_segments(layer, *inputs, table)
        if choice == "varlen" and table.at_once == before:
            raise RuntimeError(
                "torch's variable-length attention did not run: it needs CUDA of compute "
                "capability 8.0, bf16 or fp16, torch 2.13, and to agree with "
                "scaled_dot_product_attention"
            )
        return out

    return attend


def visible(problem: Problem, at: torch.device) -> Tensor:
    """[N, N]: which token of the row sees which."""
    tokens = sum(problem.segments[-1][:2]) + sum(problem.segments[-1].completions)
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for offset, prompt, completions in problem.segments:
        begin = offset + prompt
        seen[offset:begin, offset:begin] = True
        for length in completions:
            seen[begin : begin + length, offset : offset + prompt] = True
            seen[begin : begin + length, begin : begin + length] = True
            begin += length
    return seen.tril_().to(at)


def whole_row(mask: Tensor, *inputs: Tensor) -> Tensor:
    return sdpa(*inputs, attn_mask=mask)


@functools.cache
def compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # For all lengths, since those of every batch in a training are others.
    return torch.compile(flex_attention, dynamic=True)


def flex(mask: Tensor) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = mask.shape[0]
    blocks = create_block_mask(
        lambda b, h, q, k: mask[q, k], None, None, tokens, tokens, device=mask.device
    )

    def attend(*inputs: Tensor) -> Tensor:
        out: Tensor = compiled_flex()(*inputs, block_mask=blocks, enable_gqa=True)
        return out.transpose(1, 2)

    return attend


def padded(*rows: Tensor) -> Tensor:
    return sdpa(*rows, is_causal=True)


def padded_rows(problem: Problem) -> list[Tensor]:
    """Query, key and value of TRL's rows, from the packed row's tokens, [2B, heads, T, d]."""
    index = padded_index(problem).to(problem.upstream.device)
    return [
        each.detach()[0][:, index].transpose(0, 1).contiguous().requires_grad_()
        for each in problem.inputs
    ]


def padded_index(problem: Problem) -> Tensor:
    """[2B, T] tokens of the row that padded rows hold; padding on the right repeats the first."""
    rows = []
    for offset, prompt, completions in problem.segments:
        begin = offset + prompt
        for length in completions:
            rows.append([*range(offset, offset + prompt), *range(begin, begin + length)])
            begin += length
    longest = max(map(len, rows))
    return torch.tensor([row + row[:1] * (longest - len(row)) for row in rows])


def contestants(problem: Problem, at: torch.device) -> dict[str, Callable[[], Attention]]:
    """What prepares each of them."""
    mask = visible(problem, at)
    return {
        "segments": lambda: packed(problem, "segments"),
        "varlen": lambda: packed(problem, "varlen"),
        "whole_row": lambda: functools.partial(whole_row, mask),
        "flex": lambda: flex(mask),
    }


def error(problem: Problem, attend: Attention) -> float:
    """The largest difference from float64 of output and gradients, as a share of its norm."""
    exact = [each.detach().double().requires_grad_() for each in problem.inputs]
    mask = visible(problem, problem.upstream.device)
    outputs = attend(*problem.inputs), whole_row(mask, *exact)
    wanted = torch.autograd.grad(outputs[1], exact, problem.upstream.double())
    found = torch.autograd.grad(outputs[0], problem.inputs, problem.upstream)
    pairs = zip((outputs[0], *found), (outputs[1], *wanted), strict=True)
    return largest([difference(a.detach(), b.detach()) for a, b in pairs])


def padded_error(problem: Problem, inputs: list[Tensor]) -> float:
    """As `error`, of the output alone: padding, too, gets gradients, which a packed row lacks."""
    with torch.no_grad():
        exact = [each.double() for each in problem.inputs]
        want = whole_row(visible(problem, exact[0].device), *exact)[0]
        found = padded(*inputs)
    errors = []
    rows = zip(padded_index(problem).to(want.device), found, strict=True)
    lengths = [prompt + n for _, prompt, completions in problem.segments for n in completions]
    for (index, row), length in zip(rows, lengths, strict=True):
        errors.append(difference(row[:length], want[index[:length]]))
    return largest(errors)


def difference(found: Tensor, wanted: Tensor) -> Tensor:
    return (found.double() - wanted).norm() / wanted.norm()


def largest(errors: list[Tensor]) -> float:
    return float(torch.stack(errors).max())  # NaN if one is


def step(attend: Attention, inputs: list[Tensor]) -> device.Call:
    return device.Call(lambda: torch.autograd.grad(attend(*inputs).sum(), inputs))


def measure(name: str, pairs: int, dtype: torch.dtype, at: torch.device, rounds: int) -> Any:
    problem = make_problem(LENGTHS[name], pairs, dtype=dtype, device=at)
    tokens = problem.upstream.shape[1]
    case: dict[str, Any] = {"data": name, "pairs": pairs, "dtype": str(dtype)[6:], "tokens": tokens}
    case["padded_tokens"] = padded_index(problem).numel()
    case["not_run"], case["errors"], calls = {}, {}, {}
    for contestant, prepare in contestants(problem, at).items():
        try:
            attend = prepare()
            case["errors"][contestant] = error(problem, attend)
        except RuntimeError as reason:
            case["not_run"][contestant] = str(reason).splitlines()[0]
            continue
        calls[contestant] = step(attend, problem.inputs)
    rows = padded_rows(problem)
    case["errors"]["padded"] = padded_error(problem, rows)
    calls["padded"] = step(padded, rows)
    for contestant, wrong in case["errors"].items():
        if not wrong <= ALLOWED[dtype]:
            case["not_run"][contestant] = "wrong"
            del calls[contestant]
    case["times"] = device.interleave(calls, rounds, at)
    return case


def report(case: dict[str, Any]) -> None:
    print(
        f"{case['data']}, {case['pairs']} pairs, {case['dtype']}: {case['tokens']} tokens, "
        f"{case['padded_tokens']} padded"
    )
    least = min(times["median_s"] for times in case["times"].values())
    for name, times in case["times"].items():
        print(f"  {name:10} {1e3 * times['median_s']:9.2f} ms  {times['median_s'] / least:6.2f}")
    for name, reason in case["not_run"].items():
        print(f"  {name:10} not run: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--pairs", type=int, nargs="+", default=(4, 8))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    at = torch.device(options.device)
    environment = common.environment() | {"gpu": device.facts(at)}
    out = options.out or (
        common.RESULTS / common.device_name(environment) / "packed_attention.json"
    )
    cases = []
    for name in LENGTHS:
        for pairs in options.pairs:
            for dtype in ALLOWED:
                cases.append(measure(name, pairs, dtype, at, options.rounds))
                report(cases[-1])
    common.write(
        out, {"environment": environment, "heads": [HEADS, KEY_HEADS, SIZE], "cases": cases}
    )


if __name__ == "__main__":
    main()
