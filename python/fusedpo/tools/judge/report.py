"""What a judging found, as data and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .comparison import Comparison
from .statistics import Interval, Lengths


@dataclass(frozen=True)
class JudgeReport:
    """Counts of comparisons, from the side of `a`; rates are shares between 0 and 1."""

    a: str
    b: str
    judge: str
    comparisons: int
    wins: int  # said in both orders
    losses: int
    ties: int  # neither won: said to be equal, identical, half or flipped
    unparsed: int  # at least one of the two replies could not be read
    flips: int  # of the ties: the answer in the same place won in both orders
    halves: int  # of the ties: decided in one order, a tie in the other
    identical: int  # of the ties: the same text, which nobody was asked about
    win_rate: float | None  # (wins + ties / 2) / (wins + losses + ties)
    interval: Interval | None  # 95 %, bootstrap over prompts
    flip_rate: float | None  # flips / (wins + losses + ties - identical)
    lengths: Lengths  # in characters
    asked: int  # replies that the judge gave now
    cached: int  # replies that were in the cache
    details: tuple[Comparison, ...]  # every comparison, in the order of `a`; not in as_dict

    def as_dict(self) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name != "details"}
        fields["interval"] = None if self.interval is None else list(self.interval)
        fields["lengths"] = self.lengths._asdict()
        return fields

    def render(self) -> str:
        return "\n".join(
            [
                f"{self.a} against {self.b}: {self.comparisons} comparisons, each in both orders, "
                f"by {self.judge}",
                f"  win {self.wins}, tie {self.ties}, loss {self.losses}, unparsed {self.unparsed}",
                f"  win rate {_share(self.win_rate)}{_interval(self.interval)}",
                f"  flip rate {_share(self.flip_rate)}: {self.flips} verdicts turned with the "
                f"order; {self.halves} became a tie, {self.identical} answers were identical",
                f"  characters: {self.lengths.a:.0f} against {self.lengths.b:.0f}"
                + self._winners(),
                f"  {self.asked} replies asked for, {self.cached} from the cache",
            ]
        )

    def _winners(self) -> str:
        if self.lengths.winners is None or self.lengths.losers is None:
            return ""
        return (
            f"; winners {self.lengths.winners:.0f}, losers {self.lengths.losers:.0f}"
            + f"; the longer one won {_share(self.lengths.longer_won)}"
        )


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def _interval(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f" (95 %: {100 * interval.low:.1f} to {100 * interval.high:.1f} %)"
