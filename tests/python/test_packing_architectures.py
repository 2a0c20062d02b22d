"""Each model that counts as exact against its own padded rows, and models that must be refused."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the fused head needs TRL")

import accelerate
import peft
import transformers
from fusedpo._head import add_fused_head
from fusedpo._packing.architectures import EXACT_MODEL_TYPES, active_dropout, why_not_exact
from fusedpo._packing.attention import use_packed_attention
from fusedpo._packing.layout import pack
from fusedpo._packing.names import former_implementation, takes_packed_rows
from packing_helpers import (
    VOCABULARY,
    assert_equal_gradients,
    backward,
    make_groups,
    packed_logps,
    padded,
    padded_logps,
    summed,
)
from trl_helpers import BEFORE_5, one_thread  # noqa: F401  a fixture

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
# A window shorter than the sequences, in one of two layers where a model mixes them.
_MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "arcee": ("Arcee", {}),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "cohere2": ("Cohere2", _MIXED),
    "ernie4_5": ("Ernie4_5", {"head_dim": 8}),
    "exaone4": ("Exaone4", _MIXED),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", _MIXED | {"head_dim": 8, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3Text", _MIXED | {"head_dim": 8}),
    "glm": ("Glm", {"head_dim": 8}),
    "glm4": ("Glm4", {"head_dim": 8}),
    "gpt2": ("GPT2", {}),
    "gpt_neox": ("GPTNeoX", {}),
    "gpt_oss": (
        "GptOss",
        _MIXED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "granite": ("Granite", {}),
    "helium": ("Helium", {"head_dim": 8}),
    "llama": ("Llama", {}),
    "ministral": ("Ministral", {"sliding_window": 5, "head_dim": 8}),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", _MIXED),
    "olmoe": ("Olmoe", _EXPERTS),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2_moe": (
        "Qwen2Moe",
        _EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", _EXPERTS | {"head_dim": 8, "moe_intermediate_size": 16}),
    "seed_oss": ("SeedOss", {"head_dim": 8}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("Starcoder2", {"sliding_window": 5}),
}
# Windows of models that most often have none.
_EVERY = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
WINDOWS: dict[str, dict[str, Any]] = {
    # Has none, though it may stand in the config.
    "llama": {"sliding_window": 5},
    "mixtral": {"sliding_window": 5},
    "qwen3": _EVERY,
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 5},
    "smollm3": {"use_sliding_window": True, **_MIXED},
}
MIXTURES = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def make(name: str, options: dict[str, Any], seed: int = 0, **more: Any) -> Any:
    """A model in evaluation mode (some have dropout by default), with random weights that are large
    enough for attention to matter."""
    sizes: dict[str, Any] = _SIZES
    if name == "GPT2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **_COMMON, **options, **more})
    config.initializer_range = 0.2
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def known(model_type: str) -> None:
    """Skips a case that the installed transformers does not have, or in a form that is refused."""
    name, options = CASES[model_type]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if BEFORE_5 and model_type in ("olmoe", "qwen2_moe"):
        assert "needs transformers 5.0" in str(why_not_exact(make(name, options)))
        pytest.skip(f"{name} is refused before transformers 5.0")


def test_the_cases_are_the_list() -> None:
    assert CASES.keys() == EXACT_MODEL_TYPES


@pytest.mark.parametrize(
    ("model_type", "more"),
    [(name, {}) for name in CASES] + list(WINDOWS.items()),
    ids=lambda value: value if isinstance(value, str) else "window" if value else "",
)
def test_packed_row_equals_padded_rows(model_type: str, more: dict[str, Any]) -> None:
    known(model_type)
    model = make(*CASES[model_type], **more)
    assert model.config.model_type == model_type
    assert why_not_exact(model) is None
    add_fused_head(model)
    groups = make_groups()
    plain = padded_logps(model, groups)
    want = backward(plain, model)
    use_packed_attention(model)
    assert takes_packed_rows(model)

    got = packed_logps(model, groups)
    # 8 eps (sum |logp_t| + max |z|); the logits count 0 here, which only makes it harder.
    limit = 8 * torch.finfo(torch.float32).eps * -summed(plain)
    assert ((summed(got) - summed(plain)).abs() <= limit).all()
    assert_equal_gradients(backward(got, model), want)
    again = padded_logps(model, groups)
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))


@pytest.mark.parametrize("model_type", MIXTURES)
def test_router_loss_counts_a_prompt_once_for_each_completion(model_type: str) -> None:
    known(model_type)
    model = make(*CASES[model_type])
    add_fused_head(model)
    use_packed_attention(model)
    groups = make_groups()
    losses = []
    gradients = []
    for batch in (padded(groups), {"packed": pack(groups)}):
        model.zero_grad()
        losses.append(model(**batch, fused_lm_head=True, output_router_logits=True).aux_loss)
        losses[-1].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert_equal_gradients(gradients[1], gradients[0])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("Mamba", {"state_size": 4}, "MambaMixer"),
    "bloom": ("Bloom", {"n_head": 4}, "BloomAttention"),
    "falcon alibi": ("Falcon", {"alibi": True}, "FalconAttention"),
    "recurrent_gemma": ("RecurrentGemma", {"lru_width": 32}, "RecurrentGemmaRecurrentBlock"),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}, "Lfm2ShortConv"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_carry_a_state_or_alibi_are_refused_by_name(case: str) -> None:
    name, options, layer = REFUSED[case]
    reason = why_not_exact(make(name, options))
    assert reason is not None
    assert layer in reason


def test_options_that_break_exactness_are_refused_by_name() -> None:
    llama = make("Llama", {})
    assert "attention_dropout" in str(active_dropout(make("Llama", {"attention_dropout": 0.1})))
    assert active_dropout(llama) is None
    assert "p=0.1" in str(active_dropout(make("GPT2", {})))
    upcast = make("GPT2", {"reorder_and_upcast_attn": True})
    assert "reorder_and_upcast_attn" in str(why_not_exact(upcast))
    for name, option in (
        ("SeedOss", {"attention_dropout": 0.0, "residual_dropout": 0.1}),
        ("Starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.1}),
    ):
        assert list(option)[1] in str(active_dropout(make(name, option)))
    if not BEFORE_5:  # where both are refused for another reason
        windows = make(*CASES["qwen2_moe"], **_EVERY)
        assert "sliding window to the mask" in str(why_not_exact(windows))
        assert "sliding_window" in str(why_not_exact(make(*CASES["olmoe"], sliding_window=5)))
    unused = make(*CASES["smollm3"], **_MIXED, use_sliding_window=False)
    assert "its mask has a sliding window" in str(why_not_exact(unused))
    noisy = make("Mixtral", CASES["mixtral"][1] | {"router_jitter_noise": 0.1})
    assert "router_jitter_noise" in str(why_not_exact(noisy))
    llama.config._attn_implementation = "flex_attention"
    assert "flex_attention" in str(why_not_exact(llama))
    with pytest.raises(ValueError, match="flex_attention"):
        use_packed_attention(llama)


def test_model_that_takes_images_is_refused() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.Gemma3Config(
        text_config={**_SIZES, "vocab_size": VOCABULARY, "head_dim": 8},
        vision_config={**vision, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    assert "more than text" in str(why_not_exact(model))


def test_code_from_elsewhere_is_refused() -> None:
    class Remote(transformers.LlamaForCausalLM):  # type: ignore[misc]
        pass

    config = transformers.LlamaConfig(**_SIZES, **_COMMON)
    assert "Remote" in str(why_not_exact(Remote(config)))


@pytest.mark.parametrize(
    "adapter",
    [
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], use_dora=True),
        peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.LoHaConfig(r=2, target_modules=["q_proj"]),
        peft.LoKrConfig(r=2, target_modules=["q_proj"]),
        peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
        peft.VeraConfig(r=2, target_modules=["q_proj"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_adapters_that_count_as_exact_are(adapter: Any) -> None:
    model = peft.get_peft_model(make("Llama", {}), adapter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=1.0 if "ia3" in name else 0.0, std=0.1)
    assert why_not_exact(model) is None
    add_fused_head(model.get_base_model())
    groups = make_groups()
    plain = padded_logps(model, groups)
    want = backward(plain, model)
    use_packed_attention(model)
    got = packed_logps(model, groups)
    torch.testing.assert_close(summed(got), summed(plain), rtol=1e-6, atol=0)
    assert_equal_gradients(backward(got, model), want)


def test_adapters_in_a_plain_model_and_classes_of_fsdp_are_looked_through() -> None:
    model = make("Llama", {})
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["q_proj"]), model)
    model.peft_config = {"default": peft.LoraConfig(r=2, target_modules=["q_proj"])}
    assert why_not_exact(model) is None
    # As fully_shard makes it.
    bases = (torch.distributed.fsdp.FSDPModule, type(model))
    module = {"__module__": "torch.distributed.fsdp._fully_shard._fully_shard"}
    model.__class__ = type("FSDPLlamaForCausalLM", bases, module)
    assert why_not_exact(model) is None


def test_adapters_that_see_positions_are_refused() -> None:
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    assert "PROMPT_TUNING" in str(why_not_exact(peft.get_peft_model(make("Llama", {}), prompt)))


def test_activated_lora_is_refused() -> None:
    if "alora_invocation_tokens" not in inspect.signature(peft.LoraConfig).parameters:
        pytest.skip(f"PEFT {peft.__version__} has no activated LoRA")
    activated = peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7]
    )
    assert "alora" in str(why_not_exact(peft.get_peft_model(make("Llama", {}), activated)))


def test_attention_that_is_not_transformers_own_is_refused(monkeypatch: Any) -> None:
    model = make("Llama", {})
    accelerate.hooks.add_hook_to_module(
        model.model.layers[0].self_attn, accelerate.hooks.ModelHook()
    )
    assert why_not_exact(model) is None
    own = transformers.models.llama.modeling_llama.LlamaAttention

    class Fast(torch.nn.Module):
        def forward(self, *arguments: Any, **keywords: Any) -> Any:
            raise AssertionError("never called")

    model.model.layers[1].self_attn = Fast()
    assert "model.layers.1.self_attn" in str(why_not_exact(model))

    def fast(self: Any, *arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("never called")

    disguised = functools.wraps(own.forward)(lambda *_, **__: None)
    for replacement in (fast, disguised):
        monkeypatch.setattr(own, "forward", replacement)
        model = make("Llama", {})
        for _ in range(2):  # as it is, and below a hook
            reason = str(why_not_exact(model))
            assert "model.layers.0.self_attn" in reason
            assert __name__ in reason
            attention = model.model.layers[0].self_attn
            accelerate.hooks.add_hook_to_module(attention, accelerate.hooks.ModelHook())
        monkeypatch.undo()


@pytest.mark.parametrize("told", [0, 2])
def test_a_window_that_a_layer_does_not_tell_is_an_error(told: int) -> None:
    model = make(*CASES["qwen3"], **_EVERY)  # in the second of two layers
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 5 if told else None
    add_fused_head(model)
    use_packed_attention(model)
    with pytest.raises(RuntimeError, match=f"{told} of 1 layers with a sliding window told it"):
        packed_logps(model, make_groups())


def test_a_layer_that_loses_the_layout_is_an_error_not_a_wrong_number() -> None:
    model = make("StableLm", {})  # hands no keyword arguments down to its attention
    add_fused_head(model)
    use_packed_attention(model)
    # Before transformers 5.0 its backbone takes no further keyword arguments.
    error, words = (
        (TypeError, "packed_table")
        if BEFORE_5
        else (RuntimeError, "StableLmModel: 0 of 2 layers received the layout")
    )
    with pytest.raises(error, match=words):
        packed_logps(model, make_groups())


def test_saved_config_and_generation_know_nothing_of_it(tmp_path: Any) -> None:
    model = make("Llama", {})
    ids = torch.arange(10, 16)[None]
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    use_packed_attention(model)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)
    model.save_pretrained(tmp_path)
    assert "fusedpo" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not takes_packed_rows(loaded)
    assert former_implementation(model.config._attn_implementation) == "sdpa"
