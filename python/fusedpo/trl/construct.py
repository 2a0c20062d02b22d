"""What has to be different inside `DPOTrainer.__init__`, which does too early what ours must do.

On every supported TRL it loads the policy (where it got a path), wraps it with PEFT, tokenises,
runs `Trainer.__init__`, loads the reference, lets accelerate wrap the reference, and precomputes.
Autocast, DeepSpeed and FSDP wrap `model.forward` as it stands then, so the head has to be there
before: on models that are passed, before construction begins; on models that are loaded, as they
come. TRL 1.15 and newer would put a head of their own on top: that is kept off.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import trl.trainer.dpo_trainer as _trl_dpo

from fusedpo._head import add_fused_head
from fusedpo._precompute.reference import base_model
from fusedpo.trl.bindings import replaced_names
from fusedpo.trl.ref_store import RefStoreOptions

_construction = threading.RLock()
_POLICY_METRICS = ("entropy", "mean_logits", "is_top1")


class _NoLayer:
    """No module is one."""


@contextlib.contextmanager
def construction(
    model: Any, ref_model: Any, args: Any, store: RefStoreOptions | None
) -> Iterator[None]:
    """Change what `DPOTrainer.__init__` looks up, for one construction.

    With a store no reference is loaded, as when TRL precomputes. Only construction looks the names
    up; the lock keeps two trainers that are built in two threads from restoring each other's.
    """
    metrics = (*_POLICY_METRICS, "log_sum_sq_probs") if args.use_weighting else _POLICY_METRICS
    to_load = []  # the models that are loaded, in this order, with the metrics of their heads
    for name, each, outputs in (("policy", model, metrics), ("reference", ref_model, ())):
        if each is None or isinstance(each, str):
            to_load.append((name, outputs))
        else:
            add_fused_head(base_model(each), outputs=outputs)

    def create_model_from_path(*arguments: Any, **keywords: Any) -> Any:
        name, outputs = to_load.pop(0)
        if store is not None and store.images and name == "reference":
            return None
        loaded = originals["create_model_from_path"](*arguments, **keywords)
        add_fused_head(loaded, outputs=outputs)
        return loaded

    replacements: dict[str, Any] = {
        "create_model_from_path": create_model_from_path,
        "add_fused_lm_head": lambda model, outputs=(): None,
        # Where TRL looks for an adapter on the head, to refuse it, it finds none; ours applies it.
        "BaseTunerLayer": _NoLayer,
    }
    if store is not None and not store.own:  # what TRL names its own cache by
        replacements["hash_module"] = lambda module: None
    with _construction:
        originals = {
            name: vars(_trl_dpo)[name] for name in replaced_names() if name in replacements
        }
        precompute = args.precompute_ref_log_probs
        # TRL refuses to precompute with pictures, which is not what is done here.
        if store is not None and not store.images:
            args.precompute_ref_log_probs = True
        vars(_trl_dpo).update({name: replacements[name] for name in originals})
        try:
            yield
        finally:
            vars(_trl_dpo).update(originals)
            args.precompute_ref_log_probs = precompute
