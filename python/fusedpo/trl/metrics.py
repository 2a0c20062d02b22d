"""All metrics of a step in one device-to-host transfer; names, values and averaging over ranks are
TRL's.

TRL reads about fourteen numbers one by one, and each read waits for the device. Here each rank
stacks its sums into one row, the rows are gathered, and the totals are read together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedpo import PairLogps, PreferenceLoss


def step_metrics(
    accelerator: Any,
    outputs: Any,
    completion_mask: Tensor,
    attention_mask: Tensor,
    policy: PairLogps,
    result: PreferenceLoss,
    aux_loss: Tensor | None,
    tokens: tuple[int, int],
    copies: int,
) -> tuple[dict[str, float], int]:
    """Return TRL's metrics of this step by name, and the number of tokens in the batch of all
    ranks. Two are not TRL's: `tokens/computed` and `tokens/padded`, what the policy's backbone
    computes in this step, on all ranks, and what it would compute for padded batches.

    Args:
        accelerator: the trainer's; it gathers.
        outputs: of the fused head, per token [2B, T], with entropy, mean_logits and is_top1.
        completion_mask: [2B, T], shifted like the labels.
        attention_mask: [2B, positions].
        policy: log-probs of the pairs.
        result: loss and rewards of the pairs.
        aux_loss: the router loss of a mixture of experts (0-d) where it is part of the loss.
        tokens: what the backbone computes for the batch, and the padded batch would have it
            compute.
        copies: how many ranks are given each batch (tensor parallelism); its tokens count once.
    """
    seq_len = completion_mask.shape[1]
    # Prompt-learning adapters put virtual tokens before the sequence: only the last seq_len
    # positions are real.
    entropy, mean_logits, is_top1 = (
        values[:, -seq_len:].detach()
        for values in (outputs.entropy, outputs.mean_logits, outputs.is_top1)
    )
    # Sums run in fp64, so that adding the rows of many ranks loses nothing. MPS has no fp64.
    device = mean_logits.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    pairs = completion_mask.shape[0] // 2

    def total(values: Tensor) -> Tensor:
        return values.sum(dtype=dtype)

    # Token sums: TRL gathers these with gather_for_metrics, which drops the ranks that only hold
    # repeated samples.
    token_sums = {
        "entropy": total(entropy * completion_mask),
        "logits/chosen": total(mean_logits[:pairs] * completion_mask[:pairs]),
        "logits/rejected": total(mean_logits[pairs:] * completion_mask[pairs:]),
        "correct": total(is_top1[:pairs] * completion_mask[:pairs]),
        "chosen_tokens": total(completion_mask[:pairs]),
        "rejected_tokens": total(completion_mask[pairs:]),
        "num_tokens": total(attention_mask),
        "ranks": torch.ones((), dtype=dtype, device=device),
    }
    if aux_loss is not None:
        token_sums["aux_loss"] = aux_loss.detach().to(dtype)
    # Sums over pairs: TRL gathers these with gather, so repeated samples of a last evaluation batch
    # count.
    pair_sums = {
        "rewards/chosen": total(result.chosen_rewards),
        "rewards/rejected": total(result.rejected_rewards),
        "rewards/accuracies": total(result.accuracies),
        "rewards/margins": total(result.margins),
        "logps/chosen": total(policy.chosen.detach()),
        "logps/rejected": total(policy.rejected.detach()),
    }
    counts = {"pairs": pairs, "tokens/computed": tokens[0], "tokens/padded": tokens[1]}
    # Filled on the device: a copy from the host would wait for it.
    filled = [torch.full((), count, dtype=dtype, device=device) for count in counts.values()]
    token_rows = accelerator.gather_for_metrics(torch.stack(list(token_sums.values())).unsqueeze(0))
    pair_rows = accelerator.gather(torch.stack([*pair_sums.values(), *filled]).unsqueeze(0))
    numbers = torch.cat([token_rows.sum(dim=0), pair_rows.sum(dim=0)]).tolist()  # the only transfer
    sums = dict(zip([*token_sums, *pair_sums, *counts], numbers, strict=True))

    chosen_tokens, rejected_tokens = sums["chosen_tokens"], sums["rejected_tokens"]
    metrics = {
        "entropy": _ratio(sums["entropy"], chosen_tokens + rejected_tokens),
        "logits/chosen": _ratio(sums["logits/chosen"], chosen_tokens),
        "logits/rejected": _ratio(sums["logits/rejected"], rejected_tokens),
        "mean_token_accuracy": _ratio(sums["correct"], chosen_tokens),
    }
    if aux_loss is not None:
        metrics["aux_loss"] = sums["aux_loss"] / sums["ranks"]
    for name in pair_sums:
        metrics[name] = sums[name] / sums["pairs"]
    for name in ("tokens/computed", "tokens/padded"):
        metrics[name] = sums[name] / copies
    return metrics, int(sums["num_tokens"]) // copies


def _ratio(value: float, count: float) -> float:
    return value / count if count > 0 else 0.0
