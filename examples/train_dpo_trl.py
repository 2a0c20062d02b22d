"""DPO with TRL on fusedpo: a TRL script with one name changed.

python train_dpo_trl.py [MODEL [PREFERENCES.jsonl]]      rows with prompt, chosen, rejected
"""

import sys

import torch
from datasets import load_dataset
from fusedpo.trl import FusedDPOTrainer  # instead of: from trl import DPOTrainer
from trl import DPOConfig

model = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-0.5B-Instruct"
if len(sys.argv) > 2:
    dataset = load_dataset("json", data_files=sys.argv[2], split="train")
else:
    dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

config = DPOConfig(
    output_dir="dpo_output",
    logging_steps=1,
    report_to="none",
    use_cpu=not torch.accelerator.is_available(),
    bf16=torch.accelerator.is_available(),  # slow on many CPUs
)
trainer = FusedDPOTrainer(model, args=config, train_dataset=dataset)
trainer.train()
trainer.save_model()
