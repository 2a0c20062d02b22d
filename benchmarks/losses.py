"""python -m benchmarks.losses: lists of three losses, forward and backward, against plain torch.

`--device cuda` times on a GPU, with torch.compile of the plain formulas as one more contestant and
the kernel launches of a call counted; `--rehearse` runs that code on a CPU.

Every list is verified first: value and gradients of both against the reference in float64. Each
call computes the loss, rewards, margins and accuracies of B pairs and runs backward. "floor" is
`(chosen + rejected).sum().backward()` and one more input: what torch takes for the smallest graph
over the same tensors, two thirds of it inside `.backward()` itself. Times are per call.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import fusedpo
import torch
import torch.nn.functional as F
from fusedpo import reference
from torch import Tensor

from benchmarks import common, device, judge, targets_gpu

BETA, EPS, TAU = 0.1, 0.1, 0.05
LISTS: dict[str, tuple[list[str], list[float]]] = {
    "MPO": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
    "sigmoid + ipo + apo_zero": (["sigmoid", "ipo", "apo_zero"], [1.0, 0.1, 0.5]),
    "robust + nca_pair + aot": (["robust", "nca_pair", "aot"], [1.0, 0.5, 0.5]),
    "exo_pair + discopop + sigmoid_norm": (["exo_pair", "discopop", "sigmoid_norm"], [1.0] * 3),
}
CALLS = 200  # per timing: one call is too short for the clock


class Batch:
    def __init__(self, pairs: int, dtype: torch.dtype, place: torch.device) -> None:
        torch.manual_seed(0)
        self.place = place

        def logps() -> Tensor:
            return -50 + 5 * torch.randn(pairs, dtype=dtype, device=place)

        self.chosen, self.rejected = logps().requires_grad_(), logps().requires_grad_()
        self.ref_chosen, self.ref_rejected = logps(), logps()
        self.chosen_lengths = torch.randint(10, 200, (pairs,), device=place)
        self.rejected_lengths = torch.randint(10, 200, (pairs,), device=place)
        self.nll = torch.rand((), dtype=dtype, device=place, requires_grad=True)
        self.leaves = [self.chosen, self.rejected, self.nll]

    def to(self, dtype: torch.dtype) -> Batch:
        other = Batch(len(self.chosen), dtype, self.place)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                copy = value.detach().to(dtype if value.is_floating_point() else value.dtype)
                setattr(other, name, copy.requires_grad_(value.requires_grad))
        other.leaves = [other.chosen, other.rejected, other.nll]
        return other


def plain(b: Batch, names: list[str], weights: list[float]) -> tuple[Tensor, ...]:
    """The formulas as a trainer writes them in torch."""
    r_c, r_r = b.chosen - b.ref_chosen, b.rejected - b.ref_rejected
    delta = r_c - r_r
    loss: Any = 0.0
    for name, weight in zip(names, weights, strict=True):
        losses: Tensor
        if name == "sigmoid":
            losses = -F.logsigmoid(BETA * delta)
        elif name == "bco_pair":
            losses = -F.logsigmoid(BETA * r_c) - F.logsigmoid(-(BETA * r_r))
        elif name == "sft":
            losses = b.nll.expand(len(r_c))
        elif name == "ipo":
            mean_c, mean_r = r_c / b.chosen_lengths, r_r / b.rejected_lengths
            losses = (mean_c - mean_r - 1 / (2 * BETA)) ** 2
        elif name == "apo_zero":
            losses = 1 - torch.sigmoid(BETA * r_c) + torch.sigmoid(BETA * r_r)
        elif name == "robust":
            clean, flipped = F.logsigmoid(BETA * delta), F.logsigmoid(-BETA * delta)
            losses = (-(1 - EPS) * clean + EPS * flipped) / (1 - 2 * EPS)
        elif name == "nca_pair":
            up, down = BETA * r_c, BETA * r_r
            losses = -F.logsigmoid(up) - 0.5 * F.logsigmoid(-up) - 0.5 * F.logsigmoid(-down)
        elif name == "aot":
            policy, _ = torch.sort(b.chosen - b.rejected)
            ref, _ = torch.sort(b.ref_chosen - b.ref_rejected)
            x = BETA * (policy - ref)
            losses = -F.logsigmoid(x) * (1 - EPS) - F.logsigmoid(-x) * EPS
        elif name == "exo_pair":
            x = BETA * delta
            losses = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-EPS)) + torch.sigmoid(-x) * (
                F.logsigmoid(-x) - math.log(EPS)
            )
        elif name == "discopop":
            x = BETA * delta
            m = torch.sigmoid(x / TAU)
            losses = -F.logsigmoid(x) * (1 - m) + torch.exp(-x) * m
        else:  # sigmoid_norm
            losses = -F.logsigmoid(BETA * (r_c / b.chosen_lengths - r_r / b.rejected_lengths))
        loss = loss + losses.mean() * weight
    rewards_c, rewards_r = BETA * r_c.detach(), BETA * r_r.detach()
    return loss, rewards_c, rewards_r, rewards_c - rewards_r, (rewards_c > rewards_r).float()


def options_of(b: Batch, names: list[str], weights: list[float]) -> dict[str, Any]:
    smooths = {"robust", "aot", "exo_pair"} & set(names)
    return {
        "loss_type": names,
        "loss_weights": weights,
        "beta": BETA,
        "label_smoothing": EPS if smooths else 0.0,
        "chosen_lengths": b.chosen_lengths,
        "rejected_lengths": b.rejected_lengths,
        "chosen_nll": b.nll,
    }


def fused(module: Any, b: Batch, options: dict[str, Any]) -> Any:
    return module.preference_loss(b.chosen, b.rejected, b.ref_chosen, b.ref_rejected, **options)


def verify(b: Batch, names: list[str], weights: list[float]) -> dict[str, float]:
    """Largest relative error of loss and gradients; the reference in float64 is exact."""
    exact = b.to(torch.float64)
    want = fused(reference, exact, options_of(exact, names, weights)).loss
    want_grads = torch.autograd.grad(want, exact.leaves, allow_unused=True)
    errors = {}
    for name, loss in (
        ("fusedpo", fused(fusedpo, b, options_of(b, names, weights)).loss),
        ("plain torch", plain(b, names, weights)[0]),
    ):
        grads = torch.autograd.grad(loss, b.leaves, allow_unused=True)
        worst = abs(loss.item() - want.item()) / abs(want.item())
        for got, true in zip(grads, want_grads, strict=True):
            if true is not None and got is not None:
                worst = max(worst, ((got - true).abs().max() / true.abs().max()).item())
        errors[name] = worst
        if worst > 1e-4:
            raise RuntimeError(f"{name} is wrong for {names}: relative error {worst}")
    return errors


def many(loss: Callable[[], Tensor], leaves: list[Tensor], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            for leaf in leaves:
                leaf.grad = None
            loss().backward()

    return run


def launches_of(loss: Callable[[], Tensor], leaves: list[Tensor], place: torch.device) -> list[str]:
    """Kernels of one forward and backward with an upstream gradient that exists already."""
    one = torch.ones((), device=place)
    return device.launches(lambda: torch.autograd.grad(loss(), leaves, one), place)


def run_list(name: str, options: argparse.Namespace, place: torch.device) -> dict[str, Any]:
    names, weights = LISTS[name]
    b = Batch(options.pairs, torch.float32, place)
    errors = verify(b, names, weights)
    arguments = options_of(b, names, weights)
    leaves = b.leaves if "sft" in names else b.leaves[:2]

    def floor() -> Tensor:
        total = (b.chosen + b.rejected).sum()
        return total + b.nll if "sft" in names else total

    contestants: dict[str, Callable[[], Tensor]] = {
        "floor": floor,
        "plain torch": lambda: plain(b, names, weights)[0],
        "fusedpo": lambda: fused(fusedpo, b, arguments).loss,
        "reference": lambda: fused(reference, b, arguments).loss,
    }
    if options.compile:
        torch._dynamo.reset()
        compiled = torch.compile(plain, fullgraph=True, dynamic=False)
        contestants["compile"] = lambda: compiled(b, names, weights)[0]
    calls = {
        peer: common.Call(many(loss, leaves, options.calls)) for peer, loss in contestants.items()
    }
    times = device.interleave(calls, options.rounds, place)
    microseconds = {peer: 1e6 * values["min_s"] / options.calls for peer, values in times.items()}
    medians = {peer: 1e6 * values["median_s"] / options.calls for peer, values in times.items()}
    base = microseconds["floor"]
    row = {
        "losses": names,
        "pairs": options.pairs,
        "relative_error": errors,
        "microseconds": microseconds,
        "median_microseconds": medians,
        "share_of_plain_torch": microseconds["fusedpo"] / microseconds["plain torch"],
        "share_above_the_floor": (microseconds["fusedpo"] - base)
        / (microseconds["plain torch"] - base),
    }
    print(
        f"{name:36s} floor {base:6.1f}  plain torch {microseconds['plain torch']:6.1f}  "
        f"fusedpo {microseconds['fusedpo']:6.1f} us  = {row['share_of_plain_torch']:.2f}, "
        f"above the floor {row['share_above_the_floor']:.2f}"
    )
    if options.on_gpu:
        kernels = {
            peer: launches_of(contestants[peer], leaves, place)
            for peer in ("fusedpo", "plain torch")
        }
        row["launches"] = len(kernels["fusedpo"])
        row["kernels"] = kernels["fusedpo"]
        row["launches_of_plain_torch"] = len(kernels["plain torch"])
        row["times_faster_than_eager"] = medians["plain torch"] / medians["fusedpo"]
        compiled_text = f"  compile {medians['compile']:6.1f} us" if "compile" in medians else ""
        print(
            f"{'':36s} {row['launches']} launches, plain torch {row['launches_of_plain_torch']}; "
            f"{row['times_faster_than_eager']:.1f} x faster by medians{compiled_text}"
        )
    return row


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="--device cuda's code on a CPU")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 5 calls")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    options = parser.parse_args(arguments)
    options.on_gpu = options.rehearse or options.device == "cuda"
    options.compile = options.compile and options.on_gpu
    options.calls = 5 if options.quick else CALLS
    options.rounds = 3 if options.quick else options.rounds
    place = device.choose(options.rehearse) if options.on_gpu else torch.device("cpu")
    torch.set_num_threads(1)  # [B] numbers: there is nothing to share
    env = common.environment() | {"gpu": device.facts(place)}
    path = options.out or common.RESULTS / common.device_name(env) / "losses.json"
    content: dict[str, Any] = {
        "benchmark": "losses",
        "rehearsal": options.rehearse,
        "environment": env,
        "times": "minimum of rounds, and their median",
        "lists": {},
    }
    for name in LISTS:
        content["lists"][name] = run_list(name, options, place)
        common.write(path, content)
    if options.on_gpu:
        judge.show(judge.rows(targets_gpu.TARGETS, {"losses": content}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
