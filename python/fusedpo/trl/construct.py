"""What has to be different inside `DPOTrainer.__init__`, which does too early what ours must do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import trl.trainer.dpo_trainer as _trl_dpo

from fusedpo._head import add_fused_head
from fusedpo.trl.adapters import adapters_on_head_allowed
from fusedpo.trl.ref_store import RefStoreOptions

_construction = threading.RLock()


@contextlib.contextmanager
def construction(args: Any, store: RefStoreOptions | None) -> Iterator[None]:
    """Change what `DPOTrainer.__init__` looks up, for one construction.

    It puts its head on the model and on the reference there, so ours has to be there instead, not
    after. With a store no reference is loaded, as when TRL precomputes. Only construction looks the
    name up; the lock keeps two trainers that are built in two threads from restoring each other's.
    """
    with _construction:
        head, hash_module = _trl_dpo.add_fused_lm_head, _trl_dpo.hash_module
        precompute = args.precompute_ref_log_probs
        _trl_dpo.add_fused_lm_head = add_fused_head
        if store is not None:
            args.precompute_ref_log_probs = True
            if not store.own:  # what TRL names its own cache by
                _trl_dpo.hash_module = lambda module: None
        try:
            with adapters_on_head_allowed():
                yield
        finally:
            _trl_dpo.add_fused_lm_head, _trl_dpo.hash_module = head, hash_module
            args.precompute_ref_log_probs = precompute
