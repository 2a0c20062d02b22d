"""For which models a packed row gives what padded rows give, to rounding.

Exact are layers that treat each token by itself (norms, MLPs, routed experts without a capacity)
and attention that takes its order from `position_ids` and goes through transformers' attention
interface. A recurrence, a convolution, linear attention or ALiBi would carry one completion into
the other. tests/python/test_packing_architectures.py compares every name of the list with padded
rows.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version

from .names import NAMES, former_implementation

EXACT_MODEL_TYPES = frozenset(
    {
        "arcee",
        "cohere",
        "cohere2",
        "ernie4_5",
        "exaone4",
        "gemma",
        "gemma2",
        "gemma3_text",
        "glm",
        "glm4",
        "gpt2",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "helium",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "olmo",
        "olmo2",
        "olmo3",
        "olmoe",
        "phi",
        "phi3",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "seed_oss",
        "smollm3",
        "starcoder2",
    }
)
# Whose layers have config.sliding_window: all of them, or those that config.layer_types names.
# Others have none, whatever the config says.
_WINDOW_IN_ALL = frozenset({"mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2"})
_WINDOW_BY_TYPE = frozenset(
    {
        "cohere2",
        "exaone4",
        "gemma2",
        "gemma3_text",
        "gpt_oss",
        "ministral",
        "olmo3",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)
# Their layers hand keyword arguments down to attention since this release.
_SINCE_TRANSFORMERS_5 = frozenset({"olmoe", "qwen2_moe"})
_TRANSFORMERS = Version(transformers.__version__)
# Adapters that change weights, or scale features: each token by itself.
EXACT_ADAPTERS = frozenset({"IA3", "LOHA", "LOKR", "LORA", "OFT", "VERA"})


MODES = ("auto", True, False)


def check_mode(share_prompts: Any) -> None:
    """Raise ValueError unless `share_prompts` is "auto", True or False."""
    if not any(share_prompts is mode or share_prompts == mode == "auto" for mode in MODES):
        raise ValueError(f"share_prompts must be 'auto', True or False; got {share_prompts!r}.")


def why_not_exact(model: Any) -> str | None:
    """Return why `model` cannot take packed rows, or None where it can.

    Args:
        model: a transformers causal language model, or a PeftModel around one; not wrapped further.
    """
    configs = getattr(model, "peft_config", None) or {}
    for config in configs.values():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in EXACT_ADAPTERS:
            return f"adapters of type {kind} are not known to treat each token by itself"
        if getattr(config, "alora_invocation_tokens", None):
            return "activated LoRA (alora_invocation_tokens) switches by position in a sequence"
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config
    # fully_shard puts a class of its own in front.
    own = next(each for each in type(base).__mro__ if not each.__module__.startswith("torch."))
    if not own.__module__.startswith("transformers.models."):
        return f"the code of {own.__name__} is not transformers' own"
    if config.get_text_config() is not config:
        return f"{type(base).__name__} takes more than text"
    if config.model_type not in EXACT_MODEL_TYPES:
        return (
            f"{type(base).__name__} ({config.model_type}) is not known to be exact; a recurrence, "
            "a convolution, linear attention or ALiBi carries one completion into the other. "
            f"Its layers: {_layer_classes(base)}"
        )
    if config.model_type in _SINCE_TRANSFORMERS_5 and _TRANSFORMERS.major < 5:
        return (
            f"{config.model_type} needs transformers 5.0; installed is {transformers.__version__}"
        )
    attention = former_implementation(config._attn_implementation)
    if attention not in NAMES:
        return f"attn_implementation is {attention}, not {' or '.join(NAMES)}"
    return _replaced_attention(base) or _unusual_option(config)


def _replaced_attention(model: Any) -> str | None:
    """What runs in the place of transformers' own attention layers, which libraries replace for
    speed."""
    for path, module in model.named_modules():
        if path.rpartition(".")[2] not in ("self_attn", "attn", "attention"):
            continue
        # accelerate keeps here what it puts its hooks around.
        forward = getattr(module, "_old_forward", module.forward)
        function = getattr(forward, "__func__", forward)
        # Not __module__, which a replacement may have copied (functools.wraps).
        home = getattr(function, "__globals__", {}).get("__name__", function.__module__)
        if not home.startswith(("transformers.", "torch.")):
            return f"the forward of {path} comes from {home}, not from transformers"
    return None


def windowed_layers(config: Any) -> int:
    """How many layers of a model on the list tell attention a sliding window."""
    if getattr(config, "sliding_window", None) is None:
        return 0
    if config.model_type in _WINDOW_IN_ALL:
        return int(config.num_hidden_layers)
    kinds = config.layer_types if config.model_type in _WINDOW_BY_TYPE else []
    return int(kinds.count("sliding_attention"))


def _unusual_option(config: Any) -> str | None:
    options = config.to_dict()
    if options.get("is_causal") is False or options.get("use_bidirectional_attention"):
        return "its attention is not causal"
    if options.get("reorder_and_upcast_attn"):
        return "reorder_and_upcast_attn=True bypasses transformers' attention interface"
    windows = "sliding_attention" in (options.get("layer_types") or ())
    if config.model_type == "qwen2_moe" and windows:
        return "its layers keep their sliding window to the mask, which packed rows do not have"
    if config.model_type == "smollm3" and windows and not options.get("use_sliding_window"):
        return "its mask has a sliding window (layer_types) that its layers do not have"
    if config.model_type == "olmoe" and options.get("sliding_window"):
        return "its layers have a sliding_window that its mask does not have"
    scaled = not options.get("scale_attn_weights", True)
    if (scaled or options.get("scale_attn_by_inverse_layer_idx")) and _TRANSFORMERS.major < 5:
        return "before transformers 5.0 its scores are scaled within its own attention function"
    if options.get("router_jitter_noise"):
        return "router_jitter_noise makes the experts of a token random"
    return None


def active_dropout(model: Any) -> str | None:
    """Return where dropout is active in training, or None. The completions of a packed pair would
    lose the same parts of their prompt, those of padded rows different ones."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            return f"{name} has p={module.p}"
    options = model.config.to_dict()
    for name in ("attention_dropout", "residual_dropout", "embedding_dropout"):
        if options.get(name):
            return f"{name}={options[name]} in the model's config"
    return None


def _layer_classes(model: Any) -> str:
    """The classes that the model's layers are made of, e.g. "BloomAttention, BloomMLP"."""
    names: list[str] = []
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                for _, child in layer.named_children():
                    if type(child).__name__ not in names:
                        names.append(type(child).__name__)
            break
    return ", ".join(name for name in names if "Norm" not in name)
