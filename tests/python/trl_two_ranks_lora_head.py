"""What test_trl_lora_head runs on each of two gloo ranks: FSDP2 around LoRA on the head."""

from __future__ import annotations

import peft
import torch
import torch.distributed as dist
from fusedpo._head import add_fused_head
from ranks import leave
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trl_helpers import make_model

UNITS = {
    "root only": lambda base: [],
    "the head": lambda base: [base.lm_head],
    # What peft's fsdp_auto_wrap_policy makes a unit: each trained linear layer.
    "its matrices": lambda base: [base.lm_head.lora_A["default"], base.lm_head.lora_B["default"]],
}


def build() -> peft.PeftModel:
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, target_modules=["lm_head"]))
    torch.manual_seed(5)
    torch.nn.init.normal_(model.get_base_model().lm_head.lora_B["default"].weight)
    add_fused_head(model.get_base_model())
    return model


def gradients(model: peft.PeftModel, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 90, (2, 9), generator=generator)
    model.zero_grad()
    model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs.sum().backward()
    found = [p.grad for p in model.parameters() if p.requires_grad]
    return [g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in found]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plain = build()
    want = [(a + b) / 2 for a, b in zip(gradients(plain, 0), gradients(plain, 1), strict=True)]
    assert len(want) == 2
    for name, units in UNITS.items():
        model = build()
        base = model.get_base_model()
        for unit in units(base):
            fully_shard(unit)
        fully_shard(base)
        for _ in range(2):  # the second pass finds what the first has left behind
            for got, mean in zip(gradients(model, dist.get_rank()), want, strict=True):
                torch.testing.assert_close(
                    got, mean, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
                )
        assert base.lm_head.base_layer.weight.grad is None
    leave()


if __name__ == "__main__":
    main()
