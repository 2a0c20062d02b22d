"""The paired losses in plain PyTorch: name, formula, what it needs, and the definition.

An entry here and a case in csrc/core/loss_pair.h make a new loss. Notation: r = logp - ref_logp in
nats, s its f-divergence score (r for reverse_kl), eps = label_smoothing, |y| the tokens of a
completion, ls = log sigmoid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._loss_checks import Paired, PairPlan
from .logps import exact

__all__ = ["PAIRED", "Pairs", "nls"]

PAIRED: dict[str, Paired] = {}

# Exponents stop here, with a zero gradient past it: e^80 fits into float32, as does (e^40)^2.
_CAP = 80.0
_SQUARED_CAP = 40.0


class Pairs:
    """What the losses see of a batch: float64 tensors [B], and the options."""

    def __init__(
        self,
        plan: PairPlan,
        logps: tuple[Tensor, Tensor],
        refs: tuple[Tensor, Tensor] | None,
        lengths: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.plan = plan
        self.beta, self.eps = plan.beta, plan.label_smoothing
        self.chosen, self.rejected = map(exact, logps)
        if refs is not None:
            self.ref_chosen, self.ref_rejected = map(exact, refs)
            self.r_chosen = self.chosen - self.ref_chosen
            self.r_rejected = self.rejected - self.ref_rejected
        if lengths is not None:
            # A completion without a token divides by 1: its log-prob is 0, and stays so.
            self.len_chosen, self.len_rejected = (exact(n.clamp(min=1)) for n in lengths)

    def scores(self, cap: float = _CAP) -> tuple[Tensor, Tensor]:
        return self._score(self.r_chosen, cap), self._score(self.r_rejected, cap)

    def delta(self, cap: float = _CAP) -> Tensor:
        chosen, rejected = self.scores(cap)
        return chosen - rejected

    def delta_per_token(self, cap: float = _CAP) -> Tensor:
        chosen, rejected = self.scores(cap)
        return chosen / self.len_chosen - rejected / self.len_rejected

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        return self.chosen / self.len_chosen, self.rejected / self.len_rejected

    def alpha_rewards(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.mean_logps()
        alpha = -self.plan.alpha
        return _scaled_expm1(chosen, alpha, _CAP), _scaled_expm1(rejected, alpha, _CAP)

    def _score(self, r: Tensor, cap: float) -> Tensor:
        plan = self.plan
        if plan.f_divergence == 1:  # forward_kl: 1 - e^-r
            return _scaled_expm1(r, -1.0, cap)
        if plan.f_divergence == 2:  # js_divergence
            return math.log(2) + F.logsigmoid(r)
        if plan.f_divergence == 3 and abs(plan.f_alpha - 1) >= 1e-6:  # alpha_divergence
            return _scaled_expm1(r, plan.f_alpha - 1, cap)
        return r


def _scaled_expm1(x: Tensor, a: float, cap: float) -> Tensor:
    """(e^(a x) - 1) / a, and its limit x for a = 0; e^cap / |a|, or its square, fits into fp32."""
    if a == 0:
        return x
    return torch.expm1((a * x).clamp(max=cap + min(0.0, math.log(20 * abs(a))))) / a


def nls(x: Tensor) -> Tensor:
    """-log sigmoid(x)"""
    return -F.logsigmoid(x)


def _smoothed(x: Tensor, eps: float) -> Tensor:
    return (1 - eps) * nls(x) + eps * nls(-x)


def _hinge(x: Tensor) -> Tensor:
    return F.relu(1 - x)


def _paired(
    name: str, code: int, formula: str, source: str, use: str, **needs: Any
) -> Callable[[Callable[[Pairs], Tensor]], Callable[[Pairs], Tensor]]:
    def register(value: Callable[[Pairs], Tensor]) -> Callable[[Pairs], Tensor]:
        PAIRED[name] = Paired(code, formula, source, use, value, **needs)
        return value

    return register


_EPS, _F, _CPO = "label_smoothing", "f_divergence_type", "cpo_alpha"
_F_ALPHA = (_F, "f_alpha_divergence_coef")
_SIMPO = (_EPS, _CPO, "simpo_gamma")


# ---- with reference -----------------------------------------------------------------------------


@_paired(
    "sigmoid",
    0,
    "-ls(beta (s_c - s_r))",
    "DPO, arXiv 2305.18290",
    "the default; start here",
    options=_F_ALPHA,
)
def _sigmoid(p: Pairs) -> Tensor:
    return nls(p.beta * p.delta())


@_paired(
    "cdpo",
    1,
    "-(1-eps) ls(x) - eps ls(-x), x = beta (s_c - s_r)",
    "conservative DPO; TRL <= 0.28 called it sigmoid with label_smoothing",
    "some labels are wrong: eps is their share",
    options=(_EPS, *_F_ALPHA),
)
def _cdpo(p: Pairs) -> Tensor:
    return _smoothed(p.beta * p.delta(), p.eps)


@_paired(
    "hinge",
    2,
    "max(0, 1 - beta (s_c - s_r))",
    "SLiC-HF, arXiv 2305.10425",
    "pairs with a large enough margin shall stop to count",
    options=_F_ALPHA,
)
def _hinge_loss(p: Pairs) -> Tensor:
    return _hinge(p.beta * p.delta())


@_paired(
    "ipo",
    3,
    "(s_c/|y_c| - s_r/|y_r| - 1/(2 beta))^2",
    "IPO per token, arXiv 2310.12036 and its authors",
    "DPO overfits nearly deterministic preferences; lengths differ",
    lengths=True,
    options=_F_ALPHA,
)
def _ipo(p: Pairs) -> Tensor:
    return (p.delta_per_token(_SQUARED_CAP) - 1 / (2 * p.beta)) ** 2


@_paired(
    "ipo_sum",
    4,
    "(s_c - s_r - 1/(2 beta))^2",
    "IPO as printed, arXiv 2310.12036",
    "to reproduce the paper's formula",
    options=_F_ALPHA,
)
def _ipo_sum(p: Pairs) -> Tensor:
    return (p.delta(_SQUARED_CAP) - 1 / (2 * p.beta)) ** 2


@_paired(
    "exo_pair",
    5,
    "q (log q - log(1-eps)) + p (log p - log eps), q = sigmoid(beta (s_c - s_r)), p = 1 - q",
    "EXO, arXiv 2402.00856 eq. 16",
    "the reverse KL to smoothed labels; eps > 0, 1e-3 in the paper",
    options=(_EPS, *_F_ALPHA),
)
def _exo_pair(p: Pairs) -> Tensor:
    x = p.beta * p.delta()
    keep = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-p.eps))
    flip = torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(p.eps))
    return keep + flip


@_paired(
    "nca_pair",
    6,
    "-ls(beta r_c) - ls(-beta r_c)/2 - ls(-beta r_r)/2",
    "NCA, arXiv 2402.05369",
    "the log-prob of chosen completions shall not fall",
)
def _nca_pair(p: Pairs) -> Tensor:
    chosen, rejected = p.beta * p.r_chosen, p.beta * p.r_rejected
    return nls(chosen) + 0.5 * nls(-chosen) + 0.5 * nls(-rejected)


@_paired(
    "robust",
    7,
    "(-(1-eps) ls(x) + eps ls(-x)) / (1 - 2 eps), x = beta (s_c - s_r)",
    "robust DPO, arXiv 2403.00409",
    "labels are flipped with a known probability eps < 1/2",
    options=(_EPS, *_F_ALPHA),
)
def _robust(p: Pairs) -> Tensor:
    x = p.beta * p.delta()
    return ((1 - p.eps) * nls(x) - p.eps * nls(-x)) / (1 - 2 * p.eps)


@_paired(
    "bco_pair",
    8,
    "-ls(beta r_c) - ls(-beta r_r)",
    "BCO, arXiv 2404.04656",
    "a classifier's view of pairs; no running mean of rewards",
)
def _bco_pair(p: Pairs) -> Tensor:
    return nls(p.beta * p.r_chosen) + nls(-p.beta * p.r_rejected)


@_paired(
    "sppo_hard",
    9,
    "(r_c - 1/(2 beta))^2 + (r_r + 1/(2 beta))^2",
    "SPPO with hard labels, arXiv 2405.00675",
    "self-play with both rewards pinned to a target",
)
def _sppo_hard(p: Pairs) -> Tensor:
    return (p.r_chosen - 0.5 / p.beta) ** 2 + (p.r_rejected + 0.5 / p.beta) ** 2


def _sorted(values: Tensor) -> Tensor:
    return values.sort(stable=True).values


@_paired(
    "aot",
    10,
    "-(1-eps) ls(beta d) - eps ls(-beta d), d = sort(logp_c - logp_r) - sort(ref_c - ref_r)",
    "AOT, arXiv 2406.05882",
    "the whole distribution of margins shall move; large batches",
    options=(_EPS,),
    sorts=True,
)
def _aot(p: Pairs) -> Tensor:
    d = _sorted(p.chosen - p.rejected) - _sorted(p.ref_chosen - p.ref_rejected)
    return _smoothed(p.beta * d, p.eps)


@_paired(
    "aot_unpaired",
    11,
    "-(1-eps) ls(beta d) - eps ls(-beta d), d = sort(r_c) - sort(r_r)",
    "AOT, arXiv 2406.05882",
    "as aot, where chosen and rejected do not belong together",
    options=(_EPS,),
    sorts=True,
)
def _aot_unpaired(p: Pairs) -> Tensor:
    return _smoothed(p.beta * (_sorted(p.r_chosen) - _sorted(p.r_rejected)), p.eps)


@_paired(
    "apo_zero",
    12,
    "1 - sigmoid(beta r_c) + sigmoid(beta r_r)",
    "APO, arXiv 2408.06266 eq. 7",
    "chosen completions are better than what the model writes",
)
def _apo_zero(p: Pairs) -> Tensor:
    return torch.sigmoid(-p.beta * p.r_chosen) + torch.sigmoid(p.beta * p.r_rejected)


@_paired(
    "apo_down",
    13,
    "sigmoid(beta r_c) + 1 - sigmoid(beta (r_c - r_r))",
    "APO, arXiv 2408.06266 eq. 8",
    "chosen completions are worse than what the model writes",
)
def _apo_down(p: Pairs) -> Tensor:
    margin = p.beta * (p.r_chosen - p.r_rejected)
    return torch.sigmoid(p.beta * p.r_chosen) + torch.sigmoid(-margin)


@_paired(
    "discopop",
    14,
    "-(1-m) ls(x) + m e^-x, x = beta (s_c - s_r), m = sigmoid(x / discopop_tau)",
    "DiscoPOP, arXiv 2406.08414 eq. 5",
    "a loss found by search; for discopop_tau >= 1 the exponent is capped at 80",
    options=("discopop_tau", *_F_ALPHA),
)
def _discopop(p: Pairs) -> Tensor:
    x, tau = p.beta * p.delta(), p.plan.discopop_tau
    # m e^-x with m = sigmoid(x / tau), as one exponential
    mixed = torch.exp((F.logsigmoid(x / tau) - x).clamp(max=_CAP))
    return torch.sigmoid(-x / tau) * nls(x) + mixed


@_paired(
    "sft",
    15,
    "chosen_nll",
    "supervised fine-tuning",
    "one term of a list, e.g. ['sigmoid', 'sft'], against falling log-probs of chosen",
    nll_weight=1.0,
    options=_F_ALPHA,
)
def _sft(p: Pairs) -> Tensor:
    return torch.zeros_like(p.chosen)  # chosen_nll is added as for every loss that has it


@_paired(
    "sigmoid_norm",
    16,
    "-ls(beta (s_c/|y_c| - s_r/|y_r|))",
    "TRL",
    "DPO without its reward for length",
    lengths=True,
    options=_F_ALPHA,
)
def _sigmoid_norm(p: Pairs) -> Tensor:
    return nls(p.beta * p.delta_per_token())


# ---- without reference --------------------------------------------------------------------------


@_paired(
    "cpo",
    17,
    "-(1-eps) ls(beta L) - eps ls(-beta L) + cpo_alpha chosen_nll, L = logp_c - logp_r",
    "CPO, arXiv 2401.08417",
    "no memory for a reference; cpo_alpha defaults to 1",
    reference=False,
    nll_weight=None,
    cpo_alpha_default=1.0,
    options=(_EPS, _CPO),
)
def _cpo(p: Pairs) -> Tensor:
    return _smoothed(p.beta * (p.chosen - p.rejected), p.eps)


@_paired(
    "cpo_hinge",
    18,
    "max(0, 1 - beta (logp_c - logp_r)) + cpo_alpha chosen_nll",
    "TRL's CPOTrainer",
    "as cpo, but large margins stop to count; cpo_alpha defaults to 1",
    reference=False,
    nll_weight=None,
    cpo_alpha_default=1.0,
    options=(_CPO,),
)
def _cpo_hinge(p: Pairs) -> Tensor:
    return _hinge(p.beta * (p.chosen - p.rejected))


@_paired(
    "cpo_ipo",
    19,
    "(logp_c/|y_c| - logp_r/|y_r| - 1/(2 beta))^2 + cpo_alpha chosen_nll",
    "TRL's CPOTrainer",
    "as ipo without a reference; cpo_alpha defaults to 1",
    reference=False,
    lengths=True,
    nll_weight=None,
    cpo_alpha_default=1.0,
    options=(_CPO,),
)
def _cpo_ipo(p: Pairs) -> Tensor:
    chosen, rejected = p.mean_logps()
    return (chosen - rejected - 1 / (2 * p.beta)) ** 2


@_paired(
    "simpo",
    20,
    "-(1-eps) ls(x) - eps ls(-x), x = beta (logp_c/|y_c| - logp_r/|y_r|) - simpo_gamma"
    " (+ cpo_alpha chosen_nll)",
    "SimPO, arXiv 2405.14734",
    "no reference, lengths differ; beta is 2 to 10 there; cpo_alpha defaults to 0",
    reference=False,
    lengths=True,
    nll_weight=None,
    options=_SIMPO,
)
def _simpo(p: Pairs) -> Tensor:
    chosen, rejected = p.mean_logps()
    return _smoothed(p.beta * (chosen - rejected) - p.plan.simpo_gamma, p.eps)


@_paired(
    "alphapo",
    21,
    "simpo on (1 - p^-alpha)/alpha, p = e^(logp/|y|), in place of logp/|y|",
    "AlphaPO, arXiv 2501.03884",
    "simpo with a reward shape; alpha = 0 is simpo; cpo_alpha defaults to 0",
    reference=False,
    lengths=True,
    nll_weight=None,
    options=(*_SIMPO, "alpha"),
)
def _alphapo(p: Pairs) -> Tensor:
    chosen, rejected = p.alpha_rewards()
    return _smoothed(p.beta * (chosen - rejected) - p.plan.simpo_gamma, p.eps)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0"""
    near_zero = x > -math.log(2)
    return torch.where(near_zero, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


@_paired(
    "orpo",
    22,
    "chosen_nll - beta ls(o), o = logit(p_c) - logit(p_r), p = e^(logp/|y|)",
    "ORPO, arXiv 2403.07691",
    "one stage from a base model; TRL's chosen_nll runs over prompt and completion",
    reference=False,
    lengths=True,
    nll_weight=1.0,
)
def _orpo(p: Pairs) -> Tensor:
    chosen, rejected = (x.clamp(max=-1e-7) for x in p.mean_logps())
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return p.beta * nls(log_odds)


@_paired(
    "orpo_logratio",
    23,
    "chosen_nll - beta ls(logp_c - logp_r)",
    "articles that drop ORPO's odds; this is not ORPO",
    "only to reproduce such results",
    reference=False,
    nll_weight=1.0,
)
def _orpo_logratio(p: Pairs) -> Tensor:
    return p.beta * nls(p.chosen - p.rejected)
