"""Score the reference once, to disk, then train with it: no reference model in memory.

python precompute_then_train.py [MODEL [PREFERENCES.jsonl]]      rows with prompt, chosen, rejected

Run it again with another learning rate, or after an interruption: nothing is scored twice.
"""

import sys

import fusedpo
import torch
from datasets import load_dataset
from fusedpo.trl import FusedDPOTrainer
from trl import DPOConfig

model = sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-0.5B-Instruct"
if len(sys.argv) > 2:
    dataset = load_dataset("json", data_files=sys.argv[2], split="train")
else:
    dataset = load_dataset("trl-lib/ultrafeedback_binarized", split="train")

# As the training will compute: bf16, TRL's default, is slow on many CPUs.
accelerator = torch.accelerator.is_available()
report = fusedpo.precompute(model, dataset, "refs", autocast="bf16" if accelerator else "no")
print(f"{report.found} of {report.records} records were there, {report.scored} were scored")

config = DPOConfig(
    output_dir="dpo_output",
    logging_steps=1,
    report_to="none",
    use_cpu=not accelerator,
    bf16=accelerator,
)
# ref_miss="error": a training that would score anything itself stops before the first step.
trainer = FusedDPOTrainer(
    model, args=config, train_dataset=dataset, ref_store="refs", ref_miss="error"
)
trainer.train()
trainer.save_model()
