"""The fused head on `model.forward`: log-probs of the completion tokens instead of logits.

`model(..., labels=labels, fused_lm_head=True)` runs the backbone and scores only the positions that
have a label; the logits of the batch never exist. `model(packed=packed, fused_lm_head=True)` does
so for one row without padding in which each prompt stands once (fusedpo._packing). It has to be the
model's own forward, not a function beside it: DDP, FSDP, DeepSpeed and accelerate's autocast hang
their hooks there. Without `fused_lm_head` nothing changes.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from fusedpo import TokenLogps, linear_token_logps
from fusedpo._head_adapter import Head, read_head
from fusedpo._packing.forward import packed_states, repeated
from fusedpo._packing.layout import Packed
from fusedpo.logps import score_head
from fusedpo.reference import METRICS

_TRANSFORMERS = Version(transformers.__version__)


@dataclass
class FusedHeadOutput(ModelOutput):  # type: ignore[misc]
    """Per-token results [batch, positions - 1] in nats, 0 where there is no label; of a packed row
    [scored tokens]. None where not asked for.

    The names are those of TRL's output, so that code written for TRL's fused head reads this one,
    too.
    """

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    aux_loss: Tensor | None = None


def add_fused_head(model: Any, *, outputs: Sequence[str] = ()) -> None:
    """Wrap `model.forward`. `outputs` names the metrics to compute besides the log-probs; other
    names are ignored.

    Args:
        model: a transformers causal language model; under PEFT its base model.
        outputs: names as TRL passes them, e.g. ``("log_probs", "entropy")``.
    """
    original_forward = model.forward
    text_config = model.config.get_text_config()
    softcap, logit_scale = logit_transform(text_config)
    metrics = tuple(name for name in METRICS if name in outputs)

    # `generate` checks its keyword arguments against the signature of the wrapped forward.
    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        packed: Packed | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            if labels is not None:
                kwargs["labels"] = labels
            return original_forward(*args, **kwargs)
        if packed is not None:
            labels = packed.labels
        if labels is None:
            raise ValueError(
                "labels must be given with fused_lm_head=True; got None. "
                "Pass input_ids with -100 on prompts."
            )
        if kwargs.get("shift_labels") is not None:
            raise ValueError(
                "shift_labels must be None with fused_lm_head=True, which shifts labels itself: it "
                "scores whole sequences, not the parts of context or sequence parallelism."
            )
        kwargs["use_cache"] = False
        if getattr(text_config, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        # The backbone and the head are looked up at each call: PEFT and FSDP replace modules after
        # this wrapping.
        backbone = _backbone(self, text_config)
        if packed is not None:
            # PeftModelForCausalLM passes on every argument of a forward, None where none was given.
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            states, hidden = packed_states(backbone, packed, text_config, **kwargs)
            targets = packed.labels
        else:
            states = backbone(*args, **kwargs)
            hidden, targets = states.last_hidden_state[:, :-1], labels[:, 1:]
        head = read_head(self.get_output_embeddings())
        device = head.weight.device  # with device_map the backbone may end on another device
        scored = score_rows(
            hidden.to(device),
            head,
            targets.to(device),
            softcap=softcap,
            logit_scale=logit_scale,
            metrics=metrics,
        )
        aux_loss = None
        if kwargs.get("output_router_logits"):
            router_logits, mask = states.router_logits, kwargs.get("attention_mask")
            if packed is not None:
                router_logits, mask = repeated(router_logits, packed), None
            aux_loss = _load_balancing_loss(self, text_config, router_logits, mask)
        return FusedHeadOutput(
            log_probs=scored.logps,
            entropy=scored.entropy,
            log_sum_sq_probs=scored.log_sum_sq_probs,
            mean_logits=scored.mean_logits,
            is_top1=scored.is_top1,
            aux_loss=aux_loss,
        )

    model.forward = types.MethodType(forward, model)


def logit_transform(text_config: Any) -> tuple[float | None, float]:
    """Return (softcap, logit_scale) of a transformers text config: what its own forward does to the
    logits.

    Cohere names the factor `logit_scale`, Muse Glimmer `output_multiplier`, Falcon-H1
    `lm_head_multiplier`. Granite and MiniCPM3 divide by `logits_scaling`; HyperCLOVA X multiplies
    by it.
    """
    softcap = getattr(text_config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        factor = getattr(text_config, name, None)
        if factor is not None:
            return softcap, float(factor)
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling is None:
        return softcap, 1.0
    return softcap, float(scaling) if text_config.model_type == "hyperclovax" else 1.0 / scaling


def score_rows(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None,
    logit_scale: float,
    metrics: Sequence[str],
) -> TokenLogps:
    """Score with a head that may be sharded, adapted or of another dtype."""
    head = head.map(_full_tensor)
    with _zero3_gathered(head.tensors()):
        weight, bias = head.weight, head.total_bias()
        lora_hidden, lora_weight = head.low_rank(hidden, labels)
        if not torch.is_autocast_enabled(hidden.device.type):
            # A head in bf16 behind norms in fp32, or TRL's cast_lm_head_to_fp32. The whole matrix
            # is converted: outside autocast the operator takes one dtype only. (Not so of adapters:
            # those in fp32 get their gradients in fp32, never rounded to less.)
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        options: dict[str, Any] = {
            "temperature": temperature,
            "softcap": softcap,
            "logit_scale": logit_scale,
            "metrics": metrics,
        }
        if lora_hidden is None:
            return linear_token_logps(hidden, weight, labels, bias=bias, **options)
        return score_head(hidden, weight, labels, bias, lora_hidden, lora_weight, **options)


def _full_tensor(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    # Each rank holds the gradient of its own batch. FSDP averages over ranks in hooks that do not
    # fire here, since the head module is never called; without `Partial("avg")` each rank would
    # keep the gradient of its own batch alone.
    average = [Partial("avg")] * parameter.device_mesh.ndim
    return parameter.full_tensor(grad_placements=average)


@contextlib.contextmanager
def _zero3_gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Gather ZeRO-3 parameters for the forward, and again when the backward asks for them.

    Between the two they are shards of size 0, so what autograd saves is a reference to the
    parameter and the layout that is wanted, not the data.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    with maybe_gather_lm_head_ctx(*parameters):
        gathered = {t.untyped_storage().data_ptr(): t for t in parameters}

        def pack(saved: Tensor) -> Any:
            parameter = gathered.get(saved.untyped_storage().data_ptr()) if saved.numel() else None
            if parameter is None:
                return saved
            return parameter, saved.size(), saved.stride(), saved.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            parameter, size, stride, offset = packed
            with maybe_gather_lm_head_ctx(parameter):
                full: Tensor = parameter.detach().clone()
            return full.as_strided(size, stride, offset)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


def _backbone(model: Any, text_config: Any) -> Any:
    # Before transformers 5 a vision-language model keeps its language backbone in `model`, and so
    # does Gemma-3's text model, whose `base_model` is itself.
    old_vision_model = text_config is not model.config and Version("5.0.0") > _TRANSFORMERS
    base = model.base_model
    return model.model if old_vision_model or base is model else base


def _load_balancing_loss(
    model: Any, text_config: Any, router_logits: Any, attention_mask: Tensor | None
) -> Tensor:
    """The router loss of a mixture of experts, without coefficient; all families use Mixtral's."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    # Where transformers keeps the number of experts: on the model before 5.0, for gpt-oss until
    # 5.6.
    on_model = Version("5.0.0") > _TRANSFORMERS
    gpt_oss_on_model = text_config.model_type == "gpt_oss" and Version("5.6.0") > _TRANSFORMERS
    num_experts = (model if on_model or gpt_oss_on_model else text_config).num_experts
    top_k = (model if on_model else text_config).num_experts_per_tok
    loss: Tensor = load_balancing_loss_func(router_logits, num_experts, top_k, attention_mask)
    return loss
