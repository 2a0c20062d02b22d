"""How much memory a training will take at its peak: an estimate from the model's shape.

Counted exactly are the weights, their gradients and the optimizer's state, from the parameters of
the model that its config describes (built without storage) and of the adapter that is put on it.
Activations are counted from the shapes of a decoder layer: what autograd keeps of attention and a
gated MLP, for the longest batch that `max_length` allows, times the layers, or with gradient
checkpointing one layer and the inputs of all. The head keeps the logits of a few rows, by fusedpo's
budget. Not counted: the framework itself, the allocator's slack, and kernels' workspaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fusedpo.tools.train.models import base_of, source_options
from fusedpo.tools.train.resolving import Resolved

# What autograd keeps of one decoder layer, in numbers per token. Of the hidden size H: the inputs
# of two norms, both normalised, the query, what attention returns, and the outputs of attention and
# MLP; keys and values; of the MLP's width I: gate, its activation, up, and their product.
_PER_HIDDEN, _PER_MLP = 8, 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a training, by what they are for; on each device.

    Attributes:
        weights: of the model, with the adapter.
        reference: of a reference model in memory; 0 with a store, with an adapter, and for losses
            without one.
        gradients, optimizer: of what is trained.
        activations: what autograd keeps of the layers for the longest batch.
        head: logits, by fusedpo's budget for what is kept of them.
        parameters, trained: numbers of weights, not bytes.
        tokens: of the longest batch, which `activations` and `head` are for.
    """

    weights: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    parameters: int
    trained: int
    tokens: int

    @property
    def total(self) -> int:
        """The sum, in bytes."""
        held = self.weights + self.reference + self.gradients + self.optimizer
        return held + self.activations + self.head

    def as_dict(self) -> dict[str, int]:
        """Return every part, and the total."""
        return {**asdict(self), "total": self.total}


def estimate_memory(run: Resolved, model: str | None = None) -> MemoryEstimate:
    """Estimate the peak memory of a training; nothing is allocated.

    Args:
        run: from `resolve`.
        model: whose config is read; by default the run's model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = model or run.model
    name = base_of(name) or name  # an adapter is merged before it is trained on
    config = AutoConfig.from_pretrained(name, **source_options(run))
    trust = run.model_options.get("trust_remote_code", False)
    with torch.device("meta"):
        shape = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    base = sum(p.numel() for p in shape.parameters())
    linear = sum(p.numel() for n, p in shape.named_parameters() if _is_quantised(n, p))
    text = config.get_text_config()
    adapted = 0
    if run.peft is not None:
        import peft

        with torch.device("meta"):
            shape = peft.get_peft_model(shape, run.peft)
        adapted = sum(p.numel() for p in shape.parameters() if p.requires_grad)
    trained = adapted if run.peft is not None else base
    weight = _weight_bytes(run)
    weights = base * weight
    if run.quantization is not None:
        # Of 4-bit weights also the scale of each block of 64, in fp32.
        bits = 4.5 if run.quantization.load_in_4bit else 8
        weights = int((base - linear) * weight + linear * bits / 8)
    tokens, rows = _tokens(run, text)
    online = run.strategy.trainer in ("dpo", "kto") and not run.uses_store and run.peft is None
    gradient = weight if run.peft is None else 4
    return MemoryEstimate(
        weights=int(weights) + adapted * 4,
        reference=int(weights) if online else 0,
        gradients=trained * gradient,
        optimizer=trained * _optimizer_bytes(run.args.optim) * gradient // 4,
        activations=_activations(run, text, tokens),
        head=_head_bytes(rows, text.vocab_size),
        parameters=base + adapted,
        trained=trained,
        tokens=tokens,
    )


def _is_quantised(name: str, parameter: Any) -> bool:
    """bitsandbytes leaves embeddings, the head and norms as they are."""
    return parameter.dim() == 2 and not any(part in name for part in ("embed", "lm_head", "wte"))


def _weight_bytes(run: Resolved) -> int:
    dtype = str(run.model_options.get("dtype"))
    return 2 if dtype in ("bfloat16", "float16", "torch.bfloat16", "torch.float16") else 4


def _tokens(run: Resolved, text: Any) -> tuple[int, int]:
    """The tokens of the longest batch, and how many of its rows may reach the head."""
    length = run.args.max_length or getattr(text, "max_position_embeddings", 1024)
    length = min(length, getattr(text, "max_position_embeddings", length))
    sequences = run.args.per_device_train_batch_size
    if run.strategy.trainer in ("dpo", "cpo", "orpo"):
        sequences *= 2  # chosen and rejected
    return sequences * length, sequences * length


def _activations(run: Resolved, text: Any, tokens: int) -> int:
    size = 2 if run.args.bf16 or run.args.fp16 else _weight_bytes(run)
    hidden, layers = text.hidden_size, text.num_hidden_layers
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    width = getattr(text, "intermediate_size", None) or 4 * hidden
    keys = 2 * hidden * key_heads // heads
    layer = tokens * (_PER_HIDDEN * hidden + keys + _PER_MLP * width) * size
    checkpoints = layers * tokens * hidden * size
    return int(layer + checkpoints if run.args.gradient_checkpointing else layers * layer)


def _head_bytes(rows: int, vocabulary: int) -> int:
    # The budgets of fusedpo.linear_token_logps by default: past them logits are recomputed.
    budget = 5 * 2**29 if torch.cuda.is_available() else 2**28
    return min(rows * vocabulary * 4, budget)


def _optimizer_bytes(optimizer: Any) -> int:
    """Bytes of state for each weight in fp32."""
    name = str(getattr(optimizer, "value", optimizer))
    if "8bit" in name:
        return 2
    return {"sgd": 0, "adafactor": 0, "adagrad": 4, "rmsprop": 4}.get(name, 8)  # 8: Adam's two


def table(estimate: MemoryEstimate) -> Mapping[str, str]:
    """Return what a person reads: each part in MiB."""
    parts = estimate.as_dict()
    names = ("weights", "reference", "gradients", "optimizer", "activations", "head", "total")
    return {name: f"{parts[name] / 2**20:,.1f} MiB" for name in names}
