"""The chat template and the special tokens: what the tokenizer makes of the rows."""

from __future__ import annotations

import itertools

from ..corpus import Corpus
from ..registry import Hits, rule
from ..trl_rows import why_not


@rule(
    "warning",
    "Run `fusedpo convert IN OUT --to conversational` (of labelled rows `--to unpaired`) and train "
    "on that; tokens are counted as after it. `fusedpo train` reads these rows as they are.",
)
def not_read_by_trl(corpus: Corpus) -> Hits | None:
    """TRL does not read rows of this form, or reads something else in them."""
    reasons = {index: why_not(entry.row) for index, entry in enumerate(corpus.entries)}
    notes = {index: reason for index, reason in reasons.items() if reason}
    return Hits(list(notes), notes) if notes else None


@rule(
    "error",
    "Give the tokenizer a chat template that takes these messages, or convert the rows to "
    "strings (`fusedpo convert`). A training would stop here.",
    needs=("tokenizer",),
)
def cannot_be_tokenised(corpus: Corpus) -> Hits | None:
    """The chat template refuses a row, or the tokenizer lacks what TRL needs."""
    notes = {index: each.error for index, each in enumerate(corpus.encoded) if each.error}
    return Hits(list(notes), notes) if notes else None


@rule(
    "warning",
    "Use a chat template that renders a prompt alone as it does with an answer, or end prompts "
    "where a token ends (no blank at the end: put it before the answer). TRL leaves the end of "
    "the prompt out, so the model is trained on another context than it will see.",
    needs=("tokenizer",),
)
def prompt_is_no_prefix(corpus: Corpus) -> Hits | None:
    """The prompt's tokens are not the beginning of those of prompt and completion."""
    notes = {
        index: f"left out: {each.left_out!r}"
        for index, each in enumerate(corpus.encoded)
        if each.left_out
    }
    return Hits(list(notes), notes) if notes else None


@rule(
    "error",
    "Let the chat template end an answer with the tokenizer's eos_token, or set eos_token to "
    "what the template writes there. The model would not learn to stop.",
    needs=("tokenizer",),
)
def missing_eos(corpus: Corpus) -> Hits | None:
    """A completion does not hold the end-of-sequence token."""
    rows = [index for index, each in enumerate(corpus.encoded) if not each.ends]
    return Hits(rows) if rows else None


@rule(
    "warning",
    "Take the token out of the texts: the tokenizer adds it itself.",
    needs=("tokenizer",),
)
def double_bos(corpus: Corpus) -> Hits | None:
    """A sequence starts with two beginning-of-sequence tokens."""
    rows = [index for index, each in enumerate(corpus.encoded) if each.double_bos]
    notes = {index: corpus.entries[index].prompt for index in rows}
    return Hits(rows, notes) if rows else None


@rule(
    "warning",
    "Join messages of one role, put the system message first, and have a user's last in the "
    "prompt. Many chat templates refuse anything else, or render it wrongly.",
    needs=("messages",),
)
def odd_turns(corpus: Corpus) -> Hits | None:
    """Roles do not take turns: one twice in a row, a late system message, nobody who asks."""
    notes = {}
    for index, entry in enumerate(corpus.entries):
        if isinstance(entry.row.value.prompt, str):
            continue
        roles = [message["role"] for message in entry.row.value.prompt]
        if not roles or roles[-1] != "user":
            notes[index] = f"the prompt ends with {roles[-1] if roles else 'nothing'}"
        elif "system" in roles[1:]:
            notes[index] = "a system message that is not the first"
        elif any(one == next_one for one, next_one in itertools.pairwise(roles)):
            notes[index] = "one role twice in a row: " + ", ".join(roles)
    return Hits(list(notes), notes) if notes else None
