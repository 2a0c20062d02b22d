"""Token counts as a training by TRL has them: tokenised, split and cut by its rules.

TRL (1.14 and newer) tokenises the prompt, and the prompt with each completion. A completion starts
where the two first differ, which may be before the prompt's end. Only counts are kept: the ids of
a large data set need not fit into memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fusedpo.tools.formats import LabelledCompletion, Row

from .trl_rows import Parts, read_by_trl

TRUNCATION_MODES = ("keep_start", "keep_end")
_BATCH = 128  # rows; three texts each


@dataclass(frozen=True)
class Limit:
    """What DPOConfig calls max_length (None: no limit) and truncation_mode."""

    max_length: int | None
    truncation_mode: str = "keep_start"

    def __post_init__(self) -> None:
        length = self.max_length
        if length is not None and (isinstance(length, bool) or length < 1):
            raise ValueError(f"max_length must be at least 1, or None; got {length}.")
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode must be keep_start or keep_end; got {self.truncation_mode!r}."
            )


@dataclass(frozen=True)
class Encoded:
    """One row in tokens. Tuples have a value for each completion.

    Attributes:
        prompt: tokens of the prompt, without its end that TRL leaves out.
        completions: tokens of each completion.
        kept_prompt, kept: tokens of them that are left within max_length.
        left_out: the end of the prompt that is not the beginning of prompt + completion.
        ends: every completion holds the end-of-sequence token.
        double_bos: the sequence starts with two beginning-of-sequence tokens.
        same_when_cut: what is left of chosen and rejected is the same.
        error: why the row cannot be tokenised; the counts are 0 then.
    """

    prompt: int
    completions: tuple[int, ...]
    kept_prompt: tuple[int, ...]
    kept: tuple[int, ...]
    left_out: str = ""
    ends: bool = True
    double_bos: bool = False
    same_when_cut: bool = False
    error: str = ""


def encode(rows: Sequence[Row], tokenizer: Any, limit: Limit) -> list[Encoded]:
    """Tokenise rows as TRL's DPOTrainer does (labelled ones as its KTOTrainer does).

    Args:
        rows: from `fusedpo.tools.formats.read_rows`.
        tokenizer: a `transformers` tokenizer.
        limit: where sequences are cut.

    Returns:
        One `Encoded` for each row; where TRL does not read the row, as after a conversion.

    Raises:
        ValueError: labelled rows, and a truncation that KTOTrainer does not know.
    """
    labelled = any(isinstance(row.value, LabelledCompletion) for row in rows)
    if labelled and limit.truncation_mode != "keep_start":
        raise ValueError(
            "truncation_mode must be keep_start for labelled rows, as KTOTrainer has no other; got "
            f"{limit.truncation_mode!r}."
        )
    found: list[Encoded] = []
    for start in range(0, len(rows), _BATCH):
        texts = [_texts(read_by_trl(row), tokenizer) for row in rows[start : start + _BATCH]]
        ids = _ids(texts, tokenizer)
        for each in texts:
            if each.error:
                nothing = (0,) * each.completions
                found.append(Encoded(0, nothing, nothing, nothing, error=each.error))
            else:
                taken = list(itertools.islice(ids, 1 + each.completions))
                found.append(_encoded(taken[0], taken[1:], tokenizer, limit))
    return found


@dataclass(frozen=True)
class _Texts:
    """What is tokenised of one row: the prompt, and the prompt with each completion."""

    completions: int
    texts: tuple[str, ...] = ()
    rendered: bool = False  # by the chat template, which writes the special tokens itself
    error: str = ""


def _texts(parts: Parts, tokenizer: Any) -> _Texts:
    count = len(parts.completions)
    if isinstance(parts.prompt, str):
        eos = tokenizer.eos_token
        if eos is None:
            return _Texts(count, error="the tokenizer has no end-of-sequence token")
        plain = [str(each) for each in parts.completions]
        ended = [each if each.endswith(eos) else f"{each}{eos}" for each in plain]
        return _Texts(count, (parts.prompt, *(parts.prompt + each for each in ended)))
    prompt = list(parts.prompt)
    conversations = [[*prompt, *each] for each in parts.completions if not isinstance(each, str)]
    render = tokenizer.apply_chat_template
    try:
        texts = (
            render(prompt, tokenize=False, add_generation_prompt=True),
            *(render(each, tokenize=False) for each in conversations),
        )
    except Exception as error:  # templates raise what they like
        return _Texts(count, error=str(error).strip().partition("\n")[0] or type(error).__name__)
    return _Texts(count, texts, rendered=True)


def _ids(texts: Sequence[_Texts], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of all texts in order; rows of one kind are tokenised together."""
    for rendered, group in itertools.groupby(texts, key=lambda each: each.rendered):
        flat = [text for each in group for text in each.texts]
        if flat:
            yield from tokenizer(
                flat,
                add_special_tokens=not rendered,
                return_attention_mask=False,
                verbose=False,  # of texts beyond the model's length we tell more
            )["input_ids"]


def _encoded(
    prompt: list[int], sequences: list[list[int]], tokenizer: Any, limit: Limit
) -> Encoded:
    length = min(_common_prefix(prompt, sequence) for sequence in sequences)
    cuts = [_cut(len(sequence), limit) for sequence in sequences]
    kept = [sequence[start:stop] for sequence, (start, stop) in zip(sequences, cuts, strict=True)]
    bos = tokenizer.bos_token_id
    return Encoded(
        prompt=length,
        completions=tuple(len(sequence) - length for sequence in sequences),
        kept_prompt=tuple(max(0, min(length, stop) - start) for start, stop in cuts),
        kept=tuple(max(0, stop - max(start, length)) for start, stop in cuts),
        left_out=tokenizer.decode(prompt[length:]) if length < len(prompt) else "",
        ends=all(tokenizer.eos_token_id in sequence[length:] for sequence in sequences),
        double_bos=bos is not None and sequences[0][:2] == [bos, bos],
        # For the one completion of a labelled row: first and last are the same.
        same_when_cut=kept[0] == kept[-1] and sequences[0] != sequences[-1],
    )


def _cut(length: int, limit: Limit) -> tuple[int, int]:
    """First and last + 1 position of a sequence that are left."""
    if limit.max_length is None or length <= limit.max_length:
        return 0, length
    if limit.truncation_mode == "keep_start":
        return 0, limit.max_length
    return length - limit.max_length, length


def _common_prefix(ids: list[int], other: list[int]) -> int:
    if other[: len(ids)] == ids:  # nearly always, and much faster
        return len(ids)
    pairs = zip(ids, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(other)))
