"""The estimate of KL(policy || reference), against the sum over all texts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.tools.train needs TRL")

from fusedpo.tools.train.kl import estimate_kl
from transformers import LlamaConfig, LlamaForCausalLM
from trl_helpers import lora, make_model, make_tokenizer

END, NEW = 1, 3  # the token that ends a text, and how many tokens there may be
VOCABULARY = 5


def small(seed: int) -> Any:
    """A model of so few tokens that every completion can be written down."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=1.0,
        eos_token_id=END,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


class Tokenizer:
    """Of prompts that are written as ids."""

    eos_token_id, pad_token_id = END, 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [int(each) for each in text.split()]}


def completions() -> list[tuple[int, ...]]:
    """Every completion: ended by END, or NEW tokens long."""
    others = [token for token in range(VOCABULARY) if token != END]
    ended = [(*start, END) for n in range(NEW) for start in itertools.product(others, repeat=n)]
    return ended + list(itertools.product(others, repeat=NEW))


@torch.no_grad()
def log_prob(model: Any, prompt: list[int], completion: tuple[int, ...]) -> float:
    ids = torch.tensor([[*prompt, *completion]])
    logps = model(ids).logits.double().log_softmax(dim=-1)[0, len(prompt) - 1 : -1]
    return float(logps.gather(1, torch.tensor(completion)[:, None]).sum())


def exact_kl(policy: Any, reference: Any, prompt: list[int]) -> float:
    total = 0.0
    for completion in completions():
        log_p = log_prob(policy, prompt, completion)
        total += math.exp(log_p) * (log_p - log_prob(reference, prompt, completion))
    return total


def test_the_estimate_agrees_with_the_sum_over_all_completions() -> None:
    policy, reference = small(0), small(1)
    prompts = [[2, 3], [4, 2, 2]]
    assert sum(math.exp(log_prob(policy, prompts[0], c)) for c in completions()) == pytest.approx(1)
    want = sum(exact_kl(policy, reference, prompt) for prompt in prompts) / 2
    texts = [" ".join(map(str, prompt)) for prompt in prompts] * 300
    got = estimate_kl(
        policy, reference, Tokenizer(), texts, max_new_tokens=NEW, batch_size=200, seed=3
    )
    assert want > 0.5
    assert got.standard_error < 0.1 * want
    assert abs(got.kl - want) < 4 * got.standard_error
    assert got.prompts == 600


def test_padding_and_the_other_rows_do_not_change_a_divergence() -> None:
    # With a policy that always says the same, the sampling is out of the game.
    policy, reference = small(0), small(1)
    policy.lm_head.weight.data *= 1000
    short, long = "2", "4 3 2 4 3"
    one_by_one = [
        estimate_kl(policy, reference, Tokenizer(), [p], max_new_tokens=NEW).kl
        for p in (short, long)
    ]
    both = estimate_kl(policy, reference, Tokenizer(), [long, short], max_new_tokens=NEW)
    assert both.kl == pytest.approx(sum(one_by_one) / 2, rel=1e-5)


def test_a_policy_that_is_the_reference_has_none() -> None:
    model = make_model()
    got = estimate_kl(model, make_model(), make_tokenizer(), ["who sees a tree ?"] * 3)
    assert got.kl == 0
    assert math.isnan(estimate_kl(model, model, make_tokenizer(), ["who"]).standard_error)


def test_an_adapter_is_compared_with_the_model_without_it() -> None:
    import peft

    model = peft.get_peft_model(make_model(), lora()).train()
    prompts = ["who sees a tree ?", "who paints the river ?"]
    tokenizer = make_tokenizer()
    assert estimate_kl(model, None, tokenizer, prompts, max_new_tokens=8).kl == 0
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    state = torch.get_rng_state()
    got = estimate_kl(model, None, tokenizer, prompts, max_new_tokens=8)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    merged = model.merge_and_unload()
    again = estimate_kl(merged, make_model(), tokenizer, prompts, max_new_tokens=8)
    assert got.kl == pytest.approx(again.kl, rel=1e-4)
    assert got.kl > 0.01


def test_completions_are_cut_at_half_of_the_positions_and_longer_prompts_left_out() -> None:
    prompts = [" ".join(["tree"] * count) for count in (3, 33)]
    got = estimate_kl(make_model(), make_model(seed=1), make_tokenizer(), prompts)
    assert (got.prompts, got.max_new_tokens) == (1, 32)
    with pytest.raises(ValueError, match="must leave room for 32 new tokens in the model's 64"):
        estimate_kl(make_model(), None, make_tokenizer(), prompts[1:])


def test_messages_go_through_the_chat_template() -> None:
    messages = [{"role": "user", "content": "who sees a tree ?"}]
    got = estimate_kl(
        make_model(), make_model(seed=1), make_tokenizer(), [messages], max_new_tokens=4
    )
    assert got.kl > 0
    assert got.tokens <= 4
