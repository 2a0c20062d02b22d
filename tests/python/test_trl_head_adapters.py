"""Adapters on the language-model head: the fused head equals PEFT's own forward, or refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from fusedpo._head import add_fused_head, score_rows
from fusedpo._head_adapter import Head, Lora, read_head
from fusedpo.reference import METRICS
from peft.tuners.tuners_utils import BaseTunerLayer
from test_trl_head import batch, scored_by_logits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.trainer.utils import use_adapter
from trl_helpers import (
    VOCABULARY,
    make_model,
    need_tied_adapters,
    one_thread,  # noqa: F401  a fixture
    shard_as_zero3,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]


def lora(*targets: str, **options: Any) -> peft.LoraConfig:
    if "ensure_weight_tying" in options:
        need_tied_adapters()
    return peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", *targets] if targets else None, **options
    )


def adapted(config: Any, family: str = "llama") -> Any:
    """Return a PeftModel whose adapters, and trained copies, are not what they began as."""
    return perturbed(peft.get_peft_model(make_model(family), config).eval())


def perturbed(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "original_module" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.3 * noise)
    return model


def two_active() -> Any:
    model = peft.get_peft_model(make_model(), lora("lm_head"))
    model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=5, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    return perturbed(model.eval())


MODELS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: adapted(lora("lm_head")),
    "LoRA on the head alone": lambda: adapted(peft.LoraConfig(r=1, target_modules=["lm_head"])),
    "rank-stabilised": lambda: adapted(lora("lm_head", use_rslora=True)),
    "PiSSA": lambda: adapted(lora("lm_head", init_lora_weights="pissa")),
    "tied": lambda: adapted(lora("lm_head"), "llama tied"),
    "tied, on the embedding only": lambda: adapted(lora("embed_tokens"), "llama tied"),
    "tied, tied adapters": lambda: adapted(
        lora("embed_tokens", "lm_head", ensure_weight_tying=True), "llama tied"
    ),
    "softcap": lambda: adapted(lora("lm_head"), "gemma2 softcap"),
    "logit scale": lambda: adapted(lora("lm_head"), "cohere logit_scale"),
    "bias in the head": lambda: adapted(lora("lm_head"), "phi head with bias"),
    "bias in head and adapter": lambda: adapted(
        lora("lm_head", lora_bias=True), "phi head with bias"
    ),
    "bias in the adapter": lambda: adapted(lora("lm_head", lora_bias=True)),
    "two active adapters": two_active,
    "trained as a whole": lambda: adapted(lora("v_proj", modules_to_save=["lm_head"])),
    "tied, trained as a whole": lambda: adapted(
        lora("v_proj", modules_to_save=["lm_head"]), "llama tied"
    ),
    "tied, trained as a whole with the embedding": lambda: adapted(
        lora("v_proj", modules_to_save=["lm_head"], ensure_weight_tying=True), "llama tied"
    ),
    "tied, some rows trained": lambda: adapted(
        lora("v_proj", trainable_token_indices=[7, 11, 80]), "llama tied"
    ),
}


def with_gradients(model: Any, out: Any, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 1, logps.numel()).view(logps.shape)
    ((logps + 0.1 * out.entropy) * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about tied weights and biases
@pytest.mark.parametrize("name", MODELS)
def test_fused_head_equals_pefts_own_forward(name: str) -> None:
    model, inputs = MODELS[name](), batch()
    want = scored_by_logits(model, inputs)
    want_grads = with_gradients(model, want, want.logps)
    with torch.no_grad(), model.disable_adapter():
        plain = scored_by_logits(model, inputs)
    assert (want.logps - plain.logps).abs().max() > 0.1

    add_fused_head(model.get_base_model(), outputs=("log_probs", *METRICS))
    got = model(**inputs, fused_lm_head=True)
    grads = with_gradients(model, got, got.log_probs)
    torch.testing.assert_close(got.log_probs, want.logps, rtol=1e-5, atol=1e-5)
    for metric in ("entropy", "log_sum_sq_probs", "mean_logits"):
        mine, theirs = getattr(got, metric), getattr(want, metric)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.is_top1, want.is_top1)
    assert grads.keys() == want_grads.keys()
    for parameter, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[parameter], rtol=1e-4, atol=2e-5, msg=parameter)
    with torch.no_grad(), model.disable_adapter():
        off = model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(off.log_probs, plain.logps, rtol=1e-5, atol=1e-5)


def test_head_follows_the_adapter_in_force_from_call_to_call() -> None:
    model, inputs = adapted(lora("lm_head")), batch()
    model.add_adapter("ref", lora("lm_head"))
    add_fused_head(model.get_base_model())

    def both() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return scored_by_logits(model, inputs).logps, model(
                **inputs, fused_lm_head=True
            ).log_probs

    states = {"on": both()}
    with use_adapter(model, "ref"):
        states["ref"] = both()
    with use_adapter(model, None):
        states["off"] = both()
    model.merge_adapter()
    states["merged"] = both()
    with torch.no_grad(), model.disable_adapter():  # PEFT takes a merged adapter out again
        got = model(**inputs, fused_lm_head=True).log_probs
        assert not model.get_base_model().lm_head.merged
        states["merged and off"] = scored_by_logits(model, inputs).logps, got
    states["on again"] = both()
    for state, (want, got) in states.items():
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=state)
    on, off = states["on"][1], states["off"][1]
    assert (on - off).abs().max() > 0.1
    torch.testing.assert_close(states["ref"][1], off)  # B starts as zeros
    torch.testing.assert_close(states["merged"][1], on, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states["merged and off"][1], off, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states["on again"][1], on, rtol=1e-5, atol=1e-5)


class FixedMask(torch.nn.Module):
    """Dropout that drops the same features at every call, whatever the shape before them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (torch.arange(x.shape[-1]) % 3 != 1) * 1.5


def test_dropout_acts_on_the_input_of_the_adapter_only() -> None:
    model, inputs = adapted(lora("lm_head", lora_dropout=0.3)).train(), batch()
    layer = model.get_base_model().lm_head
    assert isinstance(layer.lora_dropout["default"], torch.nn.Dropout)
    for each in model.modules():
        if isinstance(each, BaseTunerLayer):
            each.lora_dropout["default"] = FixedMask()
    want = scored_by_logits(model, inputs)
    want_grads = with_gradients(model, want, want.logps)
    add_fused_head(model.get_base_model(), outputs=("entropy",))
    got = model(**inputs, fused_lm_head=True)
    torch.testing.assert_close(got.log_probs, want.logps, rtol=1e-5, atol=1e-5)
    for name, grad in with_gradients(model, got, got.log_probs).items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=2e-5, msg=name)
    layer.lora_dropout["default"] = torch.nn.Identity()
    without = model(**inputs, fused_lm_head=True)
    assert (without.log_probs - got.log_probs).abs().max() > 0.01


class Sizes(TorchDispatchMode):
    """The shape of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each._is_view() is False:
                self.seen.add(tuple(each.shape))
        return result


@pytest.mark.parametrize("count", [1, 2])
def test_no_merged_weight_and_no_gradient_of_its_size(count: int) -> None:
    model, inputs = two_active() if count == 2 else adapted(lora("lm_head")), batch()
    base = model.get_base_model().lm_head.base_layer
    add_fused_head(model.get_base_model(), outputs=("entropy",))
    with Sizes() as eager:
        scored_by_logits(model, inputs).logps.sum().backward()
        model.get_base_model().lm_head.get_delta_weight("default")
    assert (VOCABULARY, base.in_features) in eager.seen  # what a merge makes is seen
    model.zero_grad()
    with Sizes() as sizes:
        out = model(**inputs, fused_lm_head=True)
        (out.log_probs + out.entropy).sum().backward()
    assert not any(shape[-2:] == (VOCABULARY, base.in_features) for shape in sizes.seen)
    assert base.weight.grad is None
    lora_b = model.get_base_model().lm_head.lora_B
    assert all(lora_b[name].weight.grad.any() for name in lora_b)


def test_what_stands_at_ignored_positions_does_not_reach_the_gradient_of_a() -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    hidden, a, b = leaf(5, 8), leaf(2, 8), leaf(11, 2)
    head = Head(leaf(11, 8), None, (Lora(a, b, None, 0.5, torch.nn.Identity()),))
    labels = torch.tensor([3, -100, 5, -100, 0])
    grads = []
    for garbage in (0.0, float("nan")):
        rows = hidden.masked_fill((labels == -100).unsqueeze(-1), garbage)
        out = score_rows(rows, head, labels, softcap=None, logit_scale=1.0, metrics=())
        grads.append(torch.autograd.grad(out.logps.sum(), [a, b]))
    for clean, dirty in zip(*grads, strict=True):
        assert torch.equal(clean, dirty)


def test_bf16_autocast_is_no_worse_than_pefts_own_forward() -> None:
    model, inputs = adapted(lora("lm_head")), batch()
    exact = scored_by_logits(model.double(), inputs).logps
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        want = scored_by_logits(model, inputs).logps
    add_fused_head(model.get_base_model())
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**inputs, fused_lm_head=True).log_probs
    got.sum().backward()
    assert got.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()


def test_float32_adapter_over_a_bfloat16_head_trains_in_float32() -> None:
    model = perturbed(peft.get_peft_model(make_model().bfloat16(), lora("lm_head")))
    inputs = batch()
    layer = model.get_base_model().lm_head
    assert layer.lora_A["default"].weight.dtype == torch.float32
    want = scored_by_logits(model, inputs).logps.float()
    exact = scored_by_logits(model.double(), inputs).logps
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    add_fused_head(model.get_base_model())
    got = model(**inputs, fused_lm_head=True).log_probs
    got.sum().backward()
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()
    for matrix in (layer.lora_A["default"], layer.lora_B["default"]):
        assert not torch.equal(matrix.weight.grad, matrix.weight.grad.bfloat16().float())


def quantised_head() -> Any:
    model = make_model()
    weight = (model.lm_head.weight.data * 100).to(torch.int8)
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "DoRA": (lambda: adapted(lora("lm_head", use_dora=True)), "with .*DoraLinearVariant"),
    "IA3": (
        lambda: adapted(peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])),
        r"got peft\.tuners\.ia3",
    ),
    "LoHa": (
        lambda: adapted(peft.LoHaConfig(r=2, target_modules=["lm_head"])),
        r"got peft\.tuners\.loha",
    ),
    "VeRA": (
        lambda: adapted(peft.VeraConfig(r=2, target_modules=["lm_head"])),
        r"got peft\.tuners\.vera",
    ),
    "AdaLoRA": (
        lambda: adapted(peft.AdaLoraConfig(target_modules=["lm_head"], total_step=10)),
        r"got peft\.tuners\.adalora",
    ),
    "quantised": (quantised_head, r"floating point; got torch\.int8 in Linear"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_low_rank_is_refused_by_name(name: str) -> None:
    make, why = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=rf"\(lm_head\) must be .*{why}.*lm_head"):
        read_head(model.get_output_embeddings())
    if name != "quantised":  # an adapter that is not in force changes nothing
        with model.disable_adapter():
            read_head(model.get_output_embeddings())


def test_an_old_peft_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr("fusedpo._head_adapter.READS_ADAPTERS", False)
    with pytest.raises(ValueError, match=r"needs peft>=0\.16\.0; got \d"):
        read_head(adapted(lora("lm_head")).get_output_embeddings())
    read_head(adapted(lora("v_proj")).get_output_embeddings())


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, about the bias
def test_zero3_shards_of_the_adapter_are_gathered_in_forward_and_again_in_backward(
    monkeypatch: Any,
) -> None:
    model, inputs = adapted(lora("lm_head", lora_bias=True)), batch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(scored_by_logits(model, inputs).logps.sum(), parameters)
    add_fused_head(model.get_base_model(), outputs=("entropy",))
    layer = model.get_base_model().lm_head
    sharded = [layer.base_layer.weight, *layer.lora_A.parameters(), *layer.lora_B.parameters()]
    gathered = shard_as_zero3(monkeypatch, sharded)
    out = model(**inputs, fused_lm_head=True)
    assert gathered == [4]  # weight, A, B and the bias of B
    got = torch.autograd.grad(out.log_probs.sum() + 0 * out.entropy.sum(), parameters)
    assert len(gathered) > 1
    assert all(p.numel() == 0 for p in sharded)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=2e-5)
