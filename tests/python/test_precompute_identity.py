"""The identity of a reference: equal where the forward is equal, different where it is not."""

from __future__ import annotations

import json
import pathlib
from typing import Any, ClassVar

import pytest
import torch

pytest.importorskip("trl", reason="precompute loads models with TRL")

import peft
from fusedpo._precompute import identity as identity_module
from fusedpo._precompute.identity import model_identity, refuse_sharded
from fusedpo._precompute.reference import load_reference, refuse_adapter_on_head
from fusedpo._store_identity import differences
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.trainer.utils import use_adapter
from trl_helpers import make_model


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})


def trained(model: Any, adapter: str = "default", seed: int = 3) -> Any:
    """With the zeros that LoRA starts with the adapter would change nothing."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def identity(model: Any, **options: Any) -> dict[str, Any]:
    return model_identity(model, **{"autocast": "bfloat16", **options})


def differing(one: Any, other: Any) -> set[str]:
    lines = differences(
        *(each if isinstance(each, dict) else identity(each) for each in (one, other))
    )
    return {line.split(":")[0] for line in lines}


def test_the_identity_is_readable_json_and_tells_versions_without_comparing_them() -> None:
    found = identity(make_model())
    assert json.loads(json.dumps(found)) == found
    assert found["scoring"] == {
        "dtype": "float32",
        "autocast": "bfloat16",
        "temperature": 1.0,
        "attention": "sdpa",
    }
    assert "torch" in found["info"]["versions"]
    other = found | {"info": {"versions": {"torch": "0.1"}}}
    assert differences(found, other) == []


def test_a_model_and_its_saved_copy_are_the_same(tmp_path: pathlib.Path) -> None:
    for family in ("llama", "llama tied", "gemma2 softcap", "gpt2", "mixtral"):
        model = make_model(family)
        model.save_pretrained(tmp_path / family)
        loaded = load_reference(
            str(tmp_path / family),
            dtype="float32",
            revision=None,
            attn_implementation=None,
            ref_adapter=None,
        )
        assert differing(model, loaded) == set(), family


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("model.parameters", lambda model: model.lm_head.weight.data[3, 5].add_(1e-6)),
        ("model.parameters", lambda model: model.model.norm.weight.data.neg_()),
        ("model.config.rms_norm_eps", lambda model: setattr(model.config, "rms_norm_eps", 1e-5)),
    ],
)
def test_what_changes_the_logits_changes_the_identity(field: str, change: Any) -> None:
    model = make_model()
    change(model)
    assert differing(make_model(), model) == {field}


def test_names_shapes_and_dtypes_count() -> None:
    swapped = make_model()
    layer = swapped.model.layers[0]
    layer.input_layernorm.weight.data.mul_(2)
    other = make_model()
    other.model.layers[0].post_attention_layernorm.weight.data.mul_(2)
    assert differing(swapped, other) == {"model.parameters"}
    half = make_model().to(torch.bfloat16)
    assert differing(half, make_model()) == {"model.parameters", "scoring.dtype"}


def test_how_it_is_scored_counts() -> None:
    model = make_model()
    assert differing(identity(model), identity(model, autocast=None)) == {"scoring.autocast"}
    assert differing(identity(model), identity(model, temperature=0.5)) == {"scoring.temperature"}


def test_what_training_and_generation_set_does_not_count() -> None:
    model = make_model()
    model.config.pad_token_id = 7
    model.config.use_cache = False
    model.config.attention_dropout = 0.5
    model.config.output_router_logits = True
    model.config._name_or_path = "elsewhere"
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()
    assert differing(make_model(), model) == set()


def test_wrappers_do_not_count() -> None:
    model = make_model()
    compiled = torch.compile(make_model())
    assert differing(model, compiled) == set()


# PEFT -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(target_modules="all-linear"),
        lora(use_dora=True),
        lora(modules_to_save=["lm_head"]),
        lora(target_modules=["embed_tokens", "q_proj"]),
        lora(trainable_token_indices=[1, 2]),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ],
    ids=lambda config: f"{config.peft_type.value} {sorted(config.to_dict().items())[0]}"[:40],
)
def test_an_adapter_that_is_off_leaves_the_plain_model(config: Any) -> None:
    model = trained(get_peft_model(make_model(), config))
    with use_adapter(model, None):
        assert differing(make_model(), model) == set()


def test_an_adapter_that_is_on_counts() -> None:
    one, other = (trained(get_peft_model(make_model(), lora()), seed=seed) for seed in (3, 4))
    assert differing(make_model(), one) == {"adapter", "adapter.parameters", "adapter.types"}
    assert differing(one, other) == {"adapter.parameters"}
    assert identity(one)["adapter"]["types"] == ["LORA"]


def test_the_scale_of_an_adapter_counts() -> None:
    one, other = (
        trained(get_peft_model(make_model(), lora(lora_alpha=alpha))) for alpha in (8, 16)
    )
    for (_, mine), (_, theirs) in zip(
        one.named_parameters(), other.named_parameters(), strict=True
    ):
        theirs.data.copy_(mine.data)
    assert differing(one, other) == {"adapter.parameters"}


def test_lora_as_it_starts_is_the_plain_model() -> None:
    assert differing(make_model(), get_peft_model(make_model(), lora())) == set()


def test_names_of_adapters_do_not_count(tmp_path: pathlib.Path) -> None:
    model = trained(get_peft_model(make_model(), lora()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model(), tmp_path)
    assert differing(model, loaded) == set()
    # The copy that DPOTrainer makes of an adapter that was trained before.
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    with use_adapter(model, "ref"):
        assert differing(loaded, model) == set()
    with use_adapter(model, None):
        assert differing(make_model(), model) == set()


def test_an_adapter_without_peft_model_counts_like_one_with() -> None:
    model = trained(get_peft_model(make_model(), lora()))
    # Adapter layers within a model of an ordinary class, as transformers' `load_adapter` makes it.
    plain = trained(peft.inject_adapter_in_model(lora(), make_model()))
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(model.get_parameter(f"base_model.model.{name}").data)
    assert differing(model, plain) == set()
    assert "adapter" in differing(make_model(), plain)
    for module in plain.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    assert differing(make_model(), plain) == set()


def test_an_adapter_merged_without_unload_counts_as_the_merged_model() -> None:
    merged = trained(get_peft_model(make_model(), lora()))
    unloaded = trained(get_peft_model(make_model(), lora())).merge_and_unload()
    merged.merge_adapter()
    assert differing(unloaded, merged) == set()
    assert differing(make_model(), merged) == {"model.parameters"}


def test_an_adapter_that_is_merged_and_off_is_refused() -> None:
    model = trained(get_peft_model(make_model(), lora()))
    model.merge_adapter()
    with use_adapter(model, None), pytest.raises(ValueError, match="merged into the base weights"):
        identity(model)


def test_base_weights_trained_under_peft_and_frozen_again_count() -> None:
    model = get_peft_model(make_model(), lora())
    weight = model.base_model.model.model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(True)
    with torch.no_grad():
        weight.add_(1e-3)
    weight.requires_grad_(False)
    with use_adapter(model, None):
        assert differing(make_model(), model) == {"model.parameters"}


def test_a_module_saved_with_the_adapter_counts_while_it_is_on() -> None:
    model = get_peft_model(make_model(), lora(modules_to_save=["lm_head"]))
    assert differing(make_model(), model) == set()
    model.base_model.model.lm_head.modules_to_save["default"].weight.data.add_(1)
    assert differing(make_model(), model) == {"model.parameters"}
    with use_adapter(model, None):
        assert differing(make_model(), model) == set()


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_counts_while_it_is_on(kind: Any) -> None:
    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        return get_peft_model(make_model(), kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))

    assert differing(build(1), make_model()) == {"adapter", "adapter.types", "adapter.parameters"}
    one = build(1)
    other = build(1)
    assert differing(one, other) == set()
    next(iter(other.prompt_encoder.parameters())).data.add_(1)
    assert differing(one, other) == {"adapter.parameters"}


def test_an_adapter_on_the_head_is_refused_while_it_is_on() -> None:
    model = trained(get_peft_model(make_model(), lora(target_modules=["q_proj", "lm_head"])))
    with pytest.raises(ValueError, match="output embeddings"):
        refuse_adapter_on_head(model)
    with use_adapter(model, None):
        refuse_adapter_on_head(model)
    refuse_adapter_on_head(trained(get_peft_model(make_model(), lora())))


def test_parameters_that_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = make_model()
    with pytest.raises(ValueError, match="not in memory"):
        identity(model)


def test_each_field_that_differs_is_named_with_both_values() -> None:
    store, reference = identity(make_model()), identity(make_model(), autocast=None)
    assert differences(reference, store) == [
        'scoring.autocast: the store has "bfloat16", this run has null'
    ]


def test_a_field_that_the_store_lacks_counts_unless_it_is_at_its_default() -> None:
    """A newer transformers may add fields to a config."""
    model = make_model()
    run, store = identity(model), identity(model)
    del store["model"]["config"]["attention_bias"]  # False by default
    assert differences(run, store) == []
    # The other way round nobody knows what the missing field would be.
    assert differences(store, run) != []
    model.config.attention_bias = True
    assert differences(identity(model), store) == [
        "model.config.attention_bias: the store has no such field, this run has true"
    ]


def test_infinity_in_a_config_is_json() -> None:
    model = make_model()
    model.config.time_step_limit = (0.0, float("inf"))  # as Mamba2, Bamba, Falcon-H1
    found = identity(model)
    assert found["model"]["config"]["time_step_limit"] == [0.0, "inf"]
    json.dumps(found, allow_nan=False)


def test_how_a_model_is_quantised_counts() -> None:
    """The dtype that 4-bit weights are computed in is in no tensor."""
    models = []
    for compute in ("float16", "bfloat16"):
        model = make_model()
        model.config.quantization_config = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_compute_dtype": compute,
        }
        models.append(model)
    assert differing(*models) == {"model.config.quantization_config.bnb_4bit_compute_dtype"}


class Sharded(torch.Tensor):
    """Stands for a DTensor: what is gathered lies where the tensor before it lay."""

    buffers: ClassVar[dict[torch.Size, torch.Tensor]] = {}

    def full_tensor(self) -> torch.Tensor:
        whole = self.as_subclass(torch.Tensor)
        buffer = self.buffers.setdefault(whole.shape, torch.empty_like(whole))
        return buffer.copy_(whole)


def sharded(model: Any) -> Any:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            data = parameter.detach().as_subclass(Sharded)
            module._parameters[name] = torch.nn.Parameter(data, requires_grad=False)
    return model


def test_sharded_parameters_are_told_apart_though_they_are_gathered_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(identity_module, "DTensor", Sharded)
    last = make_model()
    last.model.layers[-1].self_attn.q_proj.weight.data[0, 0] += 1
    assert differing(sharded(make_model()), make_model()) == set()
    assert differing(sharded(last), sharded(make_model())) == {"model.parameters"}


def test_sharded_parameters_are_refused_where_processes_score_other_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(identity_module, "DTensor", Sharded)
    model = sharded(make_model())
    refuse_sharded(model, 1)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is sharded over processes"):
        refuse_sharded(model, 2)
