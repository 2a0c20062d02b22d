"""What a head multiplies with, where PEFT has put an adapter around it.

LoRA on the head stays low-rank: `z = x W^T + b + sum_i s_i (dropout(x) A_i^T) B_i^T`, so there is
neither a merged copy of W nor a [V, H] gradient. What changes the logits in another way is refused
by name.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers.utils import is_peft_available

# Older releases keep variants of LoRA in other places.
OLDEST_PEFT = "0.16.0"
READS_ADAPTERS = is_peft_available() and Version(metadata.version("peft")) >= Version(OLDEST_PEFT)
if READS_ADAPTERS:
    from peft.tuners.lora import Linear as LoraLinear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper


class Lora(NamedTuple):
    """One adapter's share of the logits: `scale * (dropout(x) @ a.T @ b.T + bias)`."""

    a: Tensor  # [r, H]
    b: Tensor  # [V, r]
    bias: Tensor | None  # [V]
    scale: float
    dropout: Callable[[Tensor], Tensor]


class Head(NamedTuple):
    """The parameters that make logits out of hidden states."""

    weight: Tensor  # [V, H]
    bias: Tensor | None = None  # [V]
    loras: tuple[Lora, ...] = ()

    def tensors(self) -> list[Tensor]:
        """Every parameter, in a fixed order."""
        found = [self.weight, self.bias]
        for lora in self.loras:
            found += [lora.a, lora.b, lora.bias]
        return [tensor for tensor in found if tensor is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Head:
        """Apply `function` to every parameter."""

        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else function(tensor)

        loras = (
            each._replace(a=function(each.a), b=function(each.b), bias=optional(each.bias))
            for each in self.loras
        )
        return Head(function(self.weight), optional(self.bias), tuple(loras))

    def low_rank(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return what the adapters add: (u [..., r], B [V, r]) with z += u B^T, r over all of them.

        Args:
            hidden: [..., H].
            labels: [...]; what stands at -100 must not reach the gradient of A, so it counts as 0.
        """
        if not self.loras:
            return None, None
        scored = hidden.masked_fill((labels == -100).unsqueeze(-1), 0)
        inner = [
            # As PEFT does: adapters are in float32 over a head in half precision.
            F.linear(each.dropout(scored.to(each.a.dtype)), each.a) * each.scale
            for each in self.loras
        ]
        if len(inner) == 1:
            return inner[0], self.loras[0].b
        return torch.cat(inner, dim=-1), torch.cat([each.b for each in self.loras], dim=1)

    def total_bias(self) -> Tensor | None:
        """The bias of the head and those of its adapters."""
        total = self.bias
        for each in self.loras:
            if each.bias is not None:
                added = each.bias * each.scale
                total = added if total is None else total + added
        return total


def read_head(module: Any) -> Head:
    """Return the parameters of a model's output embeddings, as their own forward uses them now.

    Of a module that is trained as a whole (PEFT's modules_to_save), those are the copy in force.

    Raises:
        ValueError: an adapter that changes the logits in another way than LoRA, or a quantised
            head.
    """
    weight = module.weight
    if not weight.is_floating_point():
        raise ValueError(
            "the weight of the language-model head (lm_head) must be floating point; got "
            f"{weight.dtype} in {_type(module).__name__}. Leave lm_head out of quantisation: "
            "llm_int8_skip_modules=['lm_head']."
        )
    if not READS_ADAPTERS:
        if type(module).__module__.startswith("peft.tuners."):
            raise ValueError(
                f"an adapter on the language-model head (lm_head) needs peft>={OLDEST_PEFT}; got "
                f"{metadata.version('peft')}. Upgrade it, or take lm_head out of target_modules."
            )
        return Head(weight, module.bias)
    if isinstance(module, BaseTunerLayer):
        return _read_adapters(module)
    if isinstance(module, TrainableTokensWrapper):
        # Its weight is the base's with the trained rows in their places; it passes on no bias.
        return Head(weight, module.original_module.bias)
    return Head(weight, module.bias)


def _read_adapters(layer: Any) -> Head:
    base = layer.get_base_layer()
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # what the layer's own forward does then
    if layer.disable_adapters or layer.merged:
        return Head(base.weight, base.bias)
    kind = _type(layer)
    if kind is not LoraLinear:
        raise _not_plain_lora(kind)
    loras = []
    for name in layer.active_adapters:
        if name in layer.lora_variant:  # DoRA, aLoRA...
            raise _not_plain_lora(kind, type(layer.lora_variant[name]))
        if name in layer.lora_A:
            a, b = layer.lora_A[name], layer.lora_B[name]
            dropout = layer.lora_dropout[name]
            loras.append(Lora(a.weight, b.weight, b.bias, layer.scaling[name], dropout))
    return Head(base.weight, base.bias, tuple(loras))


def _not_plain_lora(*kinds: type) -> ValueError:
    names = " with ".join(f"{each.__module__}.{each.__name__}" for each in kinds)
    return ValueError(
        "an adapter on the language-model head (lm_head) must be LoRA without a variant; got "
        f"{names}. Take lm_head out of target_modules, or train it as a whole: "
        "modules_to_save=['lm_head']."
    )


def _type(module: Any) -> Any:
    """The class that the module was made of; fully_shard puts one of its own in front."""
    return next(each for each in type(module).__mro__ if not issubclass(each, FSDPModule))
