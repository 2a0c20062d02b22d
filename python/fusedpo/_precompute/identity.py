"""What a reference is, as a readable dict: two scorings may share a store only if these agree.

Content counts, not names or paths: every parameter that takes part in a forward is hashed with its
name, shape and dtype. The names are those of the plain model, whatever wraps it (PEFT, DDP,
`torch.compile`), so that a store made from a checkpoint serves a training under LoRA, whose base
weights have other names. Adapters count while they are in force: enabled, active, not merged, and
not a mere zero.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fusedpo._packing.names import former_implementation

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module"})
# Fields of a config that steer training, generation or saving, and leave the logits alone.
_NOT_LOGITS = re.compile(
    r"^_|_token_id$|drop|^initializer|use_cache|^router_aux_loss|^output_router_logits$"
    r"|^router_jitter|^pretraining_tp$|^(torch_)?dtype$|^gradient_checkpointing$|^id2label$"
    r"|^label2id$|^auto_map$|^architectures$|^transformers_version$"
)


def model_identity(model: Any, *, autocast: str | None, temperature: float = 1.0) -> dict[str, Any]:
    """Return the identity of `model` as it stands: adapters switched off do not count.

    Args:
        model: a transformers model or a PeftModel around one; sharded parameters are gathered, so
            every rank has to call.
        autocast: the autocast dtype of the scoring, "bfloat16" or "float16"; None without autocast.
        temperature: what the logits are divided by.

    Raises:
        ValueError: adapters that are both merged and switched off.
    """
    base, adapter, kinds = _tensors_in_force(model)
    # Packed rows agree with padded ones to rounding, as one padded batch does with another.
    attention = former_implementation(getattr(model.config, "_attn_implementation", None))
    config = _logit_fields(model.config.to_dict())
    return {
        "model": {
            "parameters": _digest(base),
            "tensors": len(base),
            "config": config,
        },
        "adapter": {"types": kinds, "parameters": _digest(adapter)} if adapter else None,
        "scoring": {
            "dtype": _name(model.dtype),
            "autocast": autocast,
            "temperature": float(temperature),
            "attention": attention,
        },
        "info": {  # told, never compared
            "model": getattr(model.config, "_name_or_path", ""),
            "versions": _versions(),
            "default_fields": _default_fields(model.config, config),
        },
    }


def refuse_sharded(model: Any, world_size: int) -> None:
    """Raise ValueError where parameters are shared out among processes.

    Each of these scores other batches, so the collective operations of a forward would never meet.
    """
    for name, parameter in model.named_parameters() if world_size > 1 else ():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"the parameter {name} is sharded over processes (a DTensor: tensor parallelism or "
                f"FSDP2), and each of the {world_size} processes scores other batches. Give every "
                "process the whole model, or run fusedpo precompute in one process before."
            )


def _logit_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config that can change logits, in JSON's types."""
    from transformers import PretrainedConfig

    # What every model has (tokens, generation, labels) says nothing about its logits.
    common = PretrainedConfig().to_dict().keys() - {"tie_word_embeddings", "rope_parameters"}
    fields: dict[str, Any] = {}
    for name, value in sorted(config.items()):
        if (name in common and name != "model_type") or _NOT_LOGITS.search(name):
            continue
        fields[name] = _logit_fields(value) if isinstance(value, Mapping) else _jsonable(value)
    return fields


def _default_fields(config: Any, fields: Mapping[str, Any]) -> list[str]:
    """Dotted names of the fields that have the default of the config's class."""
    try:
        defaults = _logit_fields(type(config)().to_dict())
    except Exception:  # a class of the user's that needs arguments: no field counts as a default
        return []
    return [f"model.config.{name}" for name in _equal_leaves(fields, defaults)]


def _equal_leaves(fields: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name, value in fields.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and value and isinstance(default, Mapping):
            names += [f"{name}.{inner}" for inner in _equal_leaves(value, default)]
        elif name in defaults and value == default:
            names.append(name)
    return names


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _jsonable(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(each) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_jsonable(each) for each in value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity; Mamba's time_step_limit does
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("fusedpo", "torch", "transformers", "trl", "peft"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


# Which tensors count, and under which name ------------------------------------------------------


class _Place(NamedTuple):
    """Where a tensor of the state dict belongs: its plain name, and whose it is."""

    name: str
    adapter: str | None = None  # the name of the adapter that it is part of


def _tensors_in_force(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """The plain model's tensors, the adapters', and the kinds of these adapters."""
    modules = dict(model.named_modules(remove_duplicate=False))
    _refuse_merged_and_disabled(modules.values())
    base: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    names: set[str] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue  # the extra state of a quantised layer
        if tensor.is_meta or hasattr(tensor, "ds_id"):
            raise ValueError(
                f"the parameter {key} is not in memory as a whole (offloaded, or sharded by "
                "ZeRO-3), so the reference cannot be identified. Load the model as a whole."
            )
        place = _place(key, modules)
        if place is None:
            continue
        if place.adapter is None:
            base[place.name] = tensor.detach()
        else:
            adapter[place.name] = tensor.detach()
            names.add(place.adapter)
    adapter |= _scalings(modules)
    return base, adapter, _kinds(modules, names)


def _is_disabled(prompt_learning: Any) -> bool:
    """Whether a PeftModel with prompt learning is within `disable_adapter()`."""
    disabled: bool | None = getattr(prompt_learning, "_adapters_disabled", None)
    if disabled is not None:
        return disabled
    # PEFT 0.17 and older have no flag: there the base model's forward takes the place of its own.
    return getattr(prompt_learning.forward, "__self__", prompt_learning) is not prompt_learning


def _place(key: str, modules: Mapping[str, Any]) -> _Place | None:
    """Walk from the root to the tensor and drop what PEFT and other wrappers put in between; None
    for what takes no part in the forward."""
    parts = key.split(".")
    kept: list[str] = []
    adapter: str | None = None
    skip = False  # the next part is an adapter's name
    for depth, part in enumerate(parts):
        module: Any = modules.get(".".join(parts[:depth]))
        following = parts[depth + 1] if depth + 1 < len(parts) else ""
        if skip:
            skip = False
        elif part in _WRAPPERS or (part == "module" and _is_parallel(module)):
            pass
        elif _is_peft_model(module):
            if part == "base_model":
                continue
            # Prompt learning keeps its parameters here, and another name for the embeddings.
            if part != "prompt_encoder" or _is_disabled(module):
                return None
            if following != module.active_adapter:
                return None
            adapter, skip = following, True
            kept.append(part)
        elif _is_tuner(module):
            if part != "model":
                return None
        elif _is_saved_module(module):
            active = [] if module.disable_adapters else list(module.active_adapters)
            if part == "original_module" and active and "modules_to_save" in module._modules:
                return None
            if part == "modules_to_save":
                if following not in active[:1]:
                    return None
                skip = True
        elif _is_tuner_layer(module) and part == "base_layer":
            pass
        elif _is_tuner_layer(module) and part in _adapter_parts(module):
            if not _layer_in_force(module, following):
                return None
            adapter, skip = following, True
            kept.append(part)
        else:
            kept.append(part)
    return _Place(".".join(kept), adapter)


def _adapter_parts(layer: Any) -> tuple[str, ...]:
    return (*layer.adapter_layer_names, *layer.other_param_names)


def _layer_in_force(layer: Any, name: str) -> bool:
    if layer.disable_adapters or name not in layer.active_adapters:
        return False
    return name not in layer.merged_adapters and not _adds_zero(layer, name)


def _adds_zero(layer: Any, name: str) -> bool:
    """LoRA as it starts, B = 0: the forward is the base model's, bit for bit."""
    if "lora_B" not in getattr(layer, "adapter_layer_names", ()):
        return False
    if name in getattr(layer, "lora_magnitude_vector", {}):
        return False
    matrices = [
        tensor
        for holder in (layer.lora_B, getattr(layer, "lora_embedding_B", {}))
        if name in holder
        for tensor in (
            [holder[name]] if isinstance(holder[name], Tensor) else holder[name].parameters()
        )
    ]
    return bool(matrices) and not any(bool(tensor.any()) for tensor in matrices)


def _scalings(modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """The factors of the adapters in force: plain numbers, which no state dict has."""
    found = {}
    for path, module in modules.items():
        if not _is_tuner_layer(module):
            continue
        for name, value in getattr(module, "scaling", {}).items():
            place = _place(f"{path}.base_layer.scale", modules)
            if place is not None and _layer_in_force(module, name):
                found[place.name] = torch.tensor(float(value), dtype=torch.float64)
    return found


def _kinds(modules: Mapping[str, Any], names: set[str]) -> list[str]:
    """The type of each adapter in force, with what its parameters do not show."""
    kinds = set()
    for module in modules.values():
        configs = getattr(module, "peft_config", None)
        if not isinstance(configs, dict):
            continue
        for name in names & configs.keys():
            kind = str(getattr(configs[name].peft_type, "value", configs[name].peft_type))
            tokens = getattr(configs[name], "alora_invocation_tokens", None)
            kinds.add(kind if tokens is None else f"{kind} after tokens {list(tokens)}")
    return sorted(kinds)


def _refuse_merged_and_disabled(modules: Any) -> None:
    for module in modules:
        if _is_tuner_layer(module) and module.merged_adapters and module.disable_adapters:
            raise ValueError(
                f"the adapters {list(module.merged_adapters)} are merged into the base weights and "
                "switched off at once; PEFT would subtract them again, with rounding errors. Load "
                "the base model anew, or keep the merged one: model = model.merge_and_unload()."
            )


def _is_peft_model(module: Any) -> bool:
    return _is(module, "peft.peft_model", "PeftModel")


def _is_tuner(module: Any) -> bool:
    return _is(module, "peft.tuners.tuners_utils", "BaseTuner")


def _is_tuner_layer(module: Any) -> bool:
    return _is(module, "peft.tuners.tuners_utils", "BaseTunerLayer")


def _is_saved_module(module: Any) -> bool:
    return _is(module, "peft.utils.other", "AuxiliaryTrainingWrapper")


def _is_parallel(module: Any) -> bool:
    return _is(module, "torch.nn.parallel.distributed", "DistributedDataParallel")


def _is(module: Any, where: str, name: str) -> bool:
    """isinstance by name: PEFT is not imported for a model that has none of it."""
    return any(each.__name__ == name and each.__module__ == where for each in type(module).__mro__)


# The digest -------------------------------------------------------------------------------------


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over (name, dtype, shape, SHA-256 of the content) in the order of the names."""
    whole = hashlib.sha256()
    seen: dict[tuple[Any, ...], bytes] = {}  # tied weights are read once
    # hashlib releases the GIL; only a few tensors are on the host at a time.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        contents = []
        for name, tensor in sorted(tensors.items()):
            if isinstance(tensor, DTensor):
                # One gathered tensor in memory at a time. The next one may get its address, so its
                # digest is not kept by it.
                content = pool.submit(_content, tensor.full_tensor(), {})
                content.result()
            else:
                content = pool.submit(_content, tensor, seen)
            contents.append((name, tensor, content))
        for name, tensor, content in contents:
            whole.update(f"{name}\0{_name(tensor.dtype)}\0{list(tensor.shape)}\0".encode())
            whole.update(content.result())
    return "sha256:" + whole.hexdigest()


def _content(tensor: Tensor, seen: dict[tuple[Any, ...], bytes]) -> bytes:
    where = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
    if where not in seen:
        value = hashlib.sha256()
        for piece in _pieces(tensor):
            value.update(piece.numpy().data)
        seen[where] = value.digest()
    return seen[where]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor on the host, 64 MiB at a time."""
    flat = tensor.detach().contiguous().reshape(-1)
    step = max(1, (64 << 20) // tensor.element_size())
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].cpu().view(torch.uint8)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
