"""fusedpo inside TRL: a DPO trainer, and a patch for the fused head of every TRL trainer.

TRL is imported when one of these names is used, not before: ``fusedpo.trl.versions`` works without
it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusedpo.trl.patch import patch_trl, status, unpatch_trl
from fusedpo.trl.versions import TRAINER, UnsupportedTRLError

if TYPE_CHECKING:
    from fusedpo.trl.trainer import FusedDPOTrainer

__all__ = ["FusedDPOTrainer", "UnsupportedTRLError", "patch_trl", "status", "unpatch_trl"]


def __getattr__(name: str) -> Any:
    if name == "FusedDPOTrainer":
        version = TRAINER.require()
        from fusedpo.trl.bindings import check_bindings

        check_bindings(version)  # before the trainer's module imports what it may lack
        from fusedpo.trl.trainer import FusedDPOTrainer

        return FusedDPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
