"""What max_length takes away, by TRL's rules."""

from __future__ import annotations

from ..corpus import Corpus
from ..registry import Hits, rule

_NEEDS = ("tokenizer", "max_length")


@rule(
    "warning",
    "Raise max_length, or leave long prompts out yourself. TRL drops these rows without a word.",
    needs=_NEEDS,
)
def dropped_by_max_length(corpus: Corpus) -> Hits | None:
    """The prompt alone fills max_length: with keep_start nothing of the completions is left."""
    notes = {
        index: f"the prompt has {corpus.encoded[index].prompt} tokens" for index in _dropped(corpus)
    }
    if not notes:
        return None
    what = f"The prompt alone fills max_length={corpus.limit.max_length}."
    return Hits(_longest_first(corpus, list(notes)), notes, what)


@rule(
    "warning",
    "Raise max_length, or shorten these rows. A completion that was cut has no end: the model "
    "does not learn to stop there.",
    needs=_NEEDS,
)
def cut_by_max_length(corpus: Corpus) -> Hits | None:
    """Tokens of a prompt or of a completion lie beyond max_length."""
    dropped = set(_dropped(corpus))
    notes, lost, total = {}, 0, 0
    cut_completions = 0
    for index, each in enumerate(corpus.encoded):
        total += sum(each.completions)
        if index in dropped:
            continue
        prompt = each.prompt - min(each.kept_prompt, default=0)
        sides = [have - kept for have, kept in zip(each.completions, each.kept, strict=True)]
        if prompt or any(sides):
            lost += sum(sides)
            cut_completions += sum(map(bool, sides))
            parts = [("prompt", prompt), *zip(corpus.sides, sides, strict=True)]
            notes[index] = "loses " + ", ".join(f"{n} tokens of {name}" for name, n in parts if n)
    if not notes:
        return None
    what = (
        f"max_length={corpus.limit.max_length} ({corpus.limit.truncation_mode}) cuts these rows; "
        f"completions that lose something: {cut_completions}, together {lost} of {total} tokens."
    )
    return Hits(_longest_first(corpus, list(notes)), notes, what, figures={"tokens": lost})


@rule(
    "warning",
    "Raise max_length, or leave these rows out: they are computed, and teach nothing.",
    needs=("pairs", *_NEEDS),
)
def same_when_cut(corpus: Corpus) -> Hits | None:
    """Chosen and rejected differ only in what max_length cuts off."""
    dropped = set(_dropped(corpus))
    rows = [
        index
        for index, each in enumerate(corpus.encoded)
        if each.same_when_cut and index not in dropped
    ]
    return Hits(rows) if rows else None


def _dropped(corpus: Corpus) -> list[int]:
    limit = corpus.limit
    if limit.max_length is None or limit.truncation_mode != "keep_start":
        return []
    return [index for index, each in enumerate(corpus.encoded) if each.prompt >= limit.max_length]


def _longest_first(corpus: Corpus, rows: list[int]) -> list[int]:
    encoded = corpus.encoded
    return sorted(rows, key=lambda index: -encoded[index].prompt - max(encoded[index].completions))
