"""The function under TRL's fused head in plain torch, for TRL 1.15 without Triton.

There TRL has none, so that its own trainers cannot run on a CPU at all. The tests, which compare
with them, put this one under the head.
"""

from __future__ import annotations

from typing import Any

import torch
import trl.trainer.utils as trl_utils
from fusedpo.reference import METRICS
from fusedpo.trl.versions import at_least


class PlainLogProbs:
    """Takes the arguments of TRL's autograd function and gives its five results, by autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Any,
        weight: Any,
        bias: Any,
        targets: Any,
        temperature: Any,
        chunk_size: Any,
        final_logit_softcapping: Any = None,
        logit_scale: Any = 1.0,
        outputs: Any = METRICS,
    ) -> tuple[Any, ...]:
        # fp64 from here to the results, which are float32 as TRL's are.
        logits = torch.nn.functional.linear(hidden, weight, bias).double() * logit_scale
        if final_logit_softcapping is not None:
            logits = final_logit_softcapping * torch.tanh(logits / final_logit_softcapping)
        logits = logits / temperature
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        results = {
            "entropy": -(probs * log_probs).sum(-1),
            "log_sum_sq_probs": (2 * log_probs).logsumexp(-1).detach(),
            "mean_logits": logits.mean(-1).detach(),
            "is_top1": logits.argmax(-1) == targets,
        }
        chosen = log_probs.gather(-1, targets[:, None]).squeeze(-1)
        metrics = (results[name] if name in outputs else None for name in results)
        return tuple(
            x.float() if x is not None and x.is_floating_point() else x for x in (chosen, *metrics)
        )

    @classmethod
    def apply(cls, *arguments: Any) -> tuple[Any, ...]:
        return cls.forward(None, *arguments)


def install() -> None:
    if at_least(1, 15) and trl_utils._ChunkedLogProbFunction is None:
        trl_utils._ChunkedLogProbFunction = PlainLogProbs
