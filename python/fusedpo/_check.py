"""Argument checks shared by the public functions and by ``fusedpo.reference``.

Every message says what must hold, what it got and, where it is not obvious, what to do. Only
shapes, dtypes, devices and Python numbers are read, never tensor values: the checks synchronise
with no device and trace under ``torch.compile(fullgraph=True)``. (The range of the labels is a
property of values; the operators check it.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

METRICS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INFINITY = float("inf")


def check_token_logps(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    metrics: Sequence[str],
) -> None:
    """Raise TypeError or ValueError unless these are arguments of ``token_logps``."""
    _check_float_tensor("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(
            f"logits must have shape [..., V] with V >= 1; got {list(logits.shape)}. "
            "The last dimension is the vocabulary."
        )
    _check_labels(labels, "logits", logits)
    _check_int("ignore_index", ignore_index)
    _check_positive("temperature", temperature)
    _check_metrics(metrics)


def check_linear(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    metrics: Sequence[str],
    lora: tuple[Tensor, Tensor, float] | None,
    logits_budget_bytes: int | None,
) -> None:
    """Raise TypeError or ValueError unless these are arguments of ``linear_token_logps``."""
    _check_float_tensor("hidden", hidden)
    _check_float_tensor("weight", weight)
    if hidden.dim() < 1:
        raise ValueError("hidden must have shape [..., H]; got a 0-d tensor.")
    size = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != size or weight.shape[0] < 1:
        raise ValueError(
            f"weight must have shape [V, {size}] to match hidden {list(hidden.shape)}; "
            f"got {list(weight.shape)}. Pass lm_head.weight as it is (untransposed)."
        )
    vocabulary = weight.shape[0]
    parameters = [("weight", weight)]
    if bias is not None:
        _check_float_tensor("bias", bias)
        why = f"one entry for each row of weight {list(weight.shape)}"
        _check_shape("bias", bias, (vocabulary,), why)
        parameters.append(("bias", bias))
    if lora is not None:
        lora_a, lora_b = _check_lora(lora, vocabulary, size)
        parameters += [("lora A", lora_a), ("lora B", lora_b)]
    for name, tensor in parameters:
        _check_same_device(name, tensor, "hidden", hidden)
        _check_same_dtype(name, tensor, hidden)
    _check_labels(labels, "hidden", hidden)
    _check_int("ignore_index", ignore_index)
    _check_positive("temperature", temperature)
    if softcap is not None:
        _check_positive("softcap", softcap, " Leave it None for a model without a soft cap.")
    _check_number("logit_scale", logit_scale)
    if not -_INFINITY < logit_scale < _INFINITY:
        raise ValueError(f"logit_scale must be finite; got {logit_scale}.")
    _check_metrics(metrics)
    if logits_budget_bytes is not None:
        _check_int("logits_budget_bytes", logits_budget_bytes)
        if logits_budget_bytes < 0:
            raise ValueError(
                f"logits_budget_bytes must be >= 0; got {logits_budget_bytes}. "
                "0 keeps no logits, None takes the default."
            )


def check_pair_logps(logps: Tensor, completion_mask: Tensor, ld_alpha: float | None) -> None:
    """Raise TypeError or ValueError unless these are arguments of ``pair_logps``."""
    _check_tensor("logps", logps)
    _check_tensor("completion_mask", completion_mask)
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"logps must be float32 or float64; got {logps.dtype}. "
            "token_logps returns float32 for half precision, too."
        )
    if logps.dim() != 2 or logps.shape[0] % 2 != 0:
        raise ValueError(
            "logps must have shape [2B, T], chosen rows first and rejected rows after them; "
            f"got {list(logps.shape)}."
        )
    if completion_mask.shape != logps.shape:
        raise ValueError(
            f"completion_mask must have shape {list(logps.shape)} to match logps; "
            f"got {list(completion_mask.shape)}. Shift it as the labels: completion_mask[:, 1:]?"
        )
    if completion_mask.is_floating_point() or completion_mask.is_complex():
        raise TypeError(
            f"completion_mask must be bool or integer (0 or 1); got {completion_mask.dtype}."
        )
    _check_same_device("completion_mask", completion_mask, "logps", logps)
    if ld_alpha is not None:
        _check_number("ld_alpha", ld_alpha)
        if not 0 <= ld_alpha <= 1:
            raise ValueError(
                f"ld_alpha must be in [0, 1]; got {ld_alpha}. "
                "None or 1 turns length desensitisation off."
            )


def refuse_transforms() -> None:
    """Raise NotImplementedError under forward-mode AD, whose derivatives would silently be zero,
    and under torch.func transforms, which would fail further down."""
    if torch.compiler.is_compiling():
        return
    dual_level: int = forward_ad._current_level
    active: bool = torch._C._are_functorch_transforms_active()
    if dual_level >= 0 or active:
        raise NotImplementedError(
            "fusedpo's operators have reverse-mode gradients only: no forward-mode AD, no "
            "torch.func transforms. Use fusedpo.reference for those."
        )


def linear_compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which ``F.linear`` multiplies: autocast's if it is on, else that of `hidden`."""
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden.dtype


def _check_labels(labels: Tensor, rows_name: str, rows: Tensor) -> None:
    _check_tensor("labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64; got {labels.dtype}. Use labels.long().")
    want = rows.shape[:-1]
    if labels.shape != want:
        shifted = (
            labels.dim() == len(want) > 0
            and labels.shape[:-1] == want[:-1]
            and abs(labels.shape[-1] - want[-1]) == 1
        )
        hint = (
            " Shift labels before the call?"
            if shifted
            else f" One label for each row of {rows_name}."
        )
        raise ValueError(
            f"labels must have shape {list(want)} to match {rows_name} {list(rows.shape)}; "
            f"got {list(labels.shape)}.{hint}"
        )
    _check_same_device("labels", labels, rows_name, rows)


def _check_lora(
    lora: tuple[Tensor, Tensor, float], vocabulary: int, size: int
) -> tuple[Tensor, Tensor]:
    if not isinstance(lora, (tuple, list)) or len(lora) != 3:
        got = f"{len(lora)} entries" if isinstance(lora, (tuple, list)) else type(lora).__name__
        raise TypeError(f"lora must be None or a tuple (A [r, H], B [V, r], scale); got {got}.")
    lora_a, lora_b, scale = lora
    _check_float_tensor("lora A", lora_a)
    _check_float_tensor("lora B", lora_b)
    if lora_a.dim() != 2 or lora_a.shape[0] < 1 or lora_a.shape[1] != size:
        raise ValueError(
            f"lora A must have shape [r, {size}] with r >= 1; got {list(lora_a.shape)}."
        )
    why = f"to match weight and lora A {list(lora_a.shape)}"
    _check_shape("lora B", lora_b, (vocabulary, lora_a.shape[0]), why)
    _check_number("lora scale", scale)
    if not -_INFINITY < scale < _INFINITY:
        raise ValueError(f"lora scale must be finite; got {scale}.")
    return lora_a, lora_b


def _check_metrics(metrics: Sequence[str]) -> None:
    if isinstance(metrics, str) or not isinstance(metrics, (tuple, list)):
        got = type(metrics).__name__
        if isinstance(metrics, str):
            got = f"the string {metrics!r}. Write ({metrics!r},)"
        raise TypeError(f"metrics must be a tuple or list of names; got {got}.")
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics must be among {', '.join(METRICS)}; got {name!r}.")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}.")
    # By name: importing torch.distributed.tensor costs time and not every build of torch has it.
    if type(tensor).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be a plain torch.Tensor; got a DTensor. Gather it before the call with "
            f"{name}.full_tensor() (under FSDP2 with grad_placements=[Partial('avg')], so that its "
            "gradient is averaged over the ranks)."
        )


def _check_float_tensor(name: str, tensor: Tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.dtype not in _FLOAT_DTYPES:
        raise TypeError(
            f"{name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}. "
            "Quantised tensors must be dequantised before the call."
        )


def _check_shape(name: str, tensor: Tensor, want: tuple[int, ...], why: str) -> None:
    if tensor.shape != want:
        raise ValueError(f"{name} must have shape {list(want)}, {why}; got {list(tensor.shape)}.")


def _check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}; "
            f"got {tensor.device}. "
            f"Use {name}.to({other_name}.device)."
        )


def _check_same_dtype(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.dtype == hidden.dtype:
        return
    autocast = torch.is_autocast_enabled(hidden.device.type)
    # Autocast leaves float64 alone, as in F.linear: then both sides have to be float64.
    if autocast and torch.float64 not in (tensor.dtype, hidden.dtype):
        return
    hint = "" if autocast else " Convert one of them, or call under torch.autocast."
    raise TypeError(
        f"{name} must have the dtype of hidden, {hidden.dtype}; got {tensor.dtype}.{hint}"
    )


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a Python number; got {type(value).__name__}.")


def _check_positive(name: str, value: float, hint: str = "") -> None:
    _check_number(name, value)
    # The bounds keep quotients of two such numbers within float32.
    if not 1e-12 <= value <= 1e12:
        raise ValueError(f"{name} must be finite and > 0, in [1e-12, 1e12]; got {value}.{hint}")


def _check_int(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a Python int; got {type(value).__name__}.")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit in 64 bits; got {value}.")
