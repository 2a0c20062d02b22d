"""The plan of batches: within the budget, pairs together, the same for every order of the rows."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from fusedpo._precompute.records import Batch, Record, RecordIndex, index_records, plan_batches


class Rows:
    """A data set in memory: each row a list of (prompt, completion)."""

    def __init__(self, rows: Sequence[Sequence[tuple[list[int], list[int]]]]) -> None:
        self.per_row = len(rows[0]) if rows else 2
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def records(self, rows: Sequence[int]) -> list[Record]:
        return [
            Record(np.array(prompt, np.int64), np.array(completion, np.int64))
            for row in rows
            for prompt, completion in self._rows[row]
        ]


def random_rows(count: int = 200, seed: int = 0) -> list[list[tuple[list[int], list[int]]]]:
    """Prompts come again, completions come again, some pairs come twice."""
    state = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [state.randrange(50) for _ in range(state.randint(least, most))]

    prompts = [ids(1, 30) for _ in range(count // 3)]
    rows = []
    for _ in range(count):
        prompt = state.choice(prompts)
        rows.append([(prompt, ids(1, 40)), (prompt, ids(1, 40))])
    return rows + rows[::7]


def contents(index: RecordIndex, batches: list[Batch]) -> list[tuple[int, tuple[bytes, ...]]]:
    return [(b.slot, tuple(index.keys[i].tobytes() for i in b.members)) for b in batches]


def test_every_record_is_in_one_batch_and_only_in_one() -> None:
    index = index_records(Rows(random_rows()))
    batches = plan_batches(index, 256)
    members = np.concatenate([batch.members for batch in batches])
    assert sorted(members) == list(range(len(index)))
    assert len({key.tobytes() for key in index.keys}) == len(index)


@pytest.mark.parametrize("max_tokens", [1, 64, 256, 10**6])
def test_batches_keep_to_the_budget_with_padding(max_tokens: int) -> None:
    index = index_records(Rows(random_rows()))
    batches = plan_batches(index, max_tokens)
    for batch in batches:
        padded = int(index.length[batch.members].max()) * len(batch.members)
        assert padded <= max_tokens or len(batch.members) == 1
    longest = [int(index.length[batch.members].max()) for batch in batches]
    slots = [batch.slot for batch in batches]
    assert slots == sorted(slots)
    # Longest first, so that a budget that is too large shows at once.
    firsts = [
        length
        for length, slot, before in zip(longest, slots, [-1, *slots], strict=False)
        if slot != before
    ]
    assert firsts == sorted(firsts, reverse=True)


@pytest.mark.parametrize("max_tokens", [40, 256, 2000])
def test_completions_of_a_prompt_stay_on_one_rank(max_tokens: int) -> None:
    index = index_records(Rows(random_rows()))
    slot_of: dict[bytes, set[int]] = {}
    for batch in plan_batches(index, max_tokens):
        for i in batch.members:
            slot_of.setdefault(index.group[i].tobytes(), set()).add(batch.slot)
    assert {len(slots) for slots in slot_of.values()} == {1}


def test_ranks_share_the_work_evenly() -> None:
    index = index_records(Rows(random_rows(600)))
    work = np.zeros(4)
    for batch in plan_batches(index, 256):
        work[batch.slot % 4] += int(index.length[batch.members].max()) * len(batch.members)
    assert work.max() <= 1.15 * work.min()


def test_the_plan_does_not_depend_on_the_order_of_the_rows() -> None:
    rows = random_rows()
    index = index_records(Rows(rows))
    want = contents(index, plan_batches(index, 256))
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        shuffled = index_records(Rows(rows))
        assert contents(shuffled, plan_batches(shuffled, 256)) == want


def test_the_index_leads_back_to_the_record() -> None:
    rows = random_rows()
    source = Rows(rows)
    index = index_records(source)
    everything = source.records(range(len(rows)))
    from fusedpo.store import record_keys

    for i in range(0, len(index), 17):
        record = everything[index.record[i]]
        assert record.length == index.length[i]
        key = record_keys([record.prompt.tolist()], [record.completion.tolist()])
        assert key.tobytes() == index.keys[i].tobytes()


def test_completions_without_a_token_are_left_out_and_counted() -> None:
    index = index_records(Rows([[([1], [2]), ([1], [])], [([], [3]), ([], [3, 4])]]))
    assert len(index) == 2
    assert index.without_tokens == 2


def test_prompts_cut_differently_within_a_pair_stay_together() -> None:
    # keep_end: the longer completion pushes more of the prompt out.
    rows = [[([k, 1, 2, 3], [5, 6]), ([2, 3], [7, 8, 9, k])] for k in range(10)]
    index = index_records(Rows(rows))
    for batch in plan_batches(index, 24):
        found = sorted(int(index.record[i]) // 2 for i in batch.members)
        assert all(found.count(row) == 2 for row in found)


def test_no_rows_and_no_records_make_no_batches() -> None:
    for rows in ([], [[([1], []), ([1], [])]]):
        index = index_records(Rows(rows))
        assert len(index) == 0
        assert plan_batches(index, 100) == []
