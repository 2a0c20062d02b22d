"""Precomputing with each prompt computed once: the values of padded batches, from fewer tokens."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", reason="precompute tokenises with TRL")

import transformers
from fusedpo import RefStore, precompute
from fusedpo._head import add_fused_head
from fusedpo._packing.attention import use_packed_attention
from fusedpo._packing.names import takes_packed_rows
from fusedpo._precompute.records import Record, index_records, plan_batches, tokens_of
from fusedpo._precompute.scoring import score, scoring_mode
from precompute_helpers import contents, write_inputs, write_pairs
from test_precompute_plan import Rows
from trl_helpers import make_model, make_pairs, make_tokenizer, one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {"max_tokens_per_batch": 200, "autocast": "no"}


def ranked_rows(count: int = 60, seed: int = 0) -> list[list[tuple[list[int], list[int]]]]:
    """Four completions of each prompt, of lengths far apart."""
    numbers = np.random.default_rng(seed)

    def ids(least: int, most: int) -> list[int]:
        tokens: list[int] = numbers.integers(5, 90, numbers.integers(least, most + 1)).tolist()
        return tokens

    prompts = [ids(0, 30) for _ in range(count)]
    return [[(prompt, ids(1, 12)) for _ in range(4)] for prompt in prompts]


@pytest.mark.parametrize("max_tokens", [1, 64, 256, 10**6])
def test_packed_batches_keep_to_the_budget_and_hold_more(max_tokens: int) -> None:
    rows = ranked_rows()
    source = Rows(rows)
    index = index_records(source)
    records = source.records(range(len(rows)))
    batches = plan_batches(index, max_tokens, packed=True)
    members = np.concatenate([batch.members for batch in batches])
    assert sorted(members) == list(range(len(index)))
    for batch in batches:
        of_batch = [records[index.record[i]] for i in batch.members]
        prompts = {record.prompt.tobytes(): len(record.prompt) for record in of_batch}
        computed = sum(prompts.values()) + sum(len(record.completion) for record in of_batch)
        assert computed == tokens_of(index, batch.members, packed=True)
        assert computed <= max_tokens or len(batch.members) == 1
    slots: dict[bytes, set[int]] = {}
    for batch in batches:
        for i in batch.members:
            slots.setdefault(index.group[i].tobytes(), set()).add(batch.slot)
    assert {len(each) for each in slots.values()} == {1}
    if max_tokens == 256:
        assert len(batches) < 0.7 * len(plan_batches(index, max_tokens))


def test_several_completions_and_single_ones_score_as_in_padded_batches() -> None:
    rows = ranked_rows(6)
    records = [
        Record(np.array(prompt, np.int64), np.array(completion, np.int64))
        for row in rows
        for prompt, completion in row[: 1 + len(row[0][0]) % 4]
    ]
    records = [record for record in records if record.num_tokens]
    records = records[::2] + records[1::2]  # completions of a prompt need not be neighbours
    model = make_model()
    add_fused_head(model)
    with scoring_mode(model, None, inference_mode=True):
        want = score(model, records, 0)
        use_packed_attention(model)
        got = score(model, records, 0)
    assert [len(each) for each in got] == [record.num_tokens for record in records]
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def unpaired(folder: pathlib.Path) -> str:
    rows = [
        {"prompt": row["prompt"], "completion": row[name]}
        for row in make_pairs(30)
        for name in ("chosen", "rejected")
    ]
    return write_pairs(folder / "unpaired.jsonl", rows)


@pytest.mark.parametrize("kind", ["pairs", "single completions"])
def test_both_layouts_fill_a_store_with_the_same_values(kind: str, tmp_path: pathlib.Path) -> None:
    model, data = write_inputs(tmp_path, rows=30)
    if kind != "pairs":
        data = unpaired(tmp_path)
    paths = [str(tmp_path / name) for name in ("packed", "padded")]
    packed = precompute(model, data, paths[0], share_prompts=True, **SMALL)
    padded = precompute(model, data, paths[1], share_prompts=False, **SMALL)
    assert packed.tokens == padded.tokens
    assert packed.padded == padded.padded == padded.computed >= padded.tokens
    assert packed.computed < 0.8 * packed.padded
    assert packed.computed < packed.tokens  # prompts count once
    got, want = contents(paths[0]), contents(paths[1])
    assert got.keys() == want.keys()
    for key, value in want.items():
        # 8 eps (sum |logp_t| + max |z|), with logits up to 10
        assert abs(got[key] - value) <= 8 * np.finfo(np.float32).eps * (abs(value) + 10)
    # One belongs to the other's reference, and finds all that it has.
    again = precompute(model, data, paths[0], share_prompts=False, **SMALL)
    assert again.scored == 0


def bloom() -> Any:
    config = transformers.BloomConfig(vocab_size=96, hidden_size=16, n_layer=2, n_head=2)
    return transformers.BloomForCausalLM(config)


def test_model_that_is_not_exact_is_padded_with_the_reason_or_refused(
    tmp_path: pathlib.Path,
) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", make_pairs(4))
    options = SMALL | {"processing_class": make_tokenizer()}
    with pytest.raises(ValueError, match=r"share_prompts=True .*BloomAttention"):
        precompute(bloom(), data, tmp_path / "refs", share_prompts=True, **options)
    assert not (tmp_path / "refs").exists()
    report = precompute(bloom(), data, tmp_path / "refs", **options)
    assert "BloomAttention" in str(report.not_shared)
    assert report.computed == report.padded
    assert len(RefStore(tmp_path / "refs")) == report.records


@pytest.mark.parametrize("share", [True, False])
def test_a_model_that_is_passed_gets_its_attention_back(share: bool, tmp_path: Any) -> None:
    data = write_pairs(tmp_path / "pairs.jsonl", make_pairs(4))
    for packed_before in (False, True):
        model = make_model()
        if packed_before:
            use_packed_attention(model)
        path = tmp_path / f"refs-{packed_before}"
        options = SMALL | {"processing_class": make_tokenizer()}
        report = precompute(model, data, path, share_prompts=share, **options)
        assert (report.computed < report.padded) == share
        assert takes_packed_rows(model) == packed_before
