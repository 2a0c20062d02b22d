"""TRL's experimental CPO and ORPO trainers on fused log-probs and losses.

TRL's CPOTrainer and ORPOTrainer make logits for every position, prompt and padding included. One
method is replaced here; data, evaluation and logging stay TRL's.
"""

from __future__ import annotations

from typing import Any

from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

import fusedpo


class FusedLoss:
    """Goes in front of CPOTrainer or ORPOTrainer; runs on fusedpo within `patch_trl()`."""

    # The trainer's, which comes after this class.
    processing_class: Any
    accelerator: Any
    args: Any
    loss_type: str
    alpha: float
    beta: float
    aux_loss_enabled: bool
    aux_loss_coef: float
    concatenated_inputs: Any

    def __init__(self, model: Any, **keywords: Any) -> None:
        add_fused_lm_head(model)  # before PEFT wraps it
        super().__init__(model, **keywords)  # type: ignore[call-arg]

    def loss_name(self) -> str:
        """Return the loss by its name in `fusedpo.loss_types()`."""
        return cpo_loss(self.loss_type, self.alpha)

    def get_batch_loss_metrics(
        self, model: Any, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Any, dict[str, float]]:
        """Return the loss of a batch, a scalar, and its metrics by TRL's names."""
        pad = self.processing_class.pad_token_id
        rows = self.concatenated_inputs(batch, padding_value=pad, device=self.accelerator.device)
        ids, attention = rows["concatenated_input_ids"], rows["concatenated_attention_mask"]
        completion = rows["concatenated_labels"] != -100
        name, pairs = self.loss_name(), len(ids) // 2
        scored = completion.clone()  # nothing else reaches the head
        if name == "orpo":  # its likelihood term covers the prompt, too
            scored[:pairs] = attention[:pairs] == 1
        labels = ids.masked_fill(~scored, -100)
        inputs = {"input_ids": ids, "attention_mask": attention, "labels": labels}
        outputs = model(**inputs, fused_lm_head=True)

        pair = fusedpo.pair_logps(outputs.log_probs, completion[:, 1:])
        nll = -outputs.log_probs[:pairs].sum() / scored[:pairs, 1:].sum()
        options = fusedpo.loss_types()[name].options  # of this loss; the config has them by name
        result = fusedpo.preference_loss(
            pair.chosen,
            pair.rejected,
            loss_type=name,
            beta=self.beta,
            chosen_lengths=pair.chosen_lengths,
            rejected_lengths=pair.rejected_lengths,
            chosen_nll=nll,
            **{option: getattr(self.args, option) for option in options},
        )
        loss = result.loss
        if self.aux_loss_enabled:  # a mixture of experts
            loss = loss + self.aux_loss_coef * outputs.aux_loss

        values = {
            "rewards/chosen": result.chosen_rewards,
            "rewards/rejected": result.rejected_rewards,
            "rewards/accuracies": result.accuracies,
            "rewards/margins": result.margins,
            "nll_loss": nll.detach(),
        }
        prefix = "eval_" if train_eval == "eval" else ""
        gather = self.accelerator.gather_for_metrics
        return loss, {prefix + k: gather(v).mean().item() for k, v in values.items()}


class FusedCPOTrainer(FusedLoss, CPOTrainer):  # type: ignore[misc]
    """CPO, and by `loss_type="simpo"` SimPO, with `alpha` AlphaPO."""


class FusedORPOTrainer(FusedLoss, ORPOTrainer):  # type: ignore[misc]
    """ORPO."""

    def loss_name(self) -> str:
        return "orpo"


def cpo_loss(loss_type: str, alpha: float) -> str:
    """Return what `fusedpo.loss_types()` calls a loss of CPOConfig."""
    names = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo", "simpo": "simpo"}
    return "alphapo" if alpha != 0 else names[loss_type]
