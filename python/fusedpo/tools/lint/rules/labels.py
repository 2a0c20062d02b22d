"""The labels of unpaired rows."""

from __future__ import annotations

from ..corpus import Corpus
from ..registry import Hits, rule

# Equation 8 of the KTO paper (arXiv 2402.01306): the weighted ratio should be within these.
LEAST, MOST = 1.0, 4 / 3


@rule(
    "warning",
    "Set desirable_weight or undesirable_weight of KTOConfig, so that weight times count of the "
    "good ones is 1 to 4/3 of that of the bad ones; with one label alone, get the other, or use "
    "SFT.",
    needs=("labels",),
)
def unbalanced_labels(corpus: Corpus) -> Hits | None:
    """There are many more good completions than bad ones, or fewer."""
    good = [index for index, entry in enumerate(corpus.entries) if entry.label]
    bad = [index for index, entry in enumerate(corpus.entries) if not entry.label]
    if LEAST * len(bad) <= len(good) <= MOST * len(bad):
        return None
    fewer = min(good, bad, key=len)
    weight = "no weight helps"
    if good and bad:
        weight = f"desirable_weight={len(bad) / len(good):.3g} would balance them"
    what = f"Good completions: {len(good)}, bad ones: {len(bad)}; {weight}."
    return Hits(fewer, what=what, figures={"good": len(good), "bad": len(bad)})
