"""Every option of DPOConfig, and what FusedDPOTrainer does with it.

`test_trl_options.py` does what each row says; `python tests/python/trl_options.py` writes the table
of docs/trl.md from the rows.
"""

from __future__ import annotations

import pathlib
from dataclasses import dataclass, field
from typing import Any

import trl_options_loop

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "trl.md"
BEGIN = "<!-- options: written by `python tests/python/trl_options.py` -->"
END = "<!-- /options -->"

EQUAL = "as in TRL"  # two steps of both trainers log the same numbers
SAME_END = "as in TRL, or its error"  # the machine decides: equal numbers, or one error of both
REFUSED = "refused"  # by FusedDPOTrainer, when it is built; the message names the option
ELSEWHERE = "as in TRL"  # by a test that this one cannot replace
LOOP = "passed on"  # to transformers' loop, untried


@dataclass(frozen=True)
class Row:
    """One option; `tried` are the settings of one run, the option's own among them."""

    name: str
    tried: dict[str, Any]
    verdict: str = EQUAL
    note: str = ""
    where: str = ""  # the test of an option that is not tried here
    setup: dict[str, Any] = field(default_factory=dict)  # further arguments of `trl_helpers.train`
    trl: dict[str, Any] = field(default_factory=dict)  # what TRL's run has otherwise
    since: tuple[int, int] = (1, 9)  # the first TRL that takes the option this way


def _row(name: str, value: Any, *more: Any, **options: Any) -> Row:
    with_options = options.pop("with_", {})
    return Row(name, {name: value, **with_options}, *more, **options)


_EVALUATION = {"setup": {"evaluate": True}, "with_": {"eval_strategy": "steps", "eval_steps": 1}}
_BY_PATH = {"setup": {"by_path": True}}


def _of_the_loop() -> list[Row]:
    rows = []
    for name, (value, more) in trl_options_loop.TRIED.items():
        evaluates = {"evaluate": True} if "eval_strategy" in more else {}
        rows.append(_row(name, value, with_=more, setup=evaluates))
    for name, reason in trl_options_loop.NOT_TRIED.items():
        rows.append(Row(name, {}, LOOP, where=reason))
    return rows


ROWS = (
    # What TRL's DPOConfig declares.
    _row("beta", 0.5),
    _row("loss_type", ["ipo", "sft"], note="alone and in lists: test_losses_vs_trl.py has all 15"),
    _row("loss_weights", [0.7, 0.2], with_={"loss_type": ["sigmoid", "bco_pair"]}),
    _row("label_smoothing", 0.1, with_={"loss_type": "robust"}),
    _row("f_divergence_type", "js_divergence", note="since TRL 1.13; 1.9 had other ones for `ipo`"),
    _row(
        "f_alpha_divergence_coef",
        1.3,
        with_={"f_divergence_type": "alpha_divergence"},
    ),
    _row("discopop_tau", 0.2, with_={"loss_type": "discopop"}),
    _row("ld_alpha", 0.4),
    _row("use_weighting", True, note="also with `hinge` and `sft`, where TRL fails"),
    _row(
        "router_aux_loss_coef",
        0.5,
        setup={"family": "mixtral"},
        note="TRL before 1.14 has 0.001 as its default, newer ones the model's own",
    ),
    _row("max_length", 9),
    _row("truncation_mode", "keep_end", with_={"max_length": 7}),
    _row("pad_to_multiple_of", 8),
    _row("pad_token", "<unk>"),
    _row(
        "padding_free",
        True,
        REFUSED,
        note="TRL warns and pads; here padding never reaches the head",
    ),
    _row(
        "precompute_ref_log_probs",
        True,
        setup={"with_ref_model": False},
        note="into a store below `output_dir`, which survives interruptions (docs/precompute.md)",
    ),
    _row(
        "precompute_ref_batch_size",
        3,
        with_={"precompute_ref_log_probs": True},
        setup={"with_ref_model": False},
    ),
    _row("sync_ref_model", True, with_={"ref_model_sync_steps": 1}),
    _row("ref_model_sync_steps", 1, with_={"sync_ref_model": True}),
    _row("ref_model_mixup_alpha", 0.3, with_={"sync_ref_model": True, "ref_model_sync_steps": 1}),
    _row("disable_dropout", False, setup={"family": "gpt2"}),
    _row("activation_offloading", True, SAME_END, note="an error without a GPU"),
    _row("dataset_num_proc", 2),
    _row("model_init_kwargs", {"attn_implementation": "eager"}, **_BY_PATH),
    _row("trust_remote_code", True, **_BY_PATH),
    _row("learning_rate", 1e-2),
    # What it declares anew.
    _row("bf16", True, note="autocast; within bf16's rounding"),
    _row("gradient_checkpointing", True),
    _row("logging_steps", 2),
    _row(
        "lr_scheduler_kwargs",
        {"num_cycles": 1},
        with_={"lr_scheduler_type": "cosine_with_restarts"},
    ),
    _row("torch_empty_cache_steps", 1),
    _row(
        "use_liger_kernel",
        True,
        SAME_END,
        since=(1, 15),
        note="an error without liger-kernel; Liger's layers only. Refused below TRL 1.15, where it "
        "selects another loss",
    ),
    # Options of transformers that touch what FusedDPOTrainer does.
    _row("fp16", True, note="autocast; within fp16's rounding"),
    _row(
        "gradient_checkpointing_kwargs",
        {"use_reentrant": True},
        with_={"gradient_checkpointing": True},
    ),
    _row("gradient_accumulation_steps", 2),
    _row("max_grad_norm", 0.01),
    _row("neftune_noise_alpha", 5.0, note="prompts are not shared: it depends on a row's length"),
    _row(
        "torch_compile",
        True,
        with_={"torch_compile_backend": "eager"},
        trl={"torch_compile": False, "torch_compile_backend": None},
        note="the numbers of TRL without it",
    ),
    _row("label_names", ["labels"]),
    _row("label_smoothing_factor", 0.1, REFUSED, note="of transformers' loss; TRL ignores it"),
    _row("remove_unused_columns", False),
    _row("include_num_input_tokens_seen", "all"),
    _row("average_tokens_across_devices", False),
    _row("dataloader_drop_last", True, setup={"rows": 10}),
    _row("dataloader_num_workers", 1),
    _row("train_sampling_strategy", "sequential"),
    _row("seed", 7),
    _row("full_determinism", True),
    _row("auto_find_batch_size", True),
    _row("eval_strategy", "steps", setup={"evaluate": True}, with_={"eval_steps": 1}),
    _row("eval_on_start", True, **_EVALUATION),
    _row("eval_accumulation_steps", 1, **_EVALUATION),
    _row("prediction_loss_only", True, **_EVALUATION),
    _row(
        "bf16_full_eval",
        True,
        setup={"evaluate": True},
        with_={"eval_strategy": "steps", "eval_steps": 2},
    ),
    Row("fsdp", {}, ELSEWHERE, where="test_trl_distributed.py"),
    Row("deepspeed", {}, ELSEWHERE, "ZeRO-2 and ZeRO-3", where="test_trl_distributed.py"),
    Row(
        "parallelism_config",
        {},
        "as in TRL, or refused",
        "refused: context and sequence parallelism, and tensor parallelism with a store",
        where="test_trl_trainer.py",
    ),
    Row("resume_from_checkpoint", {}, ELSEWHERE, where="test_trl_drop_in.py"),
    Row("report_to", {}, ELSEWHERE, where="test_trl_drop_in.py"),
    *_of_the_loop(),
)


def table() -> str:
    lines = ["| option | tried with | FusedDPOTrainer | |", "|---|---|---|---|"]
    for row in ROWS:
        tried = ", ".join(f"`{name}={value!r}`" for name, value in row.tried.items())
        lines.append(f"| `{row.name}` | {tried or row.where} | {row.verdict} | {row.note} |")
    return "\n".join(lines)


def written(document: str) -> str:
    """Return the document with the table of now."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
