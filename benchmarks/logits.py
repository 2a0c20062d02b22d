"""python -m benchmarks.logits: log-probs and metrics of logits that exist, on a GPU.

8192 x 151936 bf16 logits (2.5 GB). Peers: the plain expressions that TRL's trainers used before
they had kernels, torch.compile of them, and TRL's Triton kernel. Verified against float64 on a
sample of rows; then CUDA events, cold L2, interleaved rounds. The floor is the bytes that must
move: one read going forward, one read and one write going backward, at the bandwidth measured here
and at 4.3 TB/s. `--rehearse` runs the same code on a CPU with a small size; that measures nothing.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import fusedpo
import torch
from fusedpo import reference
from fusedpo.reference import METRICS
from torch import Tensor

from benchmarks import common, device, targets

ROWS, VOCABULARY = 8192, 151_936
REHEARSAL = (48, 1000)
SAMPLE = 64  # rows that are verified
# Root mean square in nats; relative for the gradient, which is rounded to bf16. The plain
# expression rounds log_softmax of bf16 logits, and its sums, to bf16.
TOLERANCES = {
    "ours": {"outputs": 2e-5, "is_top1": 0.0, "gradient": 4e-3},
    "trl_triton": {"outputs": 1e-4, "is_top1": 0.0, "gradient": 1e-2},
    "eager": {"outputs": 0.5, "is_top1": 0.05, "gradient": 3e-2},
    "compile": {"outputs": 0.5, "is_top1": 0.05, "gradient": 3e-2},
}


class Problem(NamedTuple):
    original: Tensor  # [N, V], never written
    logits: Tensor  # [N, V], what calls read; an in-place backward writes over it
    labels: Tensor  # [N]
    upstream: Tensor  # [N]


class _Computed(torch.autograd.Function):
    """Hands out existing memory as logits that were computed, like a model's: no leaf, no copy."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, memory: list[Tensor]) -> Tensor:
        return memory[0].detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def computed(p: Problem) -> Tensor:
    leaf = torch.zeros((), device=p.logits.device, dtype=p.logits.dtype, requires_grad=True)
    logits: Tensor = _Computed.apply(leaf, [p.logits])
    return logits


def make_problem(rows: int, vocabulary: int, place: torch.device) -> Problem:
    """A bulk with a spread of 2.5 nats and a favourite at 20, which takes nearly all probability;
    half the labels are on it."""
    g = torch.Generator(place).manual_seed(0)
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=place)
    logits.normal_(0, 2.5, generator=g)
    favourite = torch.randint(vocabulary, (rows,), generator=g, device=place)
    logits.scatter_(1, favourite.unsqueeze(1), 20.0)
    other = torch.randint(vocabulary, (rows,), generator=g, device=place)
    labels = torch.where(torch.rand(rows, generator=g, device=place) < 0.5, favourite, other)
    upstream = torch.randn(rows, generator=g, device=place) / rows
    return Problem(logits, logits.clone(), labels, upstream)


# ---- peers: a problem and whether to go backward -> (outputs by name, gradient or None) ---------

Answer = tuple[dict[str, Tensor], Tensor | None]


def _finish(
    p: Problem, outputs: dict[str, Tensor | None], logits: Tensor, backward: bool
) -> Answer:
    logps = outputs["logps"]
    assert logps is not None
    gradient = None
    if backward:
        (gradient,) = torch.autograd.grad(logps, logits, p.upstream.to(logps.dtype))
    return {name: v.detach() for name, v in outputs.items() if v is not None}, gradient


def ours(metrics: tuple[str, ...], inplace: bool = False) -> Callable[[Problem, bool], Answer]:
    def call(p: Problem, backward: bool) -> Answer:
        logits = computed(p) if backward else p.logits
        out = fusedpo.token_logps(
            logits, p.labels, metrics=metrics, inplace_backward=inplace and backward
        )
        return _finish(p, out._asdict(), logits, backward)

    return call


def trl_triton(p: Problem, backward: bool) -> Answer:
    from trl.kernels import selective_log_softmax_and_entropy

    logits = computed(p) if backward else p.logits
    logps, entropy = selective_log_softmax_and_entropy(logits, p.labels)
    return _finish(p, {"logps": logps, "entropy": entropy.detach()}, logits, backward)


def _plain(logits: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    log_p = logits.log_softmax(-1)
    logps = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():  # metrics carry no gradient in a DPO step
        p = log_p.exp()
        entropy = -(p * log_p).sum(-1, dtype=torch.float32)
        sums = (2 * log_p.float()).logsumexp(-1)
        means = logits.mean(-1, dtype=torch.float32)
        is_top1 = logits.argmax(-1) == labels
    return logps, entropy, sums, means, is_top1


_FIELDS = ("logps", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def eager(p: Problem, backward: bool) -> Answer:
    logits = computed(p) if backward else p.logits
    outputs = dict(zip(_FIELDS, _plain(logits, p.labels), strict=True))
    return _finish(p, outputs, logits, backward)


def compiled() -> Callable[[Problem, bool], Answer]:
    function = torch.compile(_plain, fullgraph=True, dynamic=False)

    def call(p: Problem, backward: bool) -> Answer:
        logits = computed(p) if backward else p.logits
        outputs = dict(zip(_FIELDS, function(logits, p.labels), strict=True))
        return _finish(p, outputs, logits, backward)

    return call


# pass -> (goes backward, reads and writes of the logits, peers)
PASSES: dict[str, tuple[bool, int, dict[str, Callable[[Problem, bool], Answer]]]] = {
    "forward, all outputs": (
        False,
        1,
        {"ours": ours(METRICS), "trl_triton": trl_triton, "eager": eager, "compile": compiled()},
    ),
    "forward + backward in place": (
        True,
        3,
        {
            "ours": ours(METRICS, inplace=True),
            "trl_triton": trl_triton,
            "eager": eager,
            "compile": compiled(),
        },
    ),
    "forward + backward": (True, 3, {"ours": ours(METRICS), "trl_triton": trl_triton}),
    "forward, logps and entropy": (
        False,
        1,
        {"ours": ours(("entropy",)), "trl_triton": trl_triton},
    ),
}


def verify(peer: str, p: Problem, answer: Answer) -> dict[str, Any]:
    limits = TOLERANCES[peer]
    outputs, gradient = answer
    rows = torch.arange(0, len(p.labels), max(1, len(p.labels) // SAMPLE), device=p.labels.device)
    x = p.original[rows].double().requires_grad_()
    exact = reference.token_logps(x, p.labels[rows], metrics=METRICS)._asdict()
    errors: dict[str, float] = {}
    for name, value in outputs.items():
        mine, his = value[rows], exact[name].detach()
        if name == "is_top1":
            errors[name] = (mine != his).double().mean().item()
        else:
            errors[name] = (mine.double() - his).square().mean().sqrt().item()
    ok = all(e <= limits["is_top1" if n == "is_top1" else "outputs"] for n, e in errors.items())
    if gradient is not None:
        (want,) = torch.autograd.grad(exact["logps"], x, p.upstream[rows].double())
        errors["gradient"] = ((gradient[rows].double() - want).norm() / want.norm()).item()
        ok = ok and errors["gradient"] <= limits["gradient"]
    return {"ok": ok, "errors": errors, "tolerances": limits}


def run_pass(
    name: str,
    p: Problem,
    peers: list[str],
    rounds: int,
    place: torch.device,
    rates: dict[str, float],
) -> dict[str, Any]:
    backward, moves, contestants = PASSES[name]
    results: dict[str, dict[str, Any]] = {}
    calls: dict[str, common.Call] = {}
    for peer in (n for n in contestants if n in peers):
        function = contestants[peer]
        # An in-place backward has overwritten the logits; copying them back is not timed.
        call = common.Call(
            lambda f=function: f(p, backward),
            (lambda: p.logits.copy_(p.original)) if backward else None,
        )
        try:
            p.logits.copy_(p.original)
            results[peer] = {"verified": verify(peer, p, call.run())}
            if results[peer]["verified"]["ok"]:
                results[peer]["memory"] = device.extra_bytes(call, place)
                calls[peer] = call
        except Exception as error:  # a finding about the peer
            if peer == "ours":
                raise
            results[peer] = {"not_run": common.why(error)}
    for peer, times in device.interleave(calls, rounds, place).items():
        results[peer].update(times)
    size = device.bytes_of(p.original)
    # A read at the rate of a read, a read with a write at that of a copy.
    measured = size / rates["read_bytes_per_s"]
    measured += (moves - 1) * size / rates["copy_bytes_per_s"] if moves > 1 else 0
    floor = {"bytes": moves * size, "at_4.3_TB_s": moves * size / device.NOMINAL_BANDWIDTH,
             "at_measured_bandwidth": measured}  # fmt: skip
    for result in results.values():
        if "median_s" in result:
            result["bytes_per_s"] = moves * size / result["median_s"]
            result["times_floor"] = result["median_s"] / measured
    return {"floor_s": floor, "peers": results}


def print_pass(name: str, found: dict[str, Any]) -> None:
    floor = found["floor_s"]
    print(
        f"\n{name}: floor {1e3 * floor['at_measured_bandwidth']:.3f} ms at the bandwidth measured, "
        f"{1e3 * floor['at_4.3_TB_s']:.3f} ms at 4.3 TB/s"
    )
    print(f"{'':12}{'median ms':>11}{'min':>9}{'max':>9}{'TB/s':>7}{'x floor':>9}{'extra MB':>10}")
    for peer, result in found["peers"].items():
        if "median_s" not in result:
            print(f"{peer:12}  {common.excuse(result)}")
            continue
        times = "".join(f"{1e3 * result[f]:{w}.3f}" for f, w in
                        (("median_s", 11), ("min_s", 9), ("max_s", 9)))  # fmt: skip
        rate = f"{result['bytes_per_s'] / 1e12:7.2f}{result['times_floor']:9.2f}"
        extra = f"{result['memory']['extra_bytes'] / 1e6:10.0f}"
        print(f"{peer:12}{times}{rate}{extra}  {common.errors_of(result)}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logits")
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--rehearse", action="store_true", help="on CPU, tiny: measures nothing")
    parser.add_argument("--quick", action="store_true", help="9 rounds instead of 31")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--peers", default="ours,trl_triton,eager,compile")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (9 if options.quick else 31)
    options.peers = options.peers.split(",")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    place = device.choose(options.rehearse)
    rates = device.bandwidth(place)
    size = REHEARSAL if options.rehearse else (ROWS, VOCABULARY)
    content: dict[str, Any] = {
        "benchmark": "logits",
        "rehearsal": options.rehearse,
        "environment": common.environment() | {"gpu": device.facts(place)},
        "size": {"rows": size[0], "V": size[1], "dtype": "bfloat16"},
        "bandwidth": rates,
        "passes": {},
    }
    path = (
        options.out or common.RESULTS / common.device_name(content["environment"]) / "logits.json"
    )
    p = make_problem(*size, place)
    correct = True
    for name in PASSES:
        found = run_pass(name, p, options.peers, options.rounds, place, rates)
        content["passes"][name] = found
        print_pass(name, found)
        common.write(path, content)
        correct = correct and found["peers"]["ours"]["verified"]["ok"]
    content["clocks_after"] = device.clocks(place)
    common.write(path, content)
    targets.show(targets.rows({"logits": content}))
    return 0 if correct else 1


if __name__ == "__main__":
    sys.exit(main())
