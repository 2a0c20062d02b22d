"""Data made to trigger each rule of `fusedpo lint`, and data on the border that must not.

The rows of a case follow clean ones, so that a rule is seen to find them among others.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CLEAN_TEXTS = (
    (
        "Name a use for an old newspaper.",
        "Wrap glasses in it before you move house.",
        "Old newspaper is paper that is no longer new.",
    ),
    (
        "Why is the sky blue at noon?",
        "Air scatters blue light more than red light.",
        "The sky is blue at noon.",
    ),
    (
        "How do I keep bread fresh?",
        "Freeze what you will not eat today.",
        "Bread is best when it is fresh, so eat it fresh.",
    ),
    (
        "What should I pack for a day of hiking?",
        "Water, a map, a rain jacket and something to eat.",
        "Pack what you would pack for hiking.",
    ),
    (
        "Explain what a hash table is.",
        "It finds a value by computing where its key must be.",
        "A hash table is a kind of table that has hashes.",
    ),
    (
        "Suggest a name for a small grey cat.",
        "Pebble would suit a small grey cat.",
        "Cats do not need names, they need food and water.",
    ),
    (
        "Which month has the fewest days?",
        "February has the fewest days of all months.",
        "I think it must be April or June.",
    ),
    (
        "Translate 'good night' into plain English.",
        "It is a wish that somebody may sleep well.",
        "It is what one says at night.",
    ),
)

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(template: str | None = CHAT, *, bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that was trained on the clean rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<pad>", "<eos>", "<s>", "<system>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((" ".join(texts) for texts in CLEAN_TEXTS), trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<s>"
    )
    fast.chat_template = template
    return fast


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def labelled(prompt: str, completion: str, label: bool) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def chat(prompt: str | Sequence[tuple[str, str]], chosen: str, rejected: str) -> dict[str, Any]:
    """A pair of messages; the prompt as one question, or as turns of (role, content)."""
    turns = [("user", prompt)] if isinstance(prompt, str) else prompt
    return {
        "prompt": [{"role": role, "content": content} for role, content in turns],
        "chosen": [answer(chosen)],
        "rejected": [answer(rejected)],
    }


def answer(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def of(kind: str, texts: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Rows of one kind: "strings", "messages" or "labels" (two of each)."""
    if kind == "strings":
        return [pair(prompt, " " + chosen, " " + rejected) for prompt, chosen, rejected in texts]
    if kind == "messages":
        return [chat(*each) for each in texts]
    return [
        row
        for index, (prompt, chosen, rejected) in enumerate(texts)
        for row in [labelled(prompt, " " + (chosen, rejected)[index % 2], index % 2 == 0)]
    ]


def write(path: pathlib.Path, rows: Sequence[dict[str, Any] | str]) -> pathlib.Path:
    """Write a .jsonl; a row that is a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Case:
    """Rows that a rule must find, and rows that it must not.

    Attributes:
        faulty, clean: rows that follow the clean texts, as `kind` has them.
        found: how many of `faulty` the rule finds; all, where it is not given.
        tokenizer: what `lint` gets, for the clean rows too.
        options: for `lint`.
    """

    faulty: Sequence[dict[str, Any] | str]
    clean: Sequence[dict[str, Any] | str]
    kind: str = "strings"
    found: int | None = None
    tokenizer: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


Q, A, B = "Where do penguins live?", " They live in the south.", " They live in a zoo."
C = " They live in the far south."
LONG_A = (
    "The committee met on Tuesday and agreed to repair the old bridge before winter, because the "
    "engineers had found rust in three of its pillars during their last visit."
)
LONG_B = LONG_A.replace("Tuesday", "Friday")
OTHER_WORDS = (
    "My grandmother bakes wonderful plum cakes every autumn; she never writes recipes down, yet "
    "each cake tastes exactly like those I ate when I was small."
)
FRENCH = (
    "Le comité s'est réuni mardi et a décidé de réparer le vieux pont avant l'hiver, parce que "
    "les ingénieurs avaient trouvé de la rouille dans trois de ses piliers."
)
ASKED = {"role": "user", "content": Q}
WORDY = " It is, as far as I can tell after some thought, so that this is indeed the case here."
LONG_Q = "What is the name of the longest river that flows through the city of Vienna?"
# A template that renders a prompt alone in another way than before an answer.
THINKING = CHAT.replace("<assistant>{% endif %}", "<assistant>thoughts{% endif %}")

CASES: dict[str, Case] = {
    "unreadable_rows": Case(
        faulty=['{"prompt": "x", "chosen": 3, "rejected": "y"}', "{not JSON"],
        clean=[pair(Q, A, B)],
    ),
    "empty_completions": Case(
        faulty=[pair(Q, "", B), pair(Q, A, " \n")],
        clean=[pair(Q, " x", B)],
    ),
    "identical_sides": Case(
        faulty=[pair(Q, A, A), pair(Q, A, A + "\n")],
        clean=[pair(Q, A, B), pair(Q, A, A[:-1])],
    ),
    "contradicting_pairs": Case(
        faulty=[pair(Q, A, B), pair(Q + " ", B, A)],
        clean=[
            pair(Q, A, B),
            pair("Where do pigs live?", B, A),
            pair(Q, B, C),
            pair(Q, A, A),
        ],
    ),
    "contradicting_labels": Case(
        kind="labels",
        faulty=[labelled(Q, A, True), labelled(Q, A, False), labelled(Q, A, True)],
        clean=[labelled(Q, A, True), labelled(Q, B, False), labelled("Where?", A, False)],
    ),
    "not_read_by_trl": Case(
        kind="messages",
        faulty=[
            {**chat(Q, A, B), "prompt": Q},
            {**chat(Q, A, B), "system": "Be brief."},
            {"chosen": [ASKED, answer(A)], "rejected": [ASKED, answer(B)], "prompt": [ASKED]},
            {**chat(Q, A, B), "chosen": answer(A)},
            {**chat(Q, A, B), "prompt": [{"from": "human", "value": Q}]},
        ],
        clean=[
            chat(Q, A, B),
            {"chosen": [ASKED, answer(A)], "rejected": [ASKED, answer(B)]},
            {**chat(Q, A, B), "prompt": [{**ASKED, "weight": 1}], "id": 1, "system": None},
        ],
    ),
    "white_space_alone": Case(
        faulty=[pair(Q, "if a:\n    b", "if a:\nb"), pair(Q, " They  live.", " They live.")],
        clean=[pair(Q, A, B), pair(Q, A, A), pair(Q, A, A + " \n"), pair(Q, "a\r\nb", "a\nb")],
    ),
    "repeats_but_for_white_space": Case(
        faulty=[
            pair(Q, "if a:\n    b", B),
            pair(Q, "if a:\nb", B),
            pair(Q, B, "if a:  b"),
            pair(Q.replace(" ", "  "), "if a:\n    b", B),
        ],
        found=3,
        clean=[pair(Q, A, B), pair(Q, A, B), pair(Q, B, A + " "), pair(Q, A, C)],
    ),
    "cannot_be_tokenised": Case(
        kind="messages",
        faulty=[chat([("system", "Be raised."), ("user", Q)], A, B)],
        clean=[chat(Q, A, B)],
        tokenizer={
            "template": "{% for m in messages if m['role'] == 'system' %}"
            "{{ raise_exception('no system messages here') }}{% endfor %}" + CHAT
        },
    ),
    "missing_eos": Case(
        kind="messages",
        faulty=[chat([("system", "no end"), ("user", Q)], A, B)],
        clean=[chat(Q, A, B)],
        tokenizer={
            "template": CHAT.replace(
                "<eos>", "{% if messages[0]['content'] != 'no end' %}<eos>{% endif %}"
            )
        },
    ),
    "empty_prompts": Case(faulty=[pair(" ", A, B)], clean=[pair("?", A, B)]),
    "circular_preferences": Case(
        faulty=[
            *(pair(Q, A, B), pair(Q, B, C), pair(Q, C, A)),
            pair(Q, C, " On ice."),  # leads from one circle to another, and is in neither
            *(pair(Q, " On ice.", " On rocks."), pair(Q, " On rocks.", " On land.")),
            pair(Q, " On land.", " On ice."),
        ],
        found=6,
        clean=[pair(Q, A, B), pair(Q, B, C), pair(Q, A, C), pair("Where?", C, A), pair(Q, B, A)],
    ),
    "duplicate_rows": Case(
        faulty=[pair(Q, A, B), pair(Q, A, B + " "), pair(Q, A, B)],
        found=2,
        clean=[pair(Q, A, B), pair(Q, B, A), pair("Where?", A, B)],
    ),
    "near_identical_sides": Case(
        faulty=[pair(Q, LONG_A, LONG_B)],
        clean=[pair(Q, LONG_A, LONG_A[: len(LONG_A) // 2]), pair(Q, A, A)],
    ),
    "unlike_sides": Case(
        faulty=[pair(Q, LONG_A, OTHER_WORDS)],
        clean=[pair(Q, LONG_A, f"{OTHER_WORDS} The committee agreed."), pair(Q, "Yes.", "No.")],
    ),
    "length_bias": Case(
        faulty=[pair(f"{Q} {i}", WORDY * (2 + i % 3), A) for i in range(30)],
        found=33,  # with three of the clean ones
        clean=[pair(f"{Q} {i}", *((WORDY, A) if i % 2 else (A, WORDY))) for i in range(30)],
    ),
    "unbalanced_labels": Case(
        kind="labels",
        faulty=[labelled(f"{Q} {i}", A, False) for i in range(9)],
        found=4,  # the good ones, which are too few
        clean=[labelled(Q, A, True), labelled(Q, B, False)],
    ),
    "prompt_at_start": Case(
        faulty=[
            pair(LONG_Q, f"{LONG_Q} The Danube.", B),
            pair(f"\n\nHuman: {LONG_Q}\n\nAssistant:", A, f" {LONG_Q} The Danube."),
        ],
        clean=[pair(LONG_Q, " The Danube.", B), pair("Hi!", "Hi! Welcome back.", B)],
    ),
    "turn_marks": Case(
        faulty=[
            pair(Q, A + "\n\nHuman: And bears?", B),
            pair(Q, A, B + "<|im_end|>\n<|im_start|>user\nAnd bears?"),
        ],
        clean=[
            pair(f"\n\nHuman: {Q}\n\nAssistant:", A, B),
            pair(Q, A + "<|im_end|>", B),
            pair(Q, " Ask a Human: they know.", B),
        ],
    ),
    "odd_turns": Case(
        kind="messages",
        faulty=[
            chat([("user", "Hi there."), ("user", Q)], A, B),
            chat([("user", Q), ("system", "Be brief.")], A, B),
            chat([("user", "Hi."), ("system", "Be brief."), ("user", Q)], A, B),
        ],
        clean=[chat([("system", "Be brief."), ("user", Q)], A, B)],
    ),
    "prompt_is_no_prefix": Case(
        faulty=[pair("The answer: ", "They live there.", "They live in a zoo.")],
        clean=[pair("The answer:", " They live there.", " They live in a zoo.")],
        tokenizer={},
    ),
    "double_bos": Case(
        faulty=[pair(f"<s>{Q}", A, B)],
        clean=[pair(Q, A, B)],
        tokenizer={"bos": True},
    ),
    "dropped_by_max_length": Case(
        faulty=[pair(f"{Q} {LONG_A}", A, B)],
        clean=[pair(Q, LONG_A, B)],
        tokenizer={},
        options={"max_length": 60},
    ),
    "cut_by_max_length": Case(
        faulty=[pair(Q, LONG_A, B), pair(Q, A, LONG_A)],
        clean=[pair(Q, A, B), pair(f"{Q} {LONG_A}", A, B)],
        tokenizer={},
        options={"max_length": 60},
    ),
    "same_when_cut": Case(
        faulty=[pair(Q, LONG_A, LONG_A + " And then?")],
        clean=[pair(Q, LONG_A, OTHER_WORDS), pair(f"{Q} {LONG_A}", A, B), pair(Q, A, A)],
        tokenizer={},
        options={"max_length": 60},
    ),
    "language_differs": Case(
        faulty=[pair(Q, LONG_A, FRENCH), pair(Q, FRENCH, LONG_A)],
        clean=[pair(Q, FRENCH, FRENCH + " Voilà."), pair(Q, LONG_A, " Oui.")],
    ),
    "suspicious_characters": Case(
        faulty=[
            pair(Q, A + "\x00", B),
            pair(Q, " Caf\ufffd", B),
            pair(Q + "\u200b", A, B),
            pair(Q, A, " \u202etxt.exe"),
            pair(Q, " One line\u2028another", B),
            pair(Q, A, " \ue123 penguins"),
            pair(Q, " In CafÃ© Central.", B),
            pair(Q, A, " Donâ€™t ask me."),
            pair(Q, " Salt &amp; pepper.", B),
        ],
        clean=[pair(Q, " Café — “naïve” 中文 👩\u200d👧 \t x\r\n", " Salt & pepper; AT&T; a â b.")],
    ),
    "short_completions": Case(
        faulty=[pair(Q, " South.", B), pair(Q, A, " A zoo!"), pair(Q, " 不。", B)],
        clean=[pair(Q, " In the south.", B), pair(Q, A, ""), pair(Q, " 不知道。", B)],
    ),
    "duplicate_prompts": Case(
        faulty=[pair(Q, A, B), pair(Q, A, " On ice.")],
        clean=[pair(Q, A, B), pair("Where do bears live?", A, B)],
    ),
    "prompt_inside": Case(
        faulty=[pair(LONG_Q, f" You ask: {LONG_Q} It is the Danube.", B)],
        clean=[pair(LONG_Q, f"{LONG_Q} The Danube.", B), pair("Hi!", " You said Hi! to me.", B)],
    ),
    "mixed_languages": Case(
        faulty=[pair(Q, FRENCH, B)],
        clean=[pair(Q, LONG_A, B), pair(Q, A, " Oui.")],
    ),
    "other_columns": Case(
        faulty=[{**pair(Q, A, B), "tools": "[]"}],
        clean=[pair(Q, A, B)],
    ),
}
