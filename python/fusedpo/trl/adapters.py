"""Adapters on the language-model head: TRL refuses them, the fused head of fusedpo applies them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trl.trainer.dpo_trainer as _trl_dpo

from fusedpo._head_adapter import READS_ADAPTERS


class _NoLayer:
    """Takes the place of PEFT's BaseTunerLayer where TRL looks for an adapter: it finds none."""


@contextlib.contextmanager
def adapters_on_head_allowed() -> Iterator[None]:
    """Keep `DPOTrainer.__init__` from refusing any adapter on the head, for one construction.

    Its only use of the name is this refusal. FusedDPOTrainer refuses those that it cannot apply,
    either. With a PEFT that is too old, TRL's refusal stays.
    """
    if not READS_ADAPTERS:
        yield
        return
    base_tuner_layer = _trl_dpo.BaseTunerLayer
    _trl_dpo.BaseTunerLayer = _NoLayer
    try:
        yield
    finally:
        _trl_dpo.BaseTunerLayer = base_tuner_layer
