"""`fusedpo.precompute`: right values, nothing scored twice, the same bits after an interruption."""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="precompute tokenises with TRL")

import fusedpo
from datasets import Dataset
from fusedpo import RefStore, StoreError, precompute
from fusedpo._precompute.data import tokenize
from fusedpo._precompute.filling import Progress, open_store
from fusedpo._precompute.records import keys_of
from fusedpo.store import record_keys
from peft import LoraConfig, get_peft_model
from precompute_helpers import (
    Inputs,
    contents,
    exact,
    snapshot_bytes,
    write_inputs,
    write_pairs,
)
from transformers import AutoModelForCausalLM
from trl_helpers import make_model, make_pairs, make_tokenizer, one_thread  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = float(np.finfo(np.float32).eps)
SMALL: dict[str, Any] = {"max_tokens_per_batch": 96, "autocast": "no"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The snapshot of a run that nothing interrupted."""
    torch.set_num_threads(1)
    path = str(tmp_path_factory.mktemp("finished") / "refs")
    precompute(*inputs, path, **SMALL)
    return snapshot_bytes(path)


def records_of(data: str, **options: Any) -> list[Any]:
    dataset = fusedpo._precompute.data.load_data(data)
    source = tokenize(
        dataset,
        ("chosen", "rejected"),
        make_tokenizer(),
        **{"max_length": 1024, "truncation_mode": "keep_start", **options},
    )
    return source.records(range(len(source)))


@pytest.mark.parametrize(
    "family", ["llama", "gemma2 softcap", "phi head with bias", "granite logits_scaling"]
)
def test_values_are_exact_to_rounding(family: str, tmp_path: pathlib.Path) -> None:
    inputs = write_inputs(tmp_path, rows=20, family=family)
    path = str(tmp_path / "refs")
    report = precompute(*inputs, path, max_tokens_per_batch=200, autocast="no", max_length=12)
    records = records_of(inputs.data, max_length=12)
    found, logps, num_tokens = RefStore(path).lookup(keys_of(records))
    assert found.all()
    assert report.records == len({key.tobytes() for key in keys_of(records)})
    model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float64)
    worst = 0.0
    for record, logp, count in zip(records, logps, num_tokens, strict=True):
        want = exact(model, record)
        assert count == record.num_tokens == len(record.completion)
        worst = max(worst, abs(logp - want.logp) / (EPS * want.scale))
    print(f"{family}: largest error {worst:.2f} eps (sum |logp_t| + max |z|)")
    assert worst <= 8


def test_a_second_run_finds_everything_and_scores_nothing(
    inputs: Inputs, tmp_path: pathlib.Path
) -> None:
    path = str(tmp_path / "refs")
    first = precompute(*inputs, path, **SMALL)
    assert (first.found, first.scored) == (0, first.records)
    assert first.rows == 60
    again = precompute(*inputs, path, **SMALL)
    assert (again.found, again.scored, again.tokens) == (first.records, 0, 0)


def test_more_rows_cost_only_what_is_new(inputs: Inputs, tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "refs")
    part = write_pairs(tmp_path / "part.jsonl", make_pairs(60)[:30])
    some = precompute(inputs.model, part, path, **SMALL)
    before = contents(path)
    rest = precompute(*inputs, path, **SMALL)
    assert rest.found == some.records
    assert rest.scored == rest.records - some.records > 0
    after = contents(path)
    assert {key: after[key] for key in before} == before


def test_the_order_of_the_rows_does_not_change_a_bit(
    inputs: Inputs, finished: bytes, tmp_path: pathlib.Path
) -> None:
    rows = make_pairs(60)
    random.Random(1).shuffle(rows)
    shuffled = write_pairs(tmp_path / "shuffled.jsonl", rows)
    precompute(inputs.model, shuffled, str(tmp_path / "refs"), **SMALL)
    assert snapshot_bytes(tmp_path / "refs") == finished


class Stop(Progress):
    """Raises after some batches, as Ctrl-C would."""

    def __init__(self, batches: int) -> None:
        self._left = batches

    def advance(self, tokens: int) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


def test_interrupted_runs_lose_nothing_and_end_with_the_same_bits(
    inputs: Inputs, finished: bytes, tmp_path: pathlib.Path
) -> None:
    path = str(tmp_path / "refs")
    kept = 0
    for batches in (1, 3, 2):
        with pytest.raises(KeyboardInterrupt):
            precompute(*inputs, path, progress=Stop(batches), **SMALL)
        assert len(RefStore(path)) > kept
        kept = len(RefStore(path))
    last = precompute(*inputs, path, **SMALL)
    assert last.found == kept
    assert snapshot_bytes(path) == finished


def test_a_batch_of_which_a_part_is_missing_is_scored_whole(
    inputs: Inputs, finished: bytes, tmp_path: pathlib.Path
) -> None:
    whole, path = str(tmp_path / "whole"), str(tmp_path / "refs")
    precompute(*inputs, whole, **SMALL)
    kept = RefStore(whole)
    store = RefStore(path, "a", identity=kept.identity, tolerance=kept.tolerance)
    with store.writer() as writer:
        for keys, logps, num_tokens, *_ in kept.batches():
            writer.append(keys[::3], logps[::3], num_tokens[::3])
    report = precompute(*inputs, path, **SMALL)
    assert report.found == -(-report.records // 3)
    assert report.found + report.scored == report.records
    assert snapshot_bytes(path) == finished


def test_token_values_sum_to_the_value_and_come_in_one_more_run(
    inputs: Inputs, tmp_path: pathlib.Path
) -> None:
    path = str(tmp_path / "refs")
    without = precompute(*inputs, path, **SMALL)
    report = precompute(*inputs, path, per_token=True, **SMALL)
    assert (report.found, report.scored) == (0, without.records)
    keys = keys_of(records_of(inputs.data))
    store = RefStore(path)
    found, tokens = store.lookup_tokens(keys)
    _, logps, num_tokens = store.lookup(keys)
    assert found.all()
    assert [len(each) for each in tokens] == num_tokens.tolist()
    sums = [float(each.sum(dtype=np.float64)) for each in tokens]
    assert sums == logps.tolist()


def test_a_sample_is_scored_again_one_by_one(inputs: Inputs, tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "refs")
    report = precompute(*inputs, path, verify_sample=7, **SMALL)
    assert report.sample is not None
    assert report.sample.records == 7
    assert report.sample.largest_difference < 1e-4
    assert report.sample.disagreeing == 0
    # A store that somebody filled with other numbers is found out.
    wrong = RefStore(tmp_path / "wrong", "a", identity=RefStore(path).identity)
    with wrong.writer() as writer:
        for keys, logps, num_tokens, *_ in RefStore(path).batches():
            writer.append(keys, logps - 1.0, num_tokens)
    report = precompute(*inputs, str(tmp_path / "wrong"), verify_sample=7, **SMALL)
    assert report.scored == 0
    assert report.sample is not None
    assert report.sample.largest_difference == pytest.approx(1.0, abs=1e-4)
    assert report.sample.disagreeing == 7


def test_the_tolerance_holds_what_rounding_may_do_and_no_more(tmp_path: pathlib.Path) -> None:
    """Two processes of a stream may score one short completion in different batches."""
    scoring = {"dtype": "float32", "autocast": None}
    eps = float(np.finfo(np.float32).eps)
    for logp, logit in ((0.0, 50.0), (-1.0, 30.0), (-400.0, 50.0)):
        path = tmp_path / str(logp)
        store = open_store(str(path), {"scoring": scoring})
        keys = record_keys([[1]], [[2]])
        bound = 8 * eps * (abs(logp) + logit)
        for value in (logp - 2 * bound, logp):  # each within the bound of one in their middle
            with store.writer() as writer:
                writer.append(keys, [value], [1])
        store.refresh()
        assert store.lookup(keys)[0].all()
        with store.writer() as writer:
            writer.append(keys, [logp - 1e-5 * max(32, abs(logp))], [1])
        store.refresh()
        with pytest.raises(StoreError, match="more than the tolerance"):
            store.lookup(keys)


def test_random_states_are_left_as_they_were(inputs: Inputs, tmp_path: pathlib.Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)

    seed()
    want = draw()
    seed()
    precompute(*inputs, str(tmp_path / "refs"), **SMALL)
    assert draw() == want


def test_a_model_that_is_passed_is_left_as_it_was(inputs: Inputs, tmp_path: pathlib.Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    forward = model.forward
    path = str(tmp_path / "refs")
    precompute(model, inputs.data, path, processing_class=make_tokenizer(), **SMALL)
    assert [module.training for module in model.modules()] == modes
    assert model.forward == forward
    assert "forward" not in vars(model)
    # What the model keeps from the scoring can still be trained.
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    report = precompute(*inputs, path, **SMALL)
    assert report.scored == 0, "a path and the loaded model are the same reference"


def test_an_adapter_can_be_the_reference(inputs: Inputs, tmp_path: pathlib.Path) -> None:
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    path = str(tmp_path / "refs")
    adapter = str(tmp_path / "adapter")
    report = precompute(*inputs, path, ref_adapter=adapter, **SMALL)
    again = precompute(model, inputs.data, path, processing_class=make_tokenizer(), **SMALL)
    assert (again.found, again.scored) == (report.records, 0)
    plain = str(tmp_path / "plain")
    precompute(*inputs, plain, **SMALL)
    assert max(abs(contents(path)[k] - v) for k, v in contents(plain).items()) > 1e-2
    with pytest.raises(StoreError, match=r"adapter\.types: the store has .*no such field"):
        precompute(*inputs, path, **SMALL)
    with pytest.raises(ValueError, match=rf"Use --model BASE --ref-adapter {adapter}"):
        precompute(adapter, inputs.data, path, processing_class=make_tokenizer(), **SMALL)


def test_unpaired_rows_share_records_with_pairs(inputs: Inputs, tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "refs")
    paired = precompute(*inputs, path, **SMALL)
    unpaired = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in make_pairs(60)
        for side in ("chosen", "rejected")
    ]
    data = Dataset.from_list(unpaired)
    report = precompute(inputs.model, data, path, **SMALL)
    assert report.rows == 120
    assert (report.found, report.scored) == (paired.records, 0)


def test_another_reference_is_refused_and_the_difference_named(
    inputs: Inputs, tmp_path: pathlib.Path
) -> None:
    path = str(tmp_path / "refs")
    precompute(*inputs, path, **SMALL)
    other = tmp_path / "other"
    make_model(seed=1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    with pytest.raises(StoreError, match=r"model\.parameters: the store has") as caught:
        precompute(str(other), inputs.data, path, **SMALL)
    assert caught.value.code == "identity"
    for options, field in (
        ({"autocast": "bf16"}, "scoring.autocast"),
        ({"dtype": "bfloat16"}, "scoring.dtype"),
        ({"attn_implementation": "eager"}, "scoring.attention"),
    ):
        with pytest.raises(StoreError, match=field):
            precompute(*inputs, path, **{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_tokens_per_batch": 0}, ValueError, "max_tokens_per_batch must be"),
        ({"verify_sample": -1}, ValueError, "verify_sample must be"),
        ({"max_length": 0}, ValueError, "max_length must be"),
        ({"truncation_mode": "middle"}, ValueError, "truncation_mode must be"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of"),
        ({"autocast": "fp8"}, ValueError, "autocast must be"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(
    options: dict[str, Any], error: Any, message: str, inputs: Inputs, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(error, match=message):
        precompute(*inputs, str(tmp_path / "refs"), **options)
    assert not (tmp_path / "refs").exists()


def test_paths_may_be_path_objects(inputs: Inputs, tmp_path: pathlib.Path) -> None:
    paths = (pathlib.Path(each) for each in (*inputs, tmp_path / "refs"))
    assert precompute(*paths, **SMALL).scored > 0


def test_a_directory_that_cannot_be_made_is_a_store_error(
    inputs: Inputs, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError) as caught:
        precompute(*inputs, str(tmp_path / "file" / "refs"), **SMALL)
    assert caught.value.path is not None


def hub_cache(folder: pathlib.Path, model: str) -> dict[str, str]:
    """The environment in which the hub id team/tiny is this model, as after a download."""
    cached = folder / "hub" / "models--team--tiny"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0123", encoding="utf-8")
    shutil.copytree(model, cached / "snapshots" / "0123")
    return {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    "accelerate launch": [
        *["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"],
        *["--mixed_precision=no", "--dynamo_backend=no"],
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_ranks_share_the_work_and_end_with_the_bits_of_one(
    launcher: str, inputs: Inputs, finished: bytes, tmp_path: pathlib.Path
) -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("this torch is built without gloo")
    path = tmp_path / "refs"
    command = [sys.executable, "-m", *LAUNCHERS[launcher]]
    command += ["-m", "fusedpo", "precompute", "--model", "team/tiny", "--data", inputs.data]
    command += ["--output", str(path), "--autocast", "no", "--max-tokens-per-batch", "96", "--json"]
    command += ["--verify-sample", "9"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        | hub_cache(tmp_path, inputs.model),
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout)
    assert (report["rank"], report["world_size"]) == (0, 2)
    assert report["sample"]["records"] == 9, "of both ranks together"
    logs = [each for each in RefStore(path).files() if each.kind == "log"]
    # Nothing was scored twice: the logs of both ranks together hold each record once.
    assert len(logs) == 2
    assert sum(log.records for log in logs) == report["records"]
    assert report["scored"] in [log.records for log in logs]
    assert min(log.records for log in logs) > report["records"] // 4
    assert snapshot_bytes(path) == finished
