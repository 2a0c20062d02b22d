"""python -m benchmarks.packed_attention: attention over a packed row of preference pairs, alone.

A packed row's attention can be one call of scaled_dot_product_attention for each completion
("segments"), one for the whole row with a mask, FlexAttention, or one variable-length call (CUDA).
Beside them stand the padded rows of TRL's layout, which hold each prompt twice. Forward and
backward; output and gradients of every contestant are compared with float64 first.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from fusedpo._packing import varlen
from fusedpo._packing.attention import SegmentTable, attend_in_segments
from fusedpo._packing.layout import Group, Segment, pack
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


def segments(problem: Problem, *inputs: Tensor, choice: str = "segments") -> Tensor:
    with mock.patch.dict("os.environ", FUSEDPO_PACKED_ATTENTION=choice):
        table = SegmentTable(problem.segments)
        return attend_in_segments(torch.nn.Identity(), *inputs, table)[0]


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


def whole_row(problem: Problem, mask: Tensor, *inputs: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(*inputs, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def flex(problem: Problem, mask: Tensor, *inputs: Tensor) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    tokens = mask.shape[0]
    blocks = create_block_mask(
        lambda b, h, q, k: mask[q, k], None, None, tokens, tokens, device=mask.device
    )
    out: Tensor = torch.compile(flex_attention)(*inputs, block_mask=blocks, enable_gqa=True)
    return out.transpose(1, 2)


def padded(problem: Problem, *inputs: Tensor) -> Tensor:
    """TRL's rows, from the packed row's tokens: the same work as [2B, T] of its own."""
    index = padded_index(problem).to(inputs[0].device)
    rows = [each[0][:, index].transpose(0, 1) for each in inputs]  # [2B, heads, T, d]
    return F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True).transpose(1, 2)


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


def contestants(problem: Problem, at: torch.device) -> dict[str, Callable[..., Tensor]]:
    mask = visible(problem, at)
    return {
        "segments": lambda *x: segments(problem, *x),
        "varlen": lambda *x: segments(problem, *x, choice="varlen"),
        "whole_row": lambda *x: whole_row(problem, mask, *x),
        "flex": lambda *x: flex(problem, mask, *x),
    }


def error(problem: Problem, call: Callable[..., Tensor]) -> float:
    """The largest difference from float64 of output and gradients, as a share of its norm."""
    exact = [each.detach().double().requires_grad_() for each in problem.inputs]
    mask = visible(problem, problem.upstream.device)
    outputs = call(*problem.inputs), whole_row(problem, mask, *exact)
    wanted = torch.autograd.grad(outputs[1], exact, problem.upstream.double())
    found = torch.autograd.grad(outputs[0], problem.inputs, problem.upstream)
    pairs = zip((outputs[0], *found), (outputs[1], *wanted), strict=True)
    return max(
        float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs
    )


def padded_error(problem: Problem) -> float:
    """As `error`, of the output alone: padding, too, gets gradients, which a packed row lacks."""
    with torch.no_grad():
        exact = [each.double() for each in problem.inputs]
        want = whole_row(problem, visible(problem, exact[0].device), *exact)[0]
        found = padded(problem, *problem.inputs)
    worst = 0.0
    rows = zip(padded_index(problem).to(want.device), found, strict=True)
    lengths = [prompt + n for _, prompt, completions in problem.segments for n in completions]
    for (index, row), length in zip(rows, lengths, strict=True):
        wanted = want[index[:length]]
        worst = max(worst, float((row[:length].double() - wanted).norm() / wanted.norm()))
    return worst


def step(problem: Problem, call: Callable[..., Tensor]) -> None:
    out = call(*problem.inputs)
    torch.autograd.grad(out.sum(), problem.inputs)


def measure(name: str, pairs: int, dtype: torch.dtype, at: torch.device, rounds: int) -> Any:
    problem = make_problem(LENGTHS[name], pairs, dtype=dtype, device=at)
    tokens = problem.upstream.shape[1]
    case: dict[str, Any] = {"data": name, "pairs": pairs, "dtype": str(dtype)[6:], "tokens": tokens}
    case["padded_tokens"] = padded_index(problem).numel()
    case["not_run"], case["errors"], calls = {}, {}, {}
    for contestant, call in contestants(problem, at).items():
        if contestant == "varlen" and not varlen.usable(problem.inputs[0], problem.inputs[2]):
            case["not_run"][contestant] = (
                "torch's variable-length attention needs CUDA, bf16 or fp16"
            )
            continue
        try:
            case["errors"][contestant] = error(problem, call)
        except (NotImplementedError, RuntimeError) as reason:
            case["not_run"][contestant] = str(reason).splitlines()[0]
            continue
        if case["errors"][contestant] > ALLOWED[dtype]:
            case["not_run"][contestant] = "wrong"
            continue
        calls[contestant] = device.Call(lambda call=call: step(problem, call))
    case["errors"]["padded"] = padded_error(problem)
    if case["errors"]["padded"] <= ALLOWED[dtype]:
        calls["padded"] = device.Call(lambda: step(problem, lambda *x: padded(problem, *x)))
    else:
        case["not_run"]["padded"] = "wrong"
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
