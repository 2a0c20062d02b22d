"""What became of the prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from fusedpo.tools.judge import Comparison
from fusedpo.tools.judge.statistics import flip_rate
from fusedpo.tools.pairs.choosing import Candidates, Choice


@dataclass(frozen=True)
class PairsReport:
    """How many pairs there are, and where the other prompts went; lengths in characters."""

    path: str  # of the pairs
    prompts: int
    samples: int
    sampled: int  # of the samples: made by this run
    empty: int  # samples without a text
    near_duplicates: int  # samples that are nearly another one of their prompt
    single: int  # prompts with fewer than two different answers left
    undecided: int  # prompts of which no answer beat another in both orders
    pairs: int
    comparisons: int
    asked: int  # replies that the judge gave to this run
    cached: int  # replies that were there
    unparsed: int  # comparisons of which a reply could not be read
    flip_rate: float | None  # share of the comparisons that turned with the order
    sample_length: float  # mean over all samples
    chosen_length: float | None
    rejected_length: float | None
    longer_chosen: float | None  # share of the pairs whose chosen answer is the longer one

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def render(self) -> str:
        lines = [
            f"{self.path}: {self.pairs} pairs from {self.prompts} prompts, {self.samples} samples "
            f"({self.sampled} made now)",
            f"  left out: {self.empty} empty samples, {self.near_duplicates} near-duplicates; "
            f"prompts: {self.single} without two answers, {self.undecided} undecided",
            f"  {self.comparisons} comparisons in both orders: flip rate {_share(self.flip_rate)}, "
            f"{self.unparsed} unparsed; {self.asked} replies asked for, {self.cached} from before",
        ]
        if self.chosen_length is not None and self.rejected_length is not None:
            lines.append(
                f"  characters: chosen {self.chosen_length:.0f}, rejected "
                f"{self.rejected_length:.0f}; the longer one was chosen in "
                f"{_share(self.longer_chosen)}"
            )
        return "\n".join(lines)


def summary(
    path: str,
    groups: Sequence[Candidates],
    comparisons: Sequence[Comparison],
    choices: Sequence[Choice],
    *,
    lengths: Sequence[int],
    sampled: int,
    asked: int,
    cached: int,
) -> PairsReport:
    """Count; `lengths` are those of all samples, in characters."""
    single = sum(len(group.kept) < 2 for group in groups)
    chosen = [len(each.chosen.completion) for each in choices]
    rejected = [len(each.rejected.completion) for each in choices]
    outcomes = Counter(each.outcome for each in comparisons)
    return PairsReport(
        path=path,
        prompts=len(groups),
        samples=len(lengths),
        sampled=sampled,
        empty=sum(group.empty for group in groups),
        near_duplicates=sum(group.near_duplicates for group in groups),
        single=single,
        undecided=len(groups) - single - len(choices),
        pairs=len(choices),
        comparisons=len(comparisons),
        asked=asked,
        cached=cached,
        unparsed=outcomes["unparsed"],
        flip_rate=flip_rate(comparisons),
        sample_length=fmean(lengths),
        chosen_length=fmean(chosen) if chosen else None,
        rejected_length=fmean(rejected) if rejected else None,
        longer_chosen=(
            fmean([c > r for c, r in zip(chosen, rejected, strict=True)]) if choices else None
        ),
    )


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"
