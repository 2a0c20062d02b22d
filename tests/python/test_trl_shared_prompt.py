"""FusedDPOTrainer with and without shared prompts: the same values, fewer tokens.

test_trl_trainer.py and test_trl_store.py compare with TRL in many setups; where the model allows it
they run with shared prompts, which is the default. Here the two layouts are compared.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

import peft
import transformers
from datasets import Dataset, IterableDataset
from fusedpo._precompute import scoring
from fusedpo.trl import FusedDPOTrainer
from fusedpo.trl.packed_batch import (
    KEY,
    NotShareableError,
    PackedBatch,
    PackingCollator,
    pack_batch,
    packed_row,
)
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_helpers import (
    assert_equal_logs,
    logged,
    make_config,
    make_model,
    make_pairs,
    make_tokenizer,
    one_thread,  # noqa: F401  a fixture
    train,
)

pytestmark = [pytest.mark.trl, pytest.mark.usefixtures("one_thread")]


def build(folder: Any, *, model: Any = None, ref_model: Any = None, **options: Any) -> Any:
    """A trainer that has not trained; keyword arguments are the trainer's or its config's."""
    own = ("share_prompts", "ref_store", "ref_miss", "data_collator", "peft_config")
    keywords = {name: options.pop(name) for name in own if name in options}
    return FusedDPOTrainer(
        make_model() if model is None else model,
        ref_model=ref_model,
        args=make_config(folder, **options),
        train_dataset=Dataset.from_list(make_pairs()),
        processing_class=make_tokenizer(),
        **keywords,
    )


def batch_of(trainer: Any, rows: Any = range(4)) -> Any:
    return trainer.data_collator([trainer.train_dataset[i] for i in rows])


def loss_and_gradient(trainer: Any, batch: Any) -> tuple[float, torch.Tensor]:
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch, return_outputs=False)
    loss.backward()
    grads = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(grads)


def tokens(trainer: Any) -> list[tuple[float, float]]:
    return [
        (entry["tokens/computed"], entry["tokens/padded"])
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


# The same values ----------------------------------------------------------------------------------

_ALONE = "sigmoid hinge ipo nca_pair bco_pair sppo_hard apo_zero apo_down discopop sft sigmoid_norm"
_SORTED = ("aot", "aot_unpaired")  # no term belongs to one pair, so none can be weighted
LOSSES: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": [name]} for name in (*_ALONE.split(), *_SORTED)},
    "exo_pair": {"loss_type": ["exo_pair"], "label_smoothing": 0.1},
    "robust": {"loss_type": ["robust"], "label_smoothing": 0.1},
    "a weighted list": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
}
VARIANTS = [
    (loss, variant)
    for loss in LOSSES
    for variant in ("plain", "ld_alpha", "use_weighting")
    if variant != "use_weighting" or loss not in _SORTED
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # With use_weighting the head computes what WPO needs.
    folder = tmp_path_factory.mktemp("shared")
    trainer = build(folder, ref_model=make_model(seed=7), use_weighting=True)
    assert trainer._shared_prompts.active
    return trainer


@pytest.mark.parametrize(("loss", "variant"), VARIANTS)
def test_every_loss_and_its_gradient_are_those_of_padded_batches(
    loss: str, variant: str, shared: Any, monkeypatch: Any
) -> None:
    options = {"label_smoothing": 0.0, "loss_weights": None, **LOSSES[loss]}
    names = options["loss_type"]
    monkeypatch.setattr(shared, "loss_types", names)
    monkeypatch.setattr(shared, "loss_weights", options["loss_weights"] or [1.0] * len(names))
    monkeypatch.setattr(shared, "label_smoothing", options["label_smoothing"])
    monkeypatch.setattr(shared, "ld_alpha", 0.4 if variant == "ld_alpha" else None)
    monkeypatch.setattr(shared, "use_weighting", variant == "use_weighting")
    results = []
    for active in (True, False):
        monkeypatch.setattr(shared._shared_prompts, "active", active)
        results.append(loss_and_gradient(shared, batch_of(shared)))
    (got, got_gradient), (want, want_gradient) = results
    assert got == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert want_gradient.norm() > 1e-4
    assert (got_gradient - want_gradient).norm() <= 1e-5 * want_gradient.norm()


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [3, 8])  # 3: prompts vanish, or completions do
def test_truncated_pairs_equal_trl(truncation_mode: str, max_length: int, tmp_path: Any) -> None:
    options: dict[str, Any] = {
        "rows": [*make_pairs(), {"prompt": "who", "chosen": " a dog", "rejected": " my friend"}],
        "max_length": max_length,
        "truncation_mode": truncation_mode,
        "max_steps": 3,
        "per_device_train_batch_size": 1 if max_length == 3 else 4,
    }
    theirs = logged(train(DPOTrainer, tmp_path, **options))
    ours = train(FusedDPOTrainer, tmp_path, **options | {"keywords": {"share_prompts": True}})
    assert_equal_logs(logged(ours), theirs)


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


SETUPS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA": {"keywords": {"peft_config": lora()}, "with_ref_model": False},
    "mixture of experts": {"family": "mixtral", "router_aux_loss_coef": 0.5},
    "evaluation and workers": {
        "eval_rows": make_pairs(6, seed=1),
        "eval_strategy": "steps",
        "eval_steps": 2,
        "dataloader_num_workers": 1,
    },
}


@pytest.mark.parametrize("setup", SETUPS)
def test_logs_are_equal_and_tokens_are_told(setup: str, tmp_path: Any) -> None:
    trainers = {}
    for share in (True, False):
        options = SETUPS[setup]
        keywords = options.get("keywords", {}) | {"share_prompts": share}
        trainers[share] = train(
            FusedDPOTrainer, tmp_path, **options | {"keywords": keywords, "max_steps": 4}
        )
    assert_equal_logs(logged(trainers[True]), logged(trainers[False]))
    both = zip(tokens(trainers[True]), tokens(trainers[False]), strict=True)
    for (computed, padded), (_, same) in both:
        assert padded == same
        assert computed < 0.8 * padded
    assert all(computed == padded for computed, padded in tokens(trainers[False]))


def test_a_stream_is_packed_too(tmp_path: Any) -> None:
    logs = []
    for share in (True, False):
        trainer = FusedDPOTrainer(
            make_model(),
            ref_model=make_model(),
            args=make_config(tmp_path, max_steps=3),
            train_dataset=IterableDataset.from_generator(make_pairs),
            processing_class=make_tokenizer(),
            share_prompts=share,
        )
        trainer.train()
        assert all((computed < padded) == share for computed, padded in tokens(trainer))
        logs.append(logged(trainer))
    assert_equal_logs(*logs)


def test_tokens_are_counted_by_hand(tmp_path: Any) -> None:
    trainer = build(tmp_path, ref_model=make_model(), share_prompts=True)
    rows = [trainer.train_dataset[i] for i in range(4)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    lengths = [[len(row[name]) for name in names] for row in rows]
    trainer._compute_loss(trainer.model, batch_of(trainer), return_outputs=False)
    metrics = trainer._metrics["train"]
    assert metrics["tokens/computed"] == [sum(map(sum, lengths))]
    assert metrics["tokens/padded"] == [8 * max(p + max(c, r) for p, c, r in lengths)]


@pytest.mark.parametrize("first", [True, False])
def test_a_store_serves_both_layouts(first: bool, tmp_path: Any) -> None:
    logs = []
    for share, miss in ((first, "compute"), (not first, "error")):
        keywords = {"ref_store": tmp_path / "refs", "ref_miss": miss, "share_prompts": share}
        trainer = train(FusedDPOTrainer, tmp_path, keywords=keywords, with_ref_model=False)
        logs.append(logged(trainer))
    assert_equal_logs(*logs)


def test_false_fills_a_store_padded_though_the_model_took_packed_rows_before(
    tmp_path: Any, monkeypatch: Any
) -> None:
    def packed(*_: Any) -> Any:
        raise AssertionError("scored in a packed row")

    model = make_model()
    assert build(tmp_path, model=model, ref_model=make_model())._shared_prompts.active
    monkeypatch.setattr(scoring, "_score_packed", packed)
    refs = tmp_path / "refs"
    trainer = build(tmp_path, model=model, ref_store=refs, share_prompts=False, max_steps=1)
    trainer.train()
    assert all(computed == padded for computed, padded in tokens(trainer))


# Batches ------------------------------------------------------------------------------------------


def test_batch_of_another_collator_is_laid_out_when_it_arrives(shared: Any) -> None:
    rows = [shared.train_dataset[i] for i in range(4)]
    batch = PackingCollator(shared.data_collator)(rows)
    row = packed_row(batch)
    want = shared.token_logps(shared.model, batch)
    assert batch[KEY].packed.segments is row.packed.segments
    without = batch_of(shared)
    assert torch.equal(shared.token_logps(shared.model, without), want)
    assert isinstance(without[KEY], PackedBatch)


def left_padded(batch: Any) -> dict[str, torch.Tensor]:
    shifts = (batch["attention_mask"] == 0).sum(dim=1).tolist()
    names = ("input_ids", "attention_mask", "completion_mask")
    return {
        name: torch.stack([row.roll(n) for row, n in zip(batch[name], shifts, strict=True)])
        for name in names
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # relative and learned positions
def test_padding_on_the_left_keeps_the_positions_it_gives(family: str, tmp_path: Any) -> None:
    trainer = build(tmp_path, model=make_model(family), ref_model=make_model(family))
    batch = left_padded(batch_of(trainer))
    logps = []
    for active in (True, False):
        trainer._shared_prompts.active = active
        logps.append(trainer.token_logps(trainer.model, batch))
    assert logps[0].std() > 0.1
    torch.testing.assert_close(logps[0], logps[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda batch: {"token_type_ids": torch.zeros_like(batch["input_ids"])}, "token_type_ids"),
        (
            lambda batch: {"completion_mask": batch["attention_mask"] - batch["completion_mask"]},
            "without gaps",
        ),
        (lambda batch: {"completion_mask": 1 + 0 * batch["completion_mask"]}, "score that padding"),
        (
            lambda batch: {n: 0 * batch[n] for n in ("attention_mask", "completion_mask")},
            "no token",
        ),
    ],
)
def test_batches_of_another_form_are_not_packed(
    change: Callable[[Any], Any], words: str, shared: Any
) -> None:
    batch = batch_of(shared)
    with pytest.raises(NotShareableError, match=words):
        pack_batch(batch | change(batch))


def with_positions(examples: Any) -> Any:
    """A collator whose batches hold more than is packed."""
    pad = DataCollatorForPreference(pad_token_id=0, pad_to_multiple_of=16)
    return pad(examples) | {"position_ids": torch.arange(16)[None]}


def test_auto_pads_a_batch_that_cannot_be_packed_and_true_refuses_it(
    tmp_path: Any, capsys: Any
) -> None:
    def run(share: Any) -> Any:
        options = {"data_collator": with_positions, "share_prompts": share, "max_steps": 2}
        trainer = build(tmp_path, ref_model=make_model(), **options)
        trainer.train()
        return trainer

    assert all(computed == padded for computed, padded in tokens(run("auto")))
    lines = [line for line in capsys.readouterr().out.splitlines() if "not shared" in line]
    assert len(lines) == 1
    assert "position_ids" in lines[0]
    with pytest.raises(ValueError, match=r"share_prompts=True must have .* position_ids"):
        run(True)


# Models -------------------------------------------------------------------------------------------


def bloom() -> Any:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=96, hidden_size=16, n_layer=2, n_head=2)
    return transformers.BloomForCausalLM(config)


def test_model_that_is_not_exact_is_padded_with_the_reason_or_refused(
    tmp_path: Any, capsys: Any
) -> None:
    trainer = build(tmp_path, model=bloom(), ref_model=bloom(), max_steps=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "not shared" in line]
    assert len(lines) == 1
    assert "BloomAttention" in lines[0]
    trainer.train()
    assert all(computed == padded for computed, padded in tokens(trainer))
    with pytest.raises(ValueError, match=r"share_prompts=True .*BloomAttention"):
        build(tmp_path, model=bloom(), ref_model=bloom(), share_prompts=True)
    with pytest.raises(ValueError, match="ref_model: BloomForCausalLM"):
        build(tmp_path, ref_model=bloom(), share_prompts=True)


def test_dropout_is_refused_and_trls_default_switches_it_off(tmp_path: Any) -> None:
    def gpt2() -> dict[str, Any]:
        return {"model": make_model("gpt2"), "ref_model": make_model("gpt2")}  # dropout 0.1

    assert build(tmp_path, **gpt2())._shared_prompts.active
    with pytest.raises(ValueError, match=r"dropout is active .*p=0\.1"):
        build(tmp_path, **gpt2(), disable_dropout=False, share_prompts=True)
    # Noise on the embeddings is another kind of randomness that shared prompts would share.
    with pytest.raises(ValueError, match="neftune_noise_alpha adds noise"):
        build(tmp_path, ref_model=make_model(), neftune_noise_alpha=5.0, share_prompts=True)


@pytest.mark.parametrize("wrong", ["always", 1, None])
def test_share_prompts_has_three_values(wrong: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="'auto', True or False"):
        build(tmp_path, share_prompts=wrong)


def test_false_leaves_model_and_batches_as_they_are(tmp_path: Any) -> None:
    trainer = build(tmp_path, ref_model=make_model(), share_prompts=False)
    assert trainer.model.config._attn_implementation == "sdpa"
    assert type(next(iter(trainer.get_train_dataloader()))) is dict


@pytest.mark.parametrize("change", ["ids", "ids in place", "narrower mask", "wider mask"])
def test_a_batch_that_is_changed_after_collation_is_packed_anew(change: str, tmp_path: Any) -> None:
    class Changing(FusedDPOTrainer):
        """Changes its batches as a user's subclass may."""

        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
            ids, mask = inputs["input_ids"], inputs["completion_mask"]
            if change == "ids":
                inputs["input_ids"] = torch.where(mask == 1, (ids + 1) % 32, ids)
            elif change == "ids in place":
                ids[:, 1] = (ids[:, 1] + 1) % 32
            else:
                by = 1 if change == "narrower mask" else -1
                moved = mask.roll(by, dims=1)
                inputs["completion_mask"] = (mask & moved) if by == 1 else (mask | moved)
                inputs["completion_mask"] *= inputs["attention_mask"]
            return super()._compute_loss(model, inputs, return_outputs)

    logs = [
        logged(train(Changing, tmp_path, keywords={"share_prompts": share}, max_steps=2))
        for share in (True, False)
    ]
    assert_equal_logs(logs[0], logs[1])


def test_a_trainer_goes_away_with_its_last_name(tmp_path: Any) -> None:
    # Under DDP what it holds has threads, which must end before Python does.
    trainer = build(tmp_path, ref_store=tmp_path / "refs", share_prompts=True, max_steps=1)
    trainer.train()
    gc.collect()
    gc.disable()
    try:
        alive = weakref.ref(trainer)
        del trainer
        assert alive() is None
    finally:
        gc.enable()
