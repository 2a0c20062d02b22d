"""The losses against their definitions in many-digit arithmetic (mpmath), values and derivatives.

The definitions below are written from docs/losses.md, without the safe forms; enough digits make
them exact. Bound: 1e-6 in float32 and 1e-12 in float64, relative, and absolute where a loss or a
derivative is a difference that cancels.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import fusedpo
import mpmath
import pytest
import torch
from loss_cases import CASES, REFERENCE_FREE, SORTING, UNPAIRED, options_of
from mpmath import mpf

DIGITS = 420  # central differences with h = 1e-100 keep 1e-200 of a derivative, and need the rest
H = mpf(10) ** -100
BETA = 0.1
LENGTHS = (3, 7)
NLL = 0.75
ALPHA = 0.25
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}
SMALLEST = {torch.float32: 1.2e-38, torch.float64: 2.3e-308}
LARGEST = {torch.float32: 3.4e38, torch.float64: 1.7e308}

# |beta r| from 1e-8 to 1e4.
SIZES = [1e-7, 1e-5, 1e-3, 0.1, 1.0, 9.5, 33.0, 100.0, 777.0, 3000.0, 7400.0, 2e4, 1e5]
RATIOS = [sign * size for size in SIZES for sign in (1, -1)]
PAIRS = [
    *((r, 0.0) for r in RATIOS),
    *((0.0, r) for r in RATIOS),
    *((r, -r) for r in RATIOS),
    *((r, 0.75 * r) for r in RATIOS),
    *((r, 2.0) for r in RATIOS),
]
LOGPS = [(-abs(a), -abs(b)) for a, b in PAIRS if a != 0 and b != 0]
# Differences that may cancel: errors are absolute there, in units of the terms (about 1).
CANCELS = {
    "cdpo", "robust", "exo_pair", "nca_pair", "apo_down", "discopop", "ipo", "ipo_sum", "sppo_hard",
    "sigmoid_norm", "cpo", "cpo_ipo", "simpo", "alphapo", "orpo", "cpo_hinge", "hinge",
}  # fmt: skip


def ls(x: Any) -> Any:
    return -mpmath.log1p(mpmath.exp(-x))


def sig(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def score(f: str, r: Any, cap: int) -> Any:
    if f == "forward_kl":
        return 1 - mpmath.exp(min(-r, mpf(cap)))
    if f == "js_divergence":
        return mpmath.log(2) + ls(r)
    if f == "alpha_divergence":
        a = mpf(0.5) - 1
        return (mpmath.exp(min(a * r, mpf(cap))) - 1) / a
    return r


def smooth(x: Any, eps: Any) -> Any:
    return -(1 - eps) * ls(x) - eps * ls(-x)


def logit_of_exp(x: Any) -> Any:
    x = min(x, mpf(-1e-7))
    return x - mpmath.log(1 - mpmath.exp(x))


def alpha_reward(x: Any) -> Any:
    return (1 - mpmath.exp(min(-ALPHA * x, mpf(80)))) / ALPHA


def definition(name: str, f: str, eps: float) -> Callable[[Any, Any], Any]:
    b, e, g = mpf(BETA), mpf(eps), mpf(0.5)
    n_c, n_r = LENGTHS
    cap = 40 if name in ("ipo", "ipo_sum") else 80

    def x(c: Any, r: Any) -> Any:
        return b * (score(f, c, cap) - score(f, r, cap))

    def per_token(c: Any, r: Any) -> Any:
        return score(f, c, cap) / n_c - score(f, r, cap) / n_r

    def exo(c: Any, r: Any) -> Any:
        q, p = sig(x(c, r)), sig(-x(c, r))
        log_q, log_p = ls(x(c, r)), ls(-x(c, r))
        return q * (log_q - mpmath.log(1 - e)) + p * (log_p - mpmath.log(e))

    def discopop(c: Any, r: Any) -> Any:
        m, tau = sig(x(c, r) / mpf(0.05)), mpf(0.05)
        return -sig(-x(c, r) / tau) * ls(x(c, r)) + m * mpmath.exp(-x(c, r))

    nll, half = mpf(NLL), mpf(0.5)
    definitions: dict[str, Callable[[Any, Any], Any]] = {
        "sigmoid": lambda c, r: -ls(x(c, r)),
        "cdpo": lambda c, r: smooth(x(c, r), e),
        "hinge": lambda c, r: max(mpf(0), 1 - x(c, r)),
        "ipo": lambda c, r: (per_token(c, r) - 1 / (2 * b)) ** 2,
        "ipo_sum": lambda c, r: (x(c, r) / b - 1 / (2 * b)) ** 2,
        "exo_pair": exo,
        "nca_pair": lambda c, r: -ls(b * c) - half * ls(-b * c) - half * ls(-b * r),
        "robust": lambda c, r: (-(1 - e) * ls(x(c, r)) + e * ls(-x(c, r))) / (1 - 2 * e),
        "bco_pair": lambda c, r: -ls(b * c) - ls(-b * r),
        "sppo_hard": lambda c, r: (c - 1 / (2 * b)) ** 2 + (r + 1 / (2 * b)) ** 2,
        "apo_zero": lambda c, r: sig(-b * c) + sig(b * r),
        "apo_down": lambda c, r: sig(b * c) + sig(-b * (c - r)),
        "discopop": discopop,
        "sft": lambda c, r: nll,
        "sigmoid_norm": lambda c, r: -ls(b * per_token(c, r)),
        "cpo": lambda c, r: smooth(b * (c - r), e) + half * nll,
        "cpo_hinge": lambda c, r: max(mpf(0), 1 - b * (c - r)) + half * nll,
        "cpo_ipo": lambda c, r: (c / n_c - r / n_r - 1 / (2 * b)) ** 2 + half * nll,
        "simpo": lambda c, r: smooth(b * (c / n_c - r / n_r) - g, e) + half * nll,
        "alphapo": lambda c, r: (
            smooth(b * (alpha_reward(c / n_c) - alpha_reward(r / n_r)) - g, e) + half * nll
        ),
        "orpo": lambda c, r: nll - b * ls(logit_of_exp(c / n_c) - logit_of_exp(r / n_r)),
        "orpo_logratio": lambda c, r: nll - b * ls(c - r),
    }
    return definitions[name]


def slope(function: Callable[..., Any], at: tuple[Any, ...], which: int) -> Any:
    up, down = list(at), list(at)
    up[which] += H
    down[which] -= H
    return (function(*up) - function(*down)) / (2 * H)


def assert_close(got: float, exact: Any, dtype: torch.dtype, absolute: float, what: Any) -> None:
    assert got == got, what
    assert abs(got) != float("inf"), what
    if abs(exact) > LARGEST[dtype]:
        return
    bound = BOUNDS[dtype] * abs(exact) + BOUNDS[dtype] * absolute + SMALLEST[dtype]
    assert abs(mpf(got) - exact) <= bound, (what, got, mpmath.nstr(exact, 17))


@pytest.fixture(autouse=True)
def _digits():
    with mpmath.workdps(DIGITS):
        yield


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("name", "f"), [case for case in CASES if case[0] not in SORTING])
def test_values_and_derivatives_are_exact(name, f, dtype):
    options = options_of(name, f_divergence_type=f)
    exact = definition(name, f, options.get("label_smoothing", 0.0))
    points = LOGPS if name in REFERENCE_FREE else PAIRS
    chosen, rejected = torch.tensor(points, dtype=dtype).T.clone().requires_grad_().unbind()
    zeros = torch.zeros(len(points), dtype=dtype)
    out = fusedpo.preference_loss(
        chosen,
        rejected,
        zeros,
        zeros,
        beta=BETA,
        chosen_lengths=torch.full((len(points),), LENGTHS[0]),
        rejected_lengths=torch.full((len(points),), LENGTHS[1]),
        chosen_nll=torch.tensor(NLL, dtype=dtype),
        reduction="sum",
        **options,
    )
    grads: tuple[torch.Tensor | None, ...] = (None, None)
    if out.loss.requires_grad:
        grads = torch.autograd.grad(out.loss, (chosen, rejected))
    absolute = 1.0 if name in CANCELS else 0.0
    for i, (c, r) in enumerate(zip(chosen.tolist(), rejected.tolist(), strict=True)):
        at = (mpf(c), mpf(r))
        # A squared difference cancels in units of its terms.
        scale = absolute * max(1.0, *(abs(v) for v in (c, r))) ** (2 if "ipo" in name else 0)
        assert_close(out.losses[i].item(), exact(*at), dtype, scale, (name, f, c, r))
        for which, grad in enumerate(grads):
            got = 0.0 if grad is None else grad[i].item()
            scale = absolute * max(1.0, abs(c), abs(r)) if "ipo" in name else absolute
            assert_close(got, slope(exact, at, which), dtype, scale, (name, f, c, r, which))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", UNPAIRED)
def test_unpaired_values_and_derivatives_are_exact(name, dtype):
    kl, delta, weights = 0.25, 0.5, (1.5, 0.75)
    b = mpf(BETA)
    desirable: dict[str, Callable[[Any], Any]] = {
        "kto": lambda r: 1 / (1 + mpmath.exp(b * (r - kl))),
        "apo_zero_unpaired": lambda r: 1 / (1 + mpmath.exp(b * r)),
        "bco": lambda r: -ls(b * r - delta),
    }
    undesirable: dict[str, Callable[[Any], Any]] = {
        "kto": lambda r: 1 / (1 + mpmath.exp(b * (kl - r))),
        "apo_zero_unpaired": lambda r: sig(b * r),
        "bco": lambda r: -ls(-(b * r - delta)),
    }
    shift = {"kto": {"kl": kl}, "apo_zero_unpaired": {}, "bco": {"delta": delta}}[name]
    points = list(itertools.product(RATIOS, (True, False)))
    logps = torch.tensor([r for r, _ in points], dtype=dtype, requires_grad=True)
    out = fusedpo.unpaired_loss(
        logps,
        torch.zeros_like(logps),
        torch.tensor([label for _, label in points]),
        loss_type=name,
        beta=BETA,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        reduction="sum",
        **shift,
    )
    (grad,) = torch.autograd.grad(out.loss, logps)
    for i, (r, (_, label)) in enumerate(zip(logps.tolist(), points, strict=True)):
        function = (desirable if label else undesirable)[name]
        weight = weights[0] if label else weights[1]
        assert_close(out.losses[i].item(), weight * function(mpf(r)), dtype, 0, (name, r, label))
        derivative = weight * slope(function, (mpf(r),), 0)
        assert_close(grad[i].item(), derivative, dtype, 0, (name, r, label))


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", SORTING)
def test_sorted_losses_are_exact(name, dtype):
    eps, b = 0.1, mpf(BETA)
    values = torch.tensor(PAIRS, dtype=dtype)
    order = torch.randperm(len(PAIRS))
    leaves = [values[:, 0], values[:, 1], values[order, 0] / 2, values[order, 1] / 4]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    out = fusedpo.preference_loss(
        *leaves, loss_type=name, label_smoothing=eps, beta=BETA, reduction="sum"
    )
    grads = torch.autograd.grad(out.loss, leaves)
    c, r, ref_c, ref_r = ([mpf(v) for v in leaf.tolist()] for leaf in leaves)
    if name == "aot":
        sides, users = ((c, r), (ref_c, ref_r)), ((0, 1), (3, 2))
    else:
        sides, users = ((c, ref_c), (r, ref_r)), ((0, 2), (3, 1))
    # users: the inputs with a plus and a minus sign in `up`, then in -`down`
    up, down = ([x - y for x, y in zip(*side, strict=True)] for side in sides)
    up_order = sorted(range(len(up)), key=lambda i: up[i])
    down_order = sorted(range(len(down)), key=lambda i: down[i])
    want = [[mpf(0)] * len(up) for _ in range(4)]
    for k, (i, j) in enumerate(zip(up_order, down_order, strict=True)):
        d = up[i] - down[j]
        exact = smooth(b * d, mpf(eps))
        # The fp64 differences round before the sorted ones are subtracted.
        spread = float(abs(up[i]) + abs(down[j]))
        assert_close(out.losses[k].item(), exact, dtype, 1e-3 * spread, (name, k))
        derivative = slope(lambda d: smooth(b * d, mpf(eps)), (d,), 0)
        for at, (plus, minus) in ((i, users[0]), (j, users[1])):
            want[plus][at] += derivative
            want[minus][at] -= derivative
    for got, exact_grad in zip(grads, want, strict=True):
        for k, value in enumerate(got.tolist()):
            assert_close(value, exact_grad[k], dtype, 1.0, (name, k))
