"""Argument checks of the loss functions, shared by `fusedpo.losses` and `fusedpo.reference`.

The options of a call are checked together and become a plan. Plans are cached, because a training
loop calls with the same options at every step and the checks would cost more than the losses.
Tensor values are never read here, only shapes, dtypes and devices.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")

OPTION_DEFAULTS: dict[str, Any] = {
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "discopop_tau": 0.05,
    "cpo_alpha": None,
    "simpo_gamma": 0.5,
    "alpha": 0.0,
}


class Paired(NamedTuple):
    """One paired loss: `code` is its number in csrc/core/loss_pair.h, `value` its definition."""

    code: int
    formula: str
    source: str
    use: str
    value: Callable[[Any], Tensor]
    reference: bool = True
    lengths: bool = False
    nll_weight: float | None = 0.0  # None: cpo_alpha, or `cpo_alpha_default` where that is None
    cpo_alpha_default: float = 0.0
    options: tuple[str, ...] = ()
    sorts: bool = False


class Unpaired(NamedTuple):
    """One unpaired loss: `code` is its number in csrc/core/loss_unpaired.h."""

    code: int
    formula: str
    source: str
    use: str
    value: Callable[[Any], Tensor]
    uses_kl: bool = False
    uses_delta: bool = False


class PairPlan(NamedTuple):
    """The checked options of a `preference_loss` call."""

    names: tuple[str, ...]
    losses: tuple[Paired, ...]
    weights: list[float]
    nll_weights: list[float]
    beta: float
    label_smoothing: float
    f_divergence: int
    f_alpha: float
    discopop_tau: float
    simpo_gamma: float
    alpha: float
    sorted_bits: int  # 1 aot, 2 aot_unpaired
    needs_reference: bool
    needs_lengths: bool
    needs_nll: bool
    operator_options: tuple[Any, ...]  # arguments of the operator, from `losses` to `alpha`


def unknown_loss(name: object, known: Mapping[str, Any]) -> ValueError:
    lines = "\n".join(f"  {each}: {known[each].formula}" for each in known)
    return ValueError(f"loss_type must be one of the names below; got {name!r}.\n{lines}")


def planner(table: Mapping[str, Paired]) -> Callable[..., PairPlan]:
    """Return `plan(loss_type, loss_weights, beta, *options)`; options as in OPTION_DEFAULTS."""
    cached = functools.lru_cache(maxsize=256)(functools.partial(_make_plan, table))

    def plan(
        loss_type: str | Sequence[str], loss_weights: Sequence[float] | None, *options: Any
    ) -> PairPlan:
        names = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
        weights = None if loss_weights is None else tuple(loss_weights)
        if torch.compiler.is_compiling():  # a trace cannot go through the cache
            return _make_plan(table, names, weights, *options)
        try:
            return cached(names, weights, *options)
        except TypeError:  # an option that cannot be hashed has the wrong type: let it be named
            return _make_plan(table, names, weights, *options)

    return plan


def _make_plan(
    table: Mapping[str, Paired],
    names: tuple[str, ...],
    weights: tuple[float, ...] | None,
    beta: float,
    label_smoothing: float,
    f_divergence_type: str,
    f_alpha_divergence_coef: float,
    discopop_tau: float,
    cpo_alpha: float | None,
    simpo_gamma: float,
    alpha: float,
) -> PairPlan:
    if not names:
        raise ValueError("loss_type must name at least one loss; got none.")
    for name in names:
        if name not in table:
            raise unknown_loss(name, table)
    if weights is None:
        weights = (1.0,) * len(names)
    if len(weights) != len(names):
        raise ValueError(
            f"loss_weights must have one weight for each of {list(names)}; got {list(weights)}."
        )
    for weight in weights:
        check_finite("loss_weights", weight)
    check_positive("beta", beta)
    if f_divergence_type not in F_DIVERGENCES:
        raise ValueError(
            f"f_divergence_type must be one of {', '.join(F_DIVERGENCES)}; "
            f"got {f_divergence_type!r}."
        )
    for option, value in (
        ("label_smoothing", label_smoothing),
        ("f_alpha_divergence_coef", f_alpha_divergence_coef),
        ("simpo_gamma", simpo_gamma),
        ("alpha", alpha),
        ("cpo_alpha", 0.0 if cpo_alpha is None else cpo_alpha),
    ):
        check_finite(option, value)
    check_positive("discopop_tau", discopop_tau)
    losses = tuple(table[name] for name in names)
    given = {
        "label_smoothing": label_smoothing,
        "f_divergence_type": f_divergence_type,
        "f_alpha_divergence_coef": f_alpha_divergence_coef,
        "discopop_tau": discopop_tau,
        "cpo_alpha": cpo_alpha,
        "simpo_gamma": simpo_gamma,
        "alpha": alpha,
    }
    _check_used(table, names, losses, given)
    _check_label_smoothing(names, label_smoothing)
    nll_weights = []
    for loss in losses:
        factor = loss.nll_weight
        if factor is None:
            factor = loss.cpo_alpha_default if cpo_alpha is None else cpo_alpha
        nll_weights.append(float(factor))
    sorted_bits = (1 if "aot" in names else 0) | (2 if "aot_unpaired" in names else 0)
    numbers = (
        float(beta),
        float(label_smoothing),
        F_DIVERGENCES.index(f_divergence_type),
        float(f_alpha_divergence_coef),
        float(discopop_tau),
        float(simpo_gamma),
        float(alpha),
    )
    floats = [float(weight) for weight in weights]
    return PairPlan(
        names,
        losses,
        floats,
        nll_weights,
        *numbers,
        sorted_bits=sorted_bits,
        needs_reference=any(loss.reference for loss in losses),
        needs_lengths=any(loss.lengths for loss in losses),
        needs_nll=any(weight != 0.0 for weight in nll_weights),
        operator_options=([loss.code for loss in losses], floats, nll_weights, *numbers),
    )


def _check_used(
    table: Mapping[str, Paired],
    names: tuple[str, ...],
    losses: tuple[Paired, ...],
    given: dict[str, Any],
) -> None:
    for option, value in given.items():
        if value == OPTION_DEFAULTS[option]:
            continue
        if option == "f_alpha_divergence_coef":
            if given["f_divergence_type"] != "alpha_divergence":
                raise ValueError(
                    "f_alpha_divergence_coef must be left at 0.5 unless f_divergence_type is "
                    f"'alpha_divergence'; got {value!r} with {given['f_divergence_type']!r}."
                )
        elif option == "f_divergence_type":
            for name, loss in zip(names, losses, strict=True):
                if option not in loss.options:
                    raise ValueError(
                        f"f_divergence_type must be left at 'reverse_kl' with loss_type {name!r}; "
                        f"got {value!r}. It is defined for {users_of(table, option)}."
                    )
        elif not any(option in loss.options for loss in losses):
            raise ValueError(
                f"{option} must be left at {OPTION_DEFAULTS[option]!r} with loss_type "
                f"{', '.join(map(repr, names))}, which does not use it; got {value!r}. "
                f"It is an option of {users_of(table, option)}."
            )


def users_of(table: Mapping[str, Paired], option: str) -> str:
    return ", ".join(name for name in table if option in table[name].options)


def _check_label_smoothing(names: tuple[str, ...], epsilon: float) -> None:
    if "exo_pair" in names and not 0.0 < epsilon < 1.0:
        raise ValueError(
            f"label_smoothing must be in (0, 1) with loss_type 'exo_pair'; got {epsilon}. "
            "Its paper recommends 1e-3."
        )
    if "robust" in names and not 0.0 <= epsilon < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5) with loss_type 'robust'; got {epsilon}. "
            "It is the probability that a label is flipped."
        )
    if not 0.0 <= epsilon <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1]; got {epsilon}.")


def check_pair_tensors(
    plan: PairPlan,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    chosen_nll: Tensor | None,
    pair_weights: Tensor | None,
    reduction: str,
) -> None:
    """Raise ValueError or TypeError unless the tensors are what the losses of `plan` need."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
    check_vector("chosen_logps", chosen, None)
    dtype, shape, device = chosen.dtype, chosen.shape, chosen.device
    for name, tensor in (
        ("rejected_logps", rejected),
        ("ref_chosen_logps", ref_chosen),
        ("ref_rejected_logps", ref_rejected),
        ("pair_weights", pair_weights),
    ):
        if tensor is None and name != "rejected_logps":
            continue
        if (
            not isinstance(tensor, Tensor)
            or tensor.dtype is not dtype
            or tensor.shape != shape
            or tensor.device != device
        ):
            check_vector(name, tensor, chosen)
    if pair_weights is not None and plan.sorted_bits:
        raise ValueError(
            "pair_weights must be None with loss_type 'aot' and 'aot_unpaired': they sort the "
            "batch, so that no term belongs to one pair."
        )
    if chosen_nll is not None:
        if isinstance(chosen_nll, Tensor) and chosen_nll.dim() == 0:
            check_like("chosen_nll", chosen_nll, chosen)
        else:
            check_vector("chosen_nll", chosen_nll, chosen)
    _check_lengths("chosen_lengths", chosen_lengths, chosen)
    _check_lengths("rejected_lengths", rejected_lengths, chosen)
    if plan.needs_reference and (ref_chosen is None or ref_rejected is None):
        missing = "ref_chosen_logps" if ref_chosen is None else "ref_rejected_logps"
        raise ValueError(
            f"{missing} must be given with loss_type {_first(plan, 'reference')!r}; got None. "
            "Pass zeros to mean a reference of zeros."
        )
    if plan.needs_lengths and (chosen_lengths is None or rejected_lengths is None):
        missing = "chosen_lengths" if chosen_lengths is None else "rejected_lengths"
        raise ValueError(
            f"{missing} must be given with loss_type {_first(plan, 'lengths')!r}; got None. "
            "pair_logps returns the numbers of completion tokens."
        )
    if plan.needs_nll and chosen_nll is None:
        name = next(n for n, weight in zip(plan.names, plan.nll_weights, strict=True) if weight)
        raise ValueError(
            f"chosen_nll must be given with loss_type {name!r}; got None. It is the mean negative "
            "log-probability of the chosen completion tokens of the batch."
        )


def _first(plan: PairPlan, need: str) -> str:
    return next(
        name for name, loss in zip(plan.names, plan.losses, strict=True) if getattr(loss, need)
    )


def _check_lengths(name: str, lengths: Tensor | None, chosen: Tensor) -> None:
    if lengths is None:
        return
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(lengths).__name__}.")
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype; got {lengths.dtype}.")
    _check_shape_and_device(name, lengths, chosen)


def check_vector(name: str, tensor: Tensor | None, like: Tensor | None) -> None:
    """[B] of fp32 or fp64; with `like`, its length, dtype and device, too."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}.")
    if like is not None:
        check_like(name, tensor, like)
        _check_shape_and_device(name, tensor, like)
        return
    if tensor.dtype is not torch.float32 and tensor.dtype is not torch.float64:
        raise TypeError(
            f"{name} must be float32 or float64; got {tensor.dtype}. A sum of log-probabilities "
            "has lost too much in half precision: sum in float32."
        )
    if tensor.dim() != 1:
        raise ValueError(
            f"{name} must have shape [B], one value for each sequence; got {list(tensor.shape)}."
        )


def check_like(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.dtype is not like.dtype:
        raise TypeError(
            f"{name} must have the dtype of the log-probs, {like.dtype}; got {tensor.dtype}."
        )
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device {like.device}; got {tensor.device}.")


def _check_shape_and_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} must have shape {list(like.shape)} to match the log-probs; "
            f"got {list(tensor.shape)}."
        )
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device {like.device}; got {tensor.device}.")


def check_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number; got {type(value).__name__}.")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value}.")


def check_positive(name: str, value: float) -> None:
    check_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be > 0; got {value}.")


def check_unpaired(
    table: Mapping[str, Unpaired],
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    loss_type: str,
    beta: float,
    kl: float | Tensor | None,
    delta: float | Tensor,
    desirable_weight: float,
    undesirable_weight: float,
    reduction: str,
) -> Unpaired:
    """Check the arguments of `unpaired_loss` and return the loss that they name."""
    if not isinstance(loss_type, str):
        raise TypeError(f"loss_type must be one name; got {type(loss_type).__name__}.")
    if loss_type not in table:
        raise unknown_loss(loss_type, table)
    loss = table[loss_type]
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}.")
    check_vector("logps", logps, None)
    check_vector("ref_logps", ref_logps, logps)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor; got {type(labels).__name__}.")
    if labels.dtype is not torch.bool:
        raise TypeError(f"labels must be bool (True = desirable); got {labels.dtype}.")
    _check_shape_and_device("labels", labels, logps)
    check_positive("beta", beta)
    check_finite("desirable_weight", desirable_weight)
    check_finite("undesirable_weight", undesirable_weight)
    if loss.uses_kl and kl is None:
        raise ValueError(
            f"kl must be given with loss_type {loss_type!r}; got None. Pass 0.0 to mean none."
        )
    if not loss.uses_kl and kl is not None:
        raise ValueError(f"kl must be None with loss_type {loss_type!r}, which does not use it.")
    if not loss.uses_delta and (isinstance(delta, Tensor) or delta != 0.0):
        raise ValueError(
            f"delta must be left at 0.0 with loss_type {loss_type!r}, which does not use it; "
            f"got {delta!r}."
        )
    _check_shift("kl", kl, logps)
    _check_shift("delta", delta, logps)
    return loss


def _check_shift(name: str, value: float | Tensor | None, logps: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        check_finite(name, value)
        return
    if value.numel() != 1:
        raise ValueError(f"{name} must be one value; got shape {list(value.shape)}.")
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64; got {value.dtype}.")
    if value.device != logps.device:
        raise ValueError(f"{name} must be on the device {logps.device}; got {value.device}.")
