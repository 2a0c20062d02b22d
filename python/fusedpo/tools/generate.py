"""Completions of a model for a list of prompts, by transformers' `generate`: batched, left padded,
and the same ones whatever else is in the batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from fusedpo.tools.models import load_model, ready_to_generate, tokenizer_of
from fusedpo.tools.sampling import Sampling, stream_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Message = dict[str, str]
Prompt = str | list[Message]


@dataclass(frozen=True)
class Generation:
    """One completion of one prompt.

    Attributes:
        prompt: as it was given: text, or a list of messages.
        completion: the new text alone, without special tokens.
        index: which sample of its prompt it is, from 0 to n - 1.
        num_tokens: tokens that were generated; the one that ends the text counts.
        truncated: it was cut at `max_new_tokens`, before the model ended it.
    """

    prompt: Prompt
    completion: str
    index: int = 0
    num_tokens: int = 0
    truncated: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def generate(
    model: str | os.PathLike[str] | PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    adapter: str | os.PathLike[str] | None = None,
    n: int = 1,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    batch_size: int = 8,
    dtype: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[Generation]:
    """Sample `n` completions of every prompt.

    A sample depends on the model, `seed`, its own prompt, its index and the sampling options alone:
    not on `batch_size`, `n`, or the other prompts. (Padding moves the scores by a rounding error,
    which can turn a tie.) The model's `generation_config` is not used, but for the tokens that end
    a text: what is sampled is the model itself.

    Args:
        model: a folder or a name on the Hugging Face Hub, of a model or of a PEFT adapter; or a
            model object (its mode and settings are as before, afterwards).
        prompts: texts, or lists of messages, which the tokenizer's chat template turns into text.
        tokenizer: for a model object that does not tell where its tokenizer is.
        adapter: a PEFT adapter to put on a model that is named.
        n: samples for each prompt.
        max_new_tokens: a completion is cut there.
        temperature: 0 takes the likeliest token each time (greedy).
        top_p: only the likeliest tokens that together have that probability.
        top_k: only that many likeliest tokens; None: all.
        seed: another one gives other samples.
        batch_size: completions that are made at once; bounds the memory.
        dtype: "auto" (as saved), "float32", "bfloat16", "float16"; for a model that is named.
        progress: called with (completions made, all completions) after each batch.

    Returns:
        `len(prompts) * n` generations: first those of the first prompt, by index, and so on.

    Raises:
        ValueError: an option is out of its range, a prompt is empty or leaves no room for
            `max_new_tokens` in the model, or there are messages and no chat template.
    """
    sampling = Sampling(n, max_new_tokens, temperature, top_p, top_k, seed, batch_size)
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of prompts; got one text. Pass [prompt].")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt; got none.")
    if isinstance(model, (str, os.PathLike)):
        model, own = load_model(model, adapter=adapter, dtype=dtype)
        tokenizer = tokenizer or own
    elif adapter is not None:
        raise ValueError("adapter goes with a model that is named; put it on the model yourself.")
    tokenizer = tokenizer or tokenizer_of(model)
    texts, ids = check_prompts(model, tokenizer, prompts, max_new_tokens)

    samples = [(place, index) for place in range(len(prompts)) for index in range(n)]
    # Batches of like lengths have little padding; with the longest first, whether the memory
    # suffices shows at once.
    order = sorted(samples, key=lambda sample: (-len(ids[sample[0]]), sample))
    made: dict[tuple[int, int], Generation] = {}
    with ready_to_generate(model, tokenizer):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = [ids[place] for place, _ in batch]
            seeds = [stream_seed(seed, texts[place], index) for place, index in batch]
            for sample, row, new in zip(
                batch, rows, _complete(model, rows, sampling, seeds), strict=True
            ):
                ended, place = _ends(new, model), sample[0]
                made[sample] = Generation(
                    prompt=prompts[place],
                    completion=_new_text(row, new, tokenizer),
                    index=sample[1],
                    num_tokens=len(new),
                    truncated=not ended,
                )
            if progress is not None:
                progress(len(made), len(samples))
    return [made[sample] for sample in samples]


def check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
) -> tuple[list[str], list[list[int]]]:
    """Return the text and the token ids of each prompt.

    Raises:
        ValueError: a prompt that `generate` cannot take; the message has its place.
    """
    texts = [_as_text(prompt, tokenizer, place) for place, prompt in enumerate(prompts)]
    ids = [_encode(text, prompt, tokenizer) for text, prompt in zip(texts, prompts, strict=True)]
    _check_lengths(ids, model, max_new_tokens)
    return texts, ids


def _as_text(prompt: Prompt, tokenizer: Any, place: int) -> str:
    if isinstance(prompt, str):
        text = prompt
    elif tokenizer.chat_template is None:
        raise ValueError(
            f"prompt {place} is a list of messages, which need a tokenizer with a chat template; "
            "this one has none. Pass text, or set tokenizer.chat_template."
        )
    else:
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    if not text:
        raise ValueError(f"prompt {place} must not be empty.")
    return text


def _encode(text: str, prompt: Prompt, tokenizer: Any) -> list[int]:
    # A chat template writes the special tokens itself.
    ids: list[int] = tokenizer(text, add_special_tokens=isinstance(prompt, str))["input_ids"]
    return ids


def _check_lengths(ids: Sequence[Sequence[int]], model: Any, max_new_tokens: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(ids)), key=lambda place: len(ids[place]))
    if positions is not None and len(ids[longest]) + max_new_tokens > positions:
        raise ValueError(
            f"prompt and max_new_tokens must fit into the model's {positions} positions; prompt "
            f"{longest} has {len(ids[longest])} tokens, and max_new_tokens is {max_new_tokens}. "
            "Use fewer new tokens, or leave out the long prompts."
        )


def _complete(
    model: Any, rows: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
) -> list[list[int]]:
    """Return the new token ids of each row, up to and with the one that ends it."""
    width = max(map(len, rows))
    config = model.generation_config
    inputs = torch.full((len(rows), width), config.pad_token_id)
    mask = torch.zeros_like(inputs)
    for row, (row_ids, row_mask) in zip(rows, zip(inputs, mask, strict=True), strict=True):
        row_ids[width - len(row) :] = torch.tensor(row)
        row_mask[width - len(row) :] = 1
    output = model.generate(
        input_ids=inputs.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=sampling.max_new_tokens,
        logits_processor=sampling.processors(seeds),
    )
    return [_until_end(new, model) for new in output[:, width:].tolist()]


def _until_end(new: list[int], model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id or []
    stop = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
    return new[:stop]


def _ends(new: list[int], model: Any) -> bool:
    return new[-1] in (model.generation_config.eos_token_id or [])


def _new_text(prompt_ids: Sequence[int], new: list[int], tokenizer: Any) -> str:
    """The text after the prompt. Decoded together with it, because many tokenizers drop the space
    at the beginning of what they decode."""
    before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
    both = tokenizer.decode([*prompt_ids, *new], skip_special_tokens=True)
    alone: str = tokenizer.decode(new, skip_special_tokens=True)
    return both[len(before) :] if both.startswith(before) else alone
