"""How far a policy has moved from its reference: KL(policy || reference), from samples.

    KL = E over x, y ~ policy of  sum_t KL(policy(. | x, y_<t) || reference(. | x, y_<t))

The policy writes a completion y of every prompt x, and at each of its tokens the divergence of the
two distributions of the next token is formed exactly, over the vocabulary. Its sum is an unbiased
estimate, as is the plain log ratio of y, with far less noise: a policy that is the reference gives
0, not a number around it. Completions end at `max_new_tokens`: it is the divergence of texts that
are cut there, and that of whole texts is no smaller.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

LIMIT = 10.0  # nats; past it a report warns
NOT_FINITE = "the policy's logits are not finite"


@dataclass(frozen=True)
class KLEstimate:
    """KL(policy || reference) per completion, in nats.

    Attributes:
        kl: the mean over the prompts.
        standard_error: of that mean, from the spread between prompts; NaN with one prompt.
        prompts: how many, with one sampled completion each.
        tokens: sampled, all completions together.
        max_new_tokens: where completions were cut.
    """

    kl: float
    standard_error: float
    prompts: int
    tokens: int
    max_new_tokens: int

    def as_dict(self) -> dict[str, float | int]:
        """Return the fields."""
        return asdict(self)

    def __str__(self) -> str:
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2g}"
        return f"{self.kl:.4g}{error} nats per completion of at most {self.max_new_tokens} tokens"


def estimate_kl(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    seed: int = 0,
) -> KLEstimate:
    """Estimate KL(policy || reference) on completions that the policy samples.

    Args:
        policy: a causal language model; a PeftModel, too.
        reference: another one on the same device; None: the policy without its adapter.
        tokenizer: of both.
        prompts: texts or lists of messages.
        max_new_tokens: a completion is cut there, or at half of the model's positions.
        batch_size: completions at once. Logits [batch_size, max_new_tokens, V] of both models are
            in memory.
        seed: of the sampling; torch's own random state stays as it was.

    Raises:
        ValueError: there are no prompts, or none leaves room for a completion; or the policy's
            logits are not finite.

    Example:

        estimate_kl(model, reference, tokenizer, ["Once upon a time", "A dog"]).kl
    """
    ids = [_encode(prompt, tokenizer) for prompt in prompts]
    positions = getattr(policy.config.get_text_config(), "max_position_embeddings", sys.maxsize)
    max_new_tokens = min(max_new_tokens, positions // 2)
    ids = [each for each in ids if each and len(each) + max_new_tokens <= positions]
    if not ids:
        raise ValueError(
            f"at least one prompt must leave room for {max_new_tokens} new tokens in the model's "
            f"{positions} positions; of {len(prompts)} prompts none does."
        )
    ids.sort(key=len)  # little padding
    sums: list[float] = []
    tokens = 0
    devices = [policy.device] if policy.device.type != "cpu" else []
    with torch.random.fork_rng(devices), torch.no_grad(), _evaluating(policy, reference):
        torch.manual_seed(seed)
        first = policy(input_ids=torch.tensor(ids[:1], device=policy.device)).logits
        if not first.isfinite().all():  # sampling from them can end a CUDA process
            raise ValueError(NOT_FINITE)
        for start in range(0, len(ids), batch_size):
            batch = ids[start : start + batch_size]
            sampled, attention, counted = _sample(policy, tokenizer, batch, max_new_tokens)
            divergence = _divergences(policy, reference, sampled, attention, counted)
            sums += divergence.tolist()
            tokens += int(counted.sum())
    values = torch.tensor(sums, dtype=torch.float64)
    error = float(values.std() / math.sqrt(len(sums))) if len(sums) > 1 else math.nan
    return KLEstimate(float(values.mean()), error, len(sums), tokens, max_new_tokens)


def _encode(prompt: Any, tokenizer: Any) -> list[int]:
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt)["input_ids"]
        # As in training, where nothing ends a prompt.
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    encoded: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return encoded


def _sample(
    policy: Any, tokenizer: Any, batch: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids [B, T] with the prompts padded on the left, what to attend to [B, T], and which of
    the new tokens count [B, new]: up to and with the one that ends a text."""
    from transformers import GenerationConfig

    width = max(map(len, batch))
    pad = tokenizer.pad_token_id
    pad = tokenizer.eos_token_id if pad is None else pad
    ids = torch.full((len(batch), width), 0 if pad is None else pad)
    attention = torch.zeros_like(ids)
    for row, each in enumerate(batch):
        ids[row, width - len(each) :] = torch.tensor(each)
        attention[row, width - len(each) :] = 1
    ids, attention = ids.to(policy.device), attention.to(policy.device)
    ends = policy.generation_config.eos_token_id
    # The policy itself is sampled: no top_k, no temperature, whatever its own config says.
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=width + max_new_tokens,
        eos_token_id=ends,
        pad_token_id=pad,
    )
    sampled = policy.generate(input_ids=ids, attention_mask=attention, generation_config=config)
    new = sampled[:, width:]
    ends = torch.tensor([] if ends is None else ends, device=new.device).flatten()
    ended = torch.isin(new, ends).cumsum(dim=1)
    counted = ended - torch.isin(new, ends).to(ended.dtype) == 0
    return sampled, torch.cat([attention, counted.to(attention.dtype)], dim=1), counted


def _divergences(
    policy: Any, reference: Any, sampled: Tensor, attention: Tensor, counted: Tensor
) -> Tensor:
    """Return sum_t KL_t of each completion [B], in nats."""
    new = counted.shape[1]
    inputs = {
        "input_ids": sampled[:, :-1],
        "attention_mask": attention[:, :-1],
        "position_ids": (attention.cumsum(dim=1) - 1).clamp(min=0)[:, :-1],
        "logits_to_keep": new,
        "use_cache": False,
    }
    log_p = policy(**inputs).logits
    with contextlib.nullcontext() if reference is not None else policy.disable_adapter():
        log_q = (policy if reference is None else reference)(**inputs).logits
    rows = []
    for p, q in zip(log_p, log_q, strict=True):  # one at a time: [new, V] in fp64
        p, q = p.double().log_softmax(dim=-1), q.double().log_softmax(dim=-1)
        rows.append((p.exp() * (p - q)).sum(dim=-1))
    return (torch.stack(rows) * counted).sum(dim=1)


@contextlib.contextmanager
def _evaluating(*models: Any) -> Iterator[None]:
    """Without dropout, for a while."""
    found = [model for model in models if model is not None]
    training = [model.training for model in found]
    for model in found:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(found, training, strict=True):
            model.train(mode)
