"""Packed rows of any lengths: where each token is, and log-probs and gradients of padded rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="the fused head needs TRL")

from fusedpo._head import add_fused_head
from fusedpo._packing.attention import use_packed_attention
from fusedpo._packing.layout import Group, pack
from hypothesis import given, settings
from hypothesis import strategies as st
from packing_helpers import (
    assert_equal_gradients,
    backward,
    make_groups,
    packed_logps,
    padded,
    padded_logps,
    relative_difference,
    summed,
)
from test_packing_architectures import CASES, make
from trl_helpers import one_thread  # noqa: F401  a fixture

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]

EPS = torch.finfo(torch.float32).eps
# Grouped-query attention in all. Mistral has a window of 5 tokens; the last two have it in one of
# two layers, with a cap on the scores, and with attention sinks. All experts, because a choice
# between two that are equal but for rounding would be no property of the layout.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "gemma2": {},
    "gpt_oss": {"num_experts_per_tok": 4},
}

lengths = st.lists(
    st.tuples(st.integers(0, 9), st.lists(st.integers(0, 9), min_size=1, max_size=3)),
    min_size=1,
    max_size=5,
).filter(lambda groups: any(p + sum(completions) for p, completions in groups))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    found = make(*CASES[request.param], **MODELS[request.param])
    add_fused_head(found)
    use_packed_attention(found)
    return found


@given(lengths=lengths, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_lengths_give_log_probs_and_gradients_of_padded_rows(
    model: Any, lengths: Any, seed: int
) -> None:
    groups = make_groups(lengths, seed)
    plain = padded_logps(model, groups)
    want = backward(plain, model)
    got = packed_logps(model, groups)
    assert [len(each) for each in got] == [len(each) for each in plain]
    with torch.no_grad():
        batch = padded(groups)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    limit = 8 * EPS * (logits.abs().max() - summed(plain))
    assert ((summed(got) - summed(plain)).abs() <= limit).all()
    assert_equal_gradients(backward(got, model), want)


@given(lengths=lengths)
@settings(max_examples=60, deadline=None)
def test_layout_has_each_token_once_and_scores_it_from_the_one_before(lengths: Any) -> None:
    numbers = iter(range(10_000))
    groups = [
        Group(
            np.array([next(numbers) for _ in range(p)], np.int64),
            [np.array([next(numbers) for _ in range(c)], np.int64) for c in completions],
        )
        for p, completions in lengths
    ]
    row = pack(groups)
    ids = row.input_ids[0].tolist()
    assert ids == list(range(row.tokens))
    at, repeated, counts = 0, [], []
    for prompt, completions, _ in groups:
        for completion in completions:
            sequence = [*prompt.tolist(), *completion.tolist()]
            repeated += sequence
            assert [row.position_ids[0, token] for token in sequence] == list(range(len(sequence)))
            scored = sequence[max(len(prompt), 1) :]
            counts.append(len(scored))
            assert row.labels[at : at + len(scored)].tolist() == scored
            before = sequence[max(len(prompt), 1) - 1 : len(sequence) - 1]
            assert row.rows[at : at + len(scored)].tolist() == before[: len(scored)]
            at += len(scored)
    assert at == len(row.rows) == len(row.labels)
    assert row.counts == counts
    assert row.repeated().tolist() == repeated


def test_a_wrong_gradient_of_a_small_parameter_is_noticed() -> None:
    want = {"large": torch.ones(100), "small": torch.full((100,), 1e-3)}
    got = want | {"small": 1.005 * want["small"]}
    assert relative_difference(got, want) < 1e-5  # one norm over all does not see it
    with pytest.raises(AssertionError, match=r"small is off by 5\.00e-05"):
        assert_equal_gradients(got, want)
    assert_equal_gradients(want | {"small": want["small"] * (1 + 5e-6)}, want)
