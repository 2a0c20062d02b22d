"""CPO, SimPO, AlphaPO and ORPO: TRL's experimental trainers on fused log-probs and losses.

python cpo_orpo.py [cpo | simpo | orpo [MODEL [PREFERENCES.jsonl]]]
(rows with prompt, chosen, rejected)

TRL's CPOTrainer and ORPOTrainer make logits for every position, prompt and padding included. One
method is replaced here; data, evaluation and logging stay TRL's.
"""

import sys

import fusedpo
import torch
from datasets import load_dataset
from fusedpo.trl import patch_trl
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.utils import add_fused_lm_head


class FusedLoss:
    """Goes in front of CPOTrainer or ORPOTrainer; runs on fusedpo within `patch_trl()`."""

    def __init__(self, model, **keywords):
        add_fused_lm_head(model)  # before PEFT wraps it
        super().__init__(model, **keywords)

    def loss_name(self):
        names = {"sigmoid": "cpo", "hinge": "cpo_hinge", "ipo": "cpo_ipo", "simpo": "simpo"}
        if self.alpha != 0:
            names = {"simpo": "alphapo"}
        return names[self.loss_type]

    def get_batch_loss_metrics(self, model, batch, train_eval="train"):
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


class FusedCPOTrainer(FusedLoss, CPOTrainer):
    """CPO, and by `loss_type="simpo"` SimPO, with `alpha` AlphaPO."""


class FusedORPOTrainer(FusedLoss, ORPOTrainer):
    def loss_name(self):
        return "orpo"


def main(method="simpo", model="Qwen/Qwen2.5-0.5B-Instruct", data=None):
    config_class = ORPOConfig if method == "orpo" else CPOConfig
    trainer_class = FusedORPOTrainer if method == "orpo" else FusedCPOTrainer
    options = {"simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0}}.get(method, {})
    if data is None:
        dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
    else:
        dataset = load_dataset("json", data_files=data, split="train")
    config = config_class(
        output_dir=f"{method}_output",
        logging_steps=1,
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
        **options,
    )
    with patch_trl():
        trainer = trainer_class(
            AutoModelForCausalLM.from_pretrained(model),
            args=config,
            train_dataset=dataset,
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(*sys.argv[1:])
