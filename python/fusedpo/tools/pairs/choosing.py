"""Which two of several answers to a prompt become a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

from fusedpo.tools.generate import Generation, Prompt
from fusedpo.tools.judge import Comparison, Question
from fusedpo.tools.judge.answers import plain_text
from fusedpo.tools.judge.statistics import SCORE


@dataclass
class Candidates:
    """The answers to one prompt that are worth comparing; a place is one in `kept`."""

    prompt: Prompt
    kept: list[Generation] = field(default_factory=list)
    empty: int = 0
    near_duplicates: int = 0

    @property
    def matches(self) -> list[tuple[int, int]]:
        """Every two places, once."""
        return list(combinations(range(len(self.kept)), 2))

    @property
    def questions(self) -> list[Question]:
        """For each of `matches` what the judge is asked."""
        prompt = plain_text(self.prompt)
        texts = [each.completion for each in self.kept]
        return [Question(prompt, texts[i], texts[j]) for i, j in self.matches]


class Choice(NamedTuple):
    """A pair that the judge stands by in both orders; scores are shares between 0 and 1."""

    prompt: Prompt
    chosen: Generation
    rejected: Generation
    chosen_score: float
    rejected_score: float


def candidates(
    generations: Sequence[Generation], n: int, near_duplicate: float
) -> list[Candidates]:
    """Return what is left of each prompt's `n` answers without the empty ones and those that are
    nearly one that comes before.

    Args:
        generations: n for each prompt, in the order of the prompts.
        n: answers to a prompt.
        near_duplicate: the likeness, in percent, from which on two answers are nearly the same:
            rapidfuzz's ratio, 100 minus the share of characters to insert or delete.
    """
    found = []
    for start in range(0, len(generations), n):
        group = Candidates(generations[start].prompt)
        for each in generations[start : start + n]:
            if not each.completion.strip():
                group.empty += 1
            elif any(_alike(each, other, near_duplicate) for other in group.kept):
                group.near_duplicates += 1
            else:
                group.kept.append(each)
        found.append(group)
    return found


def _alike(one: Generation, other: Generation, limit: float) -> bool:
    try:
        from rapidfuzz import fuzz
    except ImportError as error:
        raise ImportError(
            'finding near-duplicates needs rapidfuzz: pip install "fusedpo[tools]"'
        ) from error
    texts = one.completion.strip(), other.completion.strip()
    return bool(fuzz.ratio(*texts, score_cutoff=limit) >= limit)


def choose(group: Candidates, comparisons: Sequence[Comparison]) -> Choice | None:
    """Return the pair with the widest gap between the scores, among those of which one answer beat
    the other in both orders; None where no answer beat another.

    Args:
        group: answers to one prompt.
        comparisons: of `group.questions`.
    """
    scores = _scores(len(group.kept), group.matches, comparisons)
    best: Choice | None = None
    for (i, j), comparison in zip(group.matches, comparisons, strict=True):
        if comparison.outcome not in ("win", "loss"):
            continue
        win, lose = (i, j) if comparison.outcome == "win" else (j, i)
        choice = Choice(group.prompt, group.kept[win], group.kept[lose], scores[win], scores[lose])
        if best is None or _gap(choice) > _gap(best):
            best = choice
    return best


def _gap(choice: Choice) -> float:
    return choice.chosen_score - choice.rejected_score


def _scores(
    count: int, matches: Sequence[tuple[int, int]], comparisons: Sequence[Comparison]
) -> list[float]:
    """Each answer's share of wins, ties as half, over the comparisons that could be read."""
    won, played = [0.0] * count, [0] * count
    for (i, j), comparison in zip(matches, comparisons, strict=True):
        score = SCORE.get(comparison.outcome)
        if score is not None:
            won[i] += score
            won[j] += 1 - score
            played[i] += 1
            played[j] += 1
    return [w / p if p else 0.5 for w, p in zip(won, played, strict=True)]
