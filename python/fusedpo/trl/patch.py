"""`patch_trl()`: run the fused head that every TRL >= 1.15 trainer uses (DPO, KTO, SFT, GRPO, RLOO)
on fusedpo.

TRL's head calls one function, `trl.trainer.utils._ChunkedLogProbFunction.apply`, and looks its name
up at each call. The patch puts another object under that name, so trainers that exist already
follow it, too. On a CPU, TRL also scores every prompt and padding position; where `_use_triton`
decides that, the patch makes it keep labelled ones only.
"""

from __future__ import annotations

import inspect
import threading
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedpo.reference import METRICS
from fusedpo.trl.versions import PATCH, UnsupportedTRLError, installed, untested

__all__ = ["PatchStatus", "patch_trl", "status", "unpatch_trl"]

# What TRL's function takes after `ctx`, in order. A parameter that is not here may change the
# result: refused.
_PARAMETERS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
_DEFAULTS: dict[str, Any] = {
    "final_logit_softcapping": None,
    "logit_scale": 1.0,
    "outputs": METRICS,
}


class PatchStatus(NamedTuple):
    """`paths`: what TRL's head runs per device type; `problem`: why this TRL is refused, or is
    untested."""

    patched: bool
    trl_version: str | None
    supported: bool
    problem: str | None
    paths: dict[str, str]


class _Originals(NamedTuple):
    function: Any  # None in TRL 1.15 without Triton: its head cannot run at all there
    use_triton: Any  # None in TRL 1.15, which always keeps labelled positions only


class _FusedLogProbs:
    """Stands in for TRL's autograd function: same arguments, same five results, differentiable."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(self, *args: Any, **keywords: Any) -> tuple[Tensor | None, ...]:
        given = {**_DEFAULTS, **dict(zip(_PARAMETERS, args, strict=False)), **keywords}
        hidden = given["hidden"]
        if self.original is not None and not _runs_ours(hidden.device.type):
            # Positional: an autograd.Function takes no keywords.
            result: tuple[Tensor | None, ...] = self.original.apply(
                *(given[name] for name in _PARAMETERS)
            )
            return result
        from fusedpo._head import score_rows
        from fusedpo._head_adapter import Head

        scored = score_rows(
            hidden,
            Head(given["weight"], given["bias"]),
            given["targets"],
            temperature=given["temperature"],
            softcap=given["final_logit_softcapping"],
            logit_scale=given["logit_scale"],
            metrics=tuple(name for name in METRICS if name in given["outputs"]),
        )
        # TRL's results are float32 for float64 inputs, too.
        return tuple(x.float() if x is not None and x.dtype == torch.float64 else x for x in scored)


class _Patch:
    """Handle of one `patch_trl()` call; as a context manager it undoes just that call."""

    def __init__(self) -> None:
        self._entered = False

    def __enter__(self) -> _Patch:
        if self._entered:
            raise RuntimeError("a patch_trl() handle can be entered once. Call patch_trl() again.")
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with _lock:
            if self in _active:
                _active.remove(self)
                if not _active:
                    _restore()


_lock = threading.RLock()
_active: list[_Patch] = []  # TRL stays patched while one is left
_originals: _Originals | None = None


def patch_trl() -> _Patch:
    """Run TRL's fused head on fusedpo from now on, or within a `with patch_trl():` block.

    Calls may be repeated and nested: TRL is restored when the last block has ended, or by
    `unpatch_trl()`; a call without `with` lasts until `unpatch_trl()`. The patch holds for the
    whole process and for all threads.

    Raises:
        ImportError: TRL is not installed. UnsupportedTRLError: it is older than 1.15, or its
            function takes unknown arguments.

    Example:

        with patch_trl():
            KTOTrainer(model, args=config, train_dataset=dataset).train()
    """
    global _originals
    version = PATCH.require()
    utils = _trl_utils()
    handle = _Patch()
    with _lock:
        if not _active:
            function = utils._ChunkedLogProbFunction
            if function is not None:
                _check_signature(function, version)
            _originals = _Originals(function, utils.__dict__.get("_use_triton"))
            utils._ChunkedLogProbFunction = _FusedLogProbs(function)
            if _originals.use_triton is not None:
                utils._use_triton = _keeps_labelled_only(_originals.use_triton)
        _active.append(handle)
    return handle


def unpatch_trl() -> None:
    """Undo every `patch_trl()`; without one, do nothing."""
    with _lock:
        if _active:
            _active.clear()
            _restore()


def status() -> PatchStatus:
    """Tell whether TRL is patched and supported, and what its head runs on each device type."""
    version = installed()
    if version is None:
        problem: str | None = "TRL is not installed."
    else:
        problem = PATCH.problem(version) or untested(version)
    patched = bool(_active)
    paths = {device: _path(device, patched) for device in ("cpu", "cuda")}
    return PatchStatus(patched, version, version is not None and problem is None, problem, paths)


def _path(device_type: str, patched: bool) -> str:
    if not patched or not (
        _runs_ours(device_type) or _originals is None or _originals.function is None
    ):
        return "TRL's own head"
    return "fusedpo operators" if _native(device_type) else "fusedpo.reference"


def _runs_ours(device_type: str) -> bool:
    # Without operators for the device, TRL's tiled function needs less memory there than the
    # reference. Not on a CPU: TRL folds its tiles in about ten passes of plain torch there.
    return device_type == "cpu" or _native(device_type)


def _native(device_type: str) -> bool:
    from fusedpo import _load

    return _load.native(device_type)


def _keeps_labelled_only(use_triton: Any) -> Any:
    def keeps_labelled_only(device: torch.device) -> bool:
        return _runs_ours(device.type) or bool(use_triton(device))

    return keeps_labelled_only


def _check_signature(function: Any, version: str) -> None:
    found = tuple(inspect.signature(function.forward).parameters)[1:]  # without ctx
    if found == _PARAMETERS:
        return
    unknown = [name for name in found if name not in _PARAMETERS]
    missing = [name for name in _PARAMETERS if name not in found]
    difference = (
        f"unknown {unknown}, missing {missing}"
        if unknown or missing
        else f"another order: {list(found)}"
    )
    raise UnsupportedTRLError(
        f"trl.trainer.utils._ChunkedLogProbFunction must take {list(_PARAMETERS)}; "
        f"TRL {version} has {difference}. "
        "Use a TRL release as published, or a fusedpo that knows this one."
    )


def _restore() -> None:
    global _originals
    if _originals is None:
        return
    utils = _trl_utils()
    utils._ChunkedLogProbFunction = _originals.function
    if _originals.use_triton is not None:
        utils._use_triton = _originals.use_triton
    _originals = None


def _trl_utils() -> Any:
    import trl.trainer.utils as utils

    return utils
