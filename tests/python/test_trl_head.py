"""The fused head against the model's own forward: each way to shape logits, and sharded heads."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

import fusedpo._head as head_module
from fusedpo._head import add_fused_head, logit_transform
from fusedpo.reference import METRICS
from fusedpo.reference import token_logps as reference_token_logps
from trl_helpers import (
    FAMILIES,
    VOCABULARY,
    make_model,
    one_thread,  # noqa: F401  a fixture
    shard_as_zero3,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

B, T = 3, 11


def batch(seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCABULARY, (B, T), generator=generator)
    attention_mask = torch.ones(B, T, dtype=torch.int64)
    attention_mask[1, 8:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def scored_by_logits(model: Any, inputs: dict[str, torch.Tensor]) -> Any:
    logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return reference_token_logps(logits[:, :-1], inputs["labels"][:, 1:], metrics=METRICS)


@pytest.mark.parametrize("family", FAMILIES)  # one for each thing a config can do to the logits
def test_fused_head_equals_the_models_own_forward(family: str) -> None:
    model, inputs = make_model(family).eval(), batch()
    want = scored_by_logits(model, inputs)
    want.logps.sum().backward()
    want_grads = {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()

    add_fused_head(model, outputs=("log_probs", *METRICS))
    got = model(**inputs, fused_lm_head=True)
    got.log_probs.sum().backward()

    assert want.logps[inputs["labels"][:, 1:] != -100].std() > 0.1  # the logits do differ
    torch.testing.assert_close(got.log_probs, want.logps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.entropy, want.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.log_sum_sq_probs, want.log_sum_sq_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.mean_logits, want.mean_logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.is_top1, want.is_top1)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=2e-5, msg=name)


def test_positions_without_a_label_give_zero_and_metrics_not_asked_for_are_none() -> None:
    model, inputs = make_model(), batch()
    add_fused_head(model, outputs=("log_probs", "entropy"))
    out = model(**inputs, fused_lm_head=True)
    ignored = inputs["labels"][:, 1:] == -100
    assert ignored.any()
    assert (out.log_probs[ignored] == 0).all()
    assert (out.log_probs[~ignored] < 0).all()
    assert (out.entropy[ignored] == 0).all()
    assert out.log_sum_sq_probs is None
    assert out.mean_logits is None
    assert out.is_top1 is None


def test_prompt_and_padding_never_reach_the_product_with_the_head(monkeypatch: Any) -> None:
    rows: list[int] = []
    original = head_module.linear_token_logps

    def spy(
        hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, **options: Any
    ) -> Any:
        rows.append(int((labels != -100).sum()))
        # NaN in the rows that are left out would spread if any of them were multiplied.
        hidden = hidden.masked_fill((labels == -100).unsqueeze(-1), float("nan"))
        return original(hidden, weight, labels, **options)

    monkeypatch.setattr(head_module, "linear_token_logps", spy)
    model, inputs = make_model(), batch()
    add_fused_head(model)
    out = model(**inputs, fused_lm_head=True)
    out.log_probs.sum().backward()
    assert rows == [int((inputs["labels"][:, 1:] != -100).sum())]
    assert out.log_probs.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_without_fused_lm_head_the_forward_and_generate_are_unchanged() -> None:
    model, inputs = make_model().eval(), batch()
    with torch.no_grad():
        want = model(**inputs)
        want_ids = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
        add_fused_head(model)
        got = model(**inputs)
        got_ids = model.generate(inputs["input_ids"], max_new_tokens=5, do_sample=False)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.logits, want.logits)
    assert torch.equal(got_ids, want_ids)


def test_batch_without_any_label_gives_zero_gradients_not_none() -> None:
    model, inputs = make_model(), batch()
    add_fused_head(model)
    inputs["labels"].fill_(-100)
    model(**inputs, fused_lm_head=True).log_probs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_missing_labels_are_an_error_that_says_what_to_pass() -> None:
    model, inputs = make_model(), batch()
    add_fused_head(model)
    del inputs["labels"]
    with pytest.raises(ValueError, match="labels must be given with fused_lm_head=True"):
        model(**inputs, fused_lm_head=True)


def test_shifted_labels_are_refused_not_dropped() -> None:
    model, inputs = make_model(), batch()
    add_fused_head(model)
    with pytest.raises(ValueError, match="shift_labels must be None"):
        model(**inputs, shift_labels=inputs["labels"], fused_lm_head=True)


def test_mixture_of_experts_aux_loss_equals_the_models_own() -> None:
    model, inputs = make_model("mixtral").eval(), batch()
    want = model(**inputs, output_router_logits=True).aux_loss
    add_fused_head(model)
    got = model(**inputs, output_router_logits=True, fused_lm_head=True).aux_loss
    torch.testing.assert_close(got, want)
    assert model(**inputs, fused_lm_head=True).aux_loss is None


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({}, (None, 1.0)),
        ({"logit_scale": None}, (None, 1.0)),  # MPT: the name is there, unused
        ({"logit_scale": 0.0}, (None, 0.0)),
        ({"output_multiplier": 0.5, "final_logit_softcapping": 30.0}, (30.0, 0.5)),
        ({"lm_head_multiplier": 2.0}, (None, 2.0)),
        ({"logits_scaling": 8.0}, (None, 0.125)),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, (None, 8.0)),
    ],
)
def test_logit_transform_reads_every_spelling(fields: dict[str, Any], want: Any) -> None:
    assert logit_transform(types.SimpleNamespace(**{"model_type": "llama", **fields})) == want


@pytest.mark.parametrize("family", ["llama", "llama tied"])
def test_bf16_autocast_over_fp32_weights_follows_the_models_own_forward(family: str) -> None:
    model, inputs = make_model(family), batch()
    with torch.autocast("cpu", torch.bfloat16):
        want = scored_by_logits(model, inputs)
    exact = scored_by_logits(model, inputs)
    add_fused_head(model, outputs=("entropy",))
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**inputs, fused_lm_head=True)
    got.log_probs.sum().backward()
    assert got.log_probs.dtype == torch.float32
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32
    assert (got.log_probs - exact.logps).abs().max() <= 2 * (want.logps - exact.logps).abs().max()


def test_head_in_another_dtype_than_the_hidden_states_is_converted_outside_autocast() -> None:
    # Norms in fp32 in front of a head in bf16, as after peft's preparation for k-bit training.
    model, inputs = make_model(), batch()
    lm_head = model.get_output_embeddings().to(torch.bfloat16)
    add_fused_head(model)
    out = model(**inputs, fused_lm_head=True)
    out.log_probs.sum().backward()
    assert out.log_probs.dtype == torch.float32
    assert lm_head.weight.grad.dtype == torch.bfloat16
    assert lm_head.weight.grad.any()


@pytest.mark.parametrize("family", ["llama", "phi head with bias"])
def test_zero3_shards_are_gathered_in_forward_and_again_in_backward(
    family: str, monkeypatch: Any
) -> None:
    model, inputs = make_model(family), batch()
    parameters = list(model.parameters())
    want = torch.autograd.grad(scored_by_logits(model, inputs).logps.sum(), parameters)
    add_fused_head(model, outputs=("entropy",))
    lm_head = model.get_output_embeddings()
    full = [p for p in (lm_head.weight, lm_head.bias) if p is not None]
    gathered = shard_as_zero3(monkeypatch, full)
    out = model(**inputs, fused_lm_head=True)
    assert gathered == [len(full)]
    # A gradient for the entropy, too: it is the one that always needs the weight again.
    got = torch.autograd.grad(out.log_probs.sum() + 0 * out.entropy.sum(), parameters)
    assert len(gathered) > 1
    assert all(p.numel() == 0 for p in full)
    for parameter_got, parameter_want in zip(got, want, strict=True):
        torch.testing.assert_close(parameter_got, parameter_want, rtol=1e-4, atol=2e-5)
