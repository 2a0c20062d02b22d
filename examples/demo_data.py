"""Preferences made in code for the demo: answers in a made-up language, one kind preferred over the
other.

The words are built from syllables, so that there are enough of them for a vocabulary of 32,000
tokens. A quarter of the words has a warm tone and a quarter a cold one; the preferred answer uses
more warm words than the rejected one. The model is never told which word is which, it has to find
out from the pairs.
"""

from __future__ import annotations

import random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_ONSETS = [*"bdfghjklmnprstvwz", "br", "dr", "fl", "gr", "kl", "pr", "sk", "st", "tr"]
_VOWELS = [*"aeiou", "ai", "au", "ei", "ou"]
_PROMPT_WORDS = 32
_ANSWER_WORDS = 36


def make_words(count: int) -> list[str]:
    """Return `count` different words, in an order that says nothing about them."""
    syllables = [onset + vowel for onset in _ONSETS for vowel in _VOWELS]
    words = [a + b for a in syllables for b in syllables][:count]
    random.Random(0).shuffle(words)
    if len(words) < count:
        raise ValueError(f"count must be at most {len(syllables) ** 2}; got {count}.")
    return words


def make_preferences(words: list[str], count: int, seed: int) -> list[dict[str, str]]:
    """Return `count` rows with prompt, chosen and rejected."""
    rng = random.Random(seed)
    quarter = len(words) // 4
    warm, cold, neutral = words[:quarter], words[quarter : 2 * quarter], words[2 * quarter :]

    def draw(group: list[str]) -> str:
        return group[int(len(group) * rng.random() ** 4)]  # some words are frequent, most are rare

    def answer(warm_share: float) -> str:
        tone = [draw(warm if rng.random() < warm_share else cold) for _ in range(_ANSWER_WORDS)]
        return " " + " ".join(w if rng.random() < 0.7 else draw(neutral) for w in tone) + " ."

    rows = []
    for _ in range(count):
        prompt = " ".join(draw(neutral) for _ in range(_PROMPT_WORDS)) + " ?"
        rows.append({"prompt": prompt, "chosen": answer(0.75), "rejected": answer(0.25)})
    return rows


def train_tokenizer(words: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `vocabulary` entries on the words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((" " + word for word in words), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
