"""CPO, SimPO, AlphaPO and ORPO: TRL's experimental trainers on fused log-probs and losses.

python cpo_orpo.py [cpo | simpo | orpo [MODEL [PREFERENCES.jsonl]]]
(rows with prompt, chosen, rejected)

TRL's CPOTrainer and ORPOTrainer make logits for every position, prompt and padding included.
`fusedpo.trl.cpo_orpo` replaces the method that does; data, evaluation and logging stay TRL's.
"""

import sys

import torch
from datasets import load_dataset
from fusedpo.trl import patch_trl
from fusedpo.trl.cpo_orpo import FusedCPOTrainer, FusedORPOTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig


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
        bf16=torch.accelerator.is_available(),  # slow on many CPUs
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
