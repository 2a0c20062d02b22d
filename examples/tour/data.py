"""Writes what the tour begins with into the working directory: model/, feedback.jsonl,
prompts.jsonl, held_out.jsonl, and copies of the files beside this one.

The feedback is as a product would have it: one answer a line, thumbs up or down, and, on purpose,
with a few faults for `fusedpo lint` to find.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import sys
from typing import Any

PAIRS, PROMPTS, HELD_OUT = 200, 48, 12
WORDS, VOCABULARY = 400, 1200
STEPS, BATCH = 200, 16  # of the made-up model's training


def main() -> None:
    for name in ("judges.py", "train.yaml", "rounds.yaml"):
        shutil.copy(pathlib.Path(__file__).with_name(name), name)
    real = os.environ.get("FUSEDPO_REAL_DATA")
    rows = real_rows(pathlib.Path(real)) if real else made_up_rows()
    pairs, held_out = rows[:PAIRS], rows[PAIRS:]
    with open("feedback.jsonl", "w", encoding="utf-8") as file:
        for row in feedback(pairs):
            file.write(json.dumps(row) + "\n")
    for name, count, group in (
        ("prompts", PROMPTS, pairs),
        ("held_out", HELD_OUT, held_out),
    ):
        different = list(dict.fromkeys(row["prompt"] for row in group))[:count]
        with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
            for prompt in different:
                file.write(json.dumps({"prompt": prompt}) + "\n")


def feedback(pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Each pair as two rows; two of them twice, and one with the same text up and down."""
    faults = [pairs[3], pairs[5], {**pairs[8], "rejected": pairs[8]["chosen"]}]
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs + faults
        for side in ("chosen", "rejected")
    ]


def real_rows(folder: pathlib.Path) -> list[dict[str, str]]:
    model = pathlib.Path("model")
    if not model.exists():
        model.symlink_to((folder / "models" / "stories260K").resolve())
    path = folder / "preferences" / "tinystories-vs-260k.jsonl"
    with path.open(encoding="utf-8") as file:  # some texts contain U+2028: no splitlines
        rows = [json.loads(line) for line in file]
    known = {row["prompt"] for row in rows[:PAIRS]}
    return rows[:PAIRS] + [row for row in rows[PAIRS:] if row["prompt"] not in known]


def made_up_rows() -> list[dict[str, str]]:
    """Preferences in a made-up language, and a tiny model that has learnt to speak it."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    from demo_data import make_preferences, make_words, train_tokenizer

    words = make_words(WORDS)
    tokenizer = train_tokenizer(words, VOCABULARY)
    train_model([*make_preferences(words, 400, seed=1)], tokenizer)
    return make_preferences(words, PAIRS + HELD_OUT, seed=2)


def train_model(rows: list[dict[str, str]], tokenizer: Any) -> None:
    """Train a model on both answers of each row, so that it prefers neither, and save it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    random.seed(0)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    texts = [
        row["prompt"] + row[side] + tokenizer.eos_token
        for row in rows
        for side in ("chosen", "rejected")
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        batch = tokenizer(random.sample(texts, BATCH), padding=True, return_tensors="pt")
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            print(f"a tiny model learns the language: step {step + 1}, loss {loss.item():.2f}")
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")


if __name__ == "__main__":
    main()
