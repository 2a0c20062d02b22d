"""Every form of a verdict, and every reply that is none."""

from __future__ import annotations

import pytest
from fusedpo.tools.judge import parse_verdict


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("[[A]]", "A"),
        ("Both are fine, B is right.\n\n[[B]]", "B"),
        ("[[b]]", "B"),
        ("My verdict: [[C]].", "tie"),
        ("[[tie]]", "tie"),
        ("[[A]] because it is short. So: [[A]]", "A"),
        ("<think>[[B]]? No.</think>[[A]]", "A"),
        ('{"winner": "A"}', "A"),
        ('```json\n{"reason": "{x} is {y}", "verdict": "b"}\n```', "B"),
        ('{"preference": "tie", "confidence": 0.5}', "tie"),
        ('{"better": "Answer B"}', "B"),
        ("Verdict: A", "A"),
        ("**Verdict:** B\nIt is right.", "B"),
        ("Final verdict: **tie**\nBecause both are wrong.", "tie"),
        ("Winner: Answer A.", "A"),
        ("Preferred = response B", "B"),
        ("A", "A"),
        ("b.", "B"),
        ("(A)", "A"),
        ("**B**", "B"),
        ("Tie", "tie"),
        ("It is right and clear.\nAnswer A is better.", "A"),
        ("The winner is B", "B"),
        ("Option B wins!", "B"),
        ("[[A]]? Rather not. </think> [[B]]", "B"),
        ("<think>x</think> [[A]]? No.\n</think>\nB", "B"),
        ('{"winner": "C"}', "tie"),
        ('{"Winner": "A"}', "A"),
        ("It is right.\nAnswer: A", "A"),
        ("**Answer:** tie", "tie"),
    ],
)
def test_a_plain_verdict_is_read(reply: str, verdict: str) -> None:
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   \n",
        "I cannot judge this.",
        "Neither A nor B convinces.",
        "Answer A is not better.",
        "[[A]] or [[B]]?",
        "[[D]]",
        "Verdict: A\nVerdict: B",
        '{"winner": "A"} {"winner": "B"}',
        '{"winner": "A", "verdict": "B"}',
        '{"winner": 1}',
        '{"winner": "A"',
        "<think>[[A]] it seems",
        "[[A]] it seems </think>",
        "[[A]] </think> <think> [[A]]",
        '{"winner": "A", "Winner": "B"}',
        "C",
        "Answer: A or B",
        "A is better in style, B in content",
        "A\nis what I would have said, were it right",
        "AB",
        "1",
    ],
)
def test_what_leaves_a_doubt_is_no_verdict(reply: str) -> None:
    assert parse_verdict(reply) is None
