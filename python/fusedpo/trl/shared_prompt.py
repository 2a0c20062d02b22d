"""Whether a trainer computes each prompt once, and the packed rows of its batches when it does.

The model is given the packed row of a batch (packed_batch.py) instead of TRL's padded one, and what
it returns for each scored token goes back to its place in [2B, T - 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fusedpo._packing.architectures import active_dropout, why_not_exact
from fusedpo._packing.attention import use_packed_attention
from fusedpo.trl.packed_batch import (
    KEY,
    KNOWN,
    NotShareableError,
    PackedBatch,
    PackingCollator,
    pack_batch,
    packed_row,
)


class SharedPrompts:
    """Whether and how a trainer computes each prompt once; see `FusedDPOTrainer`."""

    def __init__(self, trainer: Any, mode: Any) -> None:
        """Decide for a trainer that was just built, and prepare its models.

        Raises:
            ValueError: `mode` is True, and a model is not known to be exact.
        """
        self._mode = mode
        reason = None if mode is False else why_not_shared(trainer)
        self.active = mode is not False and reason is None
        if reason is not None:
            self._give_up(reason, trainer.accelerator.print)
        if not self.active:
            return
        for model in _models(trainer):
            use_packed_attention(model)

    def _give_up(self, reason: str, say: Callable[[str], None]) -> None:
        if self._mode is True:
            raise ValueError(
                "share_prompts=True must have a model and batches for which it is exact; "
                f"{reason}. Pass share_prompts='auto' or False to train on padded batches."
            )
        self.active = False
        say(f"fusedpo: prompts are not shared, batches are padded as TRL pads them: {reason}")

    def collator(self, collator: Any, dataset: Any, accelerator: Any) -> Any:
        """Return the collator of a loader that is about to be made for `dataset`."""
        if not self.active or _dispatches(accelerator, dataset):
            return collator
        return PackingCollator(collator)

    def batch(self, inputs: dict[str, Any]) -> PackedBatch | None:
        """Return the packed form of a batch, or None where it is to be run padded. It is kept in
        the batch: the reference and the metrics need it again.

        Raises:
            ValueError: `share_prompts` is True, and the batch cannot be packed.
        """
        if not self.active:
            return None
        packed = packed_row(inputs)
        if packed is None or not KNOWN.issuperset(inputs):
            try:
                # Not from our collator, or changed since: this waits for the device.
                packed = pack_batch(inputs)
            except NotShareableError as error:
                self._give_up(str(error), print)  # perhaps on this rank alone
                return None
        batch: PackedBatch = packed.to(inputs["input_ids"].device, non_blocking=True)
        inputs[KEY] = batch
        return batch


def why_not_shared(trainer: Any) -> str | None:
    """Return why a trainer's models cannot share prompts, or None."""
    models = _models(trainer)
    for name, model in zip(("model", "ref_model"), models, strict=False):
        reason = why_not_exact(model)
        if reason is not None:
            return f"{name}: {reason}"
    dropout = active_dropout(models[0])
    if dropout is not None:
        return f"model: dropout is active ({dropout})"
    if trainer.args.neftune_noise_alpha:
        return "neftune_noise_alpha adds noise that depends on the length of a padded row"
    return None


def _models(trainer: Any) -> list[Any]:
    models = [trainer.model] + ([] if trainer.ref_model is None else [trainer.ref_model])
    return [trainer.accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]


def _dispatches(accelerator: Any, dataset: Any) -> bool:
    """Whether accelerate joins and cuts the batches of one process for all: then only tensors of
    one row per sequence may be in them, and each process lays out its own."""
    configured = accelerator.dataloader_config.dispatch_batches
    if configured is not None:  # as TRL does for a stream to train on
        return bool(configured)
    return isinstance(dataset, torch.utils.data.IterableDataset)
