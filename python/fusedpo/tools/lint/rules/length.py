"""Length as a cue: what a preference model learns first where one side tends to be longer."""

from __future__ import annotations

from ..corpus import Corpus
from ..registry import Hits, rule
from ..statistics import length_bias as measure

SMALL, MEDIUM = 0.2, 0.5  # Cohen's words for effect sizes
_ERRORS = 3.0  # standard errors from nothing: a few rows prove no bias
_NEARLY_ALL, _ENOUGH = 0.9, 10


@rule(
    "warning",
    "Watch the lengths of generations in training. Balance the pairs by length, or use a loss "
    "that divides by length (SimPO, `ld_alpha`, length-normalised DPO).",
    needs=("pairs",),
)
def length_bias(corpus: Corpus) -> Hits | None:
    """One side tends to be longer."""
    chosen, rejected = corpus.word_counts.T
    bias = measure(chosen, rejected)
    size = abs(bias.effect_size)
    clear = size >= SMALL and size * bias.pairs**0.5 >= _ERRORS
    share = max(bias.chosen_longer, bias.rejected_longer)
    if not clear and not (share >= _NEARLY_ALL and bias.pairs >= _ENOUGH):
        return None
    longer = "chosen" if bias.ratio > 1 else "rejected"
    more = chosen - rejected if longer == "chosen" else rejected - chosen
    rows = [int(index) for index in (-more).argsort(kind="stable") if more[index] > 0]
    strength = "strong" if size >= MEDIUM or share >= _NEARLY_ALL else "small"
    what = (
        f"{longer.capitalize()} tends to be longer: chosen is the longer one in "
        f"{bias.chosen_longer:.0%} of the pairs, {bias.ratio:.2f} times as long as rejected "
        f"(geometric mean); effect size {bias.effect_size:+.2f}, {strength}."
    )
    notes = {index: f"{chosen[index]} and {rejected[index]} words" for index in rows}
    figures = {"effect_size": bias.effect_size, "chosen_longer": bias.chosen_longer}
    return Hits(rows, notes, what, figures=figures)
