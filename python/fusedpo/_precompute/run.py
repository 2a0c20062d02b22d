"""`fusedpo.precompute`: score with the reference what a store does not have yet.

Each process writes a log of its own and takes its share of the batches, which all processes plan
alike from the whole data set; none waits for another. What is in the store when a run begins is not
scored again, and a batch of which a part is missing is scored whole, in the composition that every
run gives it: a run that was killed and started again ends with the bits of one that was not.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch

from fusedpo._bf16 import has_bf16_weights, slow_bf16

from .filling import PrecomputeReport, Progress, Scorer, combined, fill, open_store
from .records import index_records
from .scoring import autocast_dtype, random_states_kept

MAX_TOKENS_PER_BATCH = 8192


def precompute(
    model: Any,
    data: Any,
    output: str | os.PathLike[str],
    *,
    split: str | None = None,
    ref_adapter: str | os.PathLike[str] | None = None,
    processing_class: Any = None,
    max_length: int | None = 1024,
    truncation_mode: str = "keep_start",
    dtype: str = "float32",
    autocast: str = "auto",
    revision: str | None = None,
    attn_implementation: str | None = None,
    max_tokens_per_batch: int = MAX_TOKENS_PER_BATCH,
    share_prompts: str | bool = "auto",
    per_token: bool = False,
    verify_sample: int = 0,
    progress: Progress | None = None,
) -> PrecomputeReport:
    """Compute the reference log-probs of a data set once, into a store that survives anything.

    Run it again after whatever happened: only what is missing is scored. Under `torchrun` or
    `accelerate launch` the processes share the work. The defaults are those of `DPOConfig`, so that
    `FusedDPOTrainer(ref_store=output)` with a default configuration finds every record.

    Args:
        model: a path or a name on the Hugging Face Hub, loaded as DPOTrainer loads its reference;
            or a model, which is scored as it stands (a PeftModel with its active adapter).
        data: a `datasets.Dataset`, a file (.jsonl, .json, .csv, .parquet, .arrow), a directory, or
            a name on the Hub; rows with prompt, chosen, rejected, or prompt, completion; text or
            messages.
        output: the store's directory, made if it is not there.
        split: which split of the data; "train" if there is one of that name.
        ref_adapter: a PEFT adapter to put on the model: then the adapted model is the reference.
        processing_class: the tokenizer; by default the one that belongs to the model.
        max_length, truncation_mode: as in the training's DPOConfig; they change the token ids.
        dtype: of the weights: float32, bfloat16, float16, or auto (as the checkpoint has them).
        autocast: auto (bf16, as DPOConfig), bf16, fp16 or no.
        revision: which revision of the model on the Hub.
        attn_implementation: as for `from_pretrained`. Prompts are shared with "sdpa" and "eager";
            others, e.g. "flash_attention_2", are padded under `share_prompts="auto"`.
        max_tokens_per_batch: tokens that the model computes for a batch (each prompt once, or with
            padding); bounds the memory.
        share_prompts: compute a prompt once for all its completions, without padding: "auto" does
            so for models for which it is exact (the report tells why not), True refuses others,
            False never does.
        per_token: store each token's log-prob, too; `DPOConfig(ld_alpha=...)` needs them.
        verify_sample: so many records, of all processes together, are scored again, one by one,
            and compared.
        progress: told how far the scoring is.

    Returns:
        PrecomputeReport: what was there, what was scored, how long it took.

    Raises:
        ValueError, TypeError, FileNotFoundError: an argument or the data; the message says which.
        ImportError: TRL is not installed.
        fusedpo.StoreError: the store belongs to another reference, is damaged, or cannot be
            written; what was scored before stays.

    Example:

        fusedpo.precompute("Qwen/Qwen2.5-0.5B-Instruct", "pairs.jsonl", "refs/")
        FusedDPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", ref_store="refs/", train_dataset=pairs)
    """
    require_packages(peft=ref_adapter is not None)
    from fusedpo._packing.architectures import check_mode, why_not_exact
    from fusedpo._packing.attention import packed_attention

    from .data import check_truncation, completion_columns, load_data, tokenize
    from .identity import refuse_sharded
    from .reference import fused_head, load_processing_class, pad_token_id, process_state

    check_truncation(max_length, truncation_mode)
    check_mode(share_prompts)
    _check_count("max_tokens_per_batch", max_tokens_per_batch, least=1)
    _check_count("verify_sample", verify_sample, least=0)
    compute_dtype = autocast_dtype(autocast)
    state = process_state()
    with random_states_kept():
        # What can be refused soon is refused before the long work: hashing, tokenising, scoring.
        dataset = load_data(data, split)
        completions = completion_columns(dataset)
        if processing_class is None:
            processing_class = load_processing_class(model, revision)
        ours = isinstance(model, (str, os.PathLike))
        if not ours:
            refuse_sharded(model, state.num_processes)
        model, identity = reference_of(
            model,
            dtype=dtype,
            autocast=autocast,
            revision=revision,
            attn_implementation=attn_implementation,
            ref_adapter=ref_adapter,
        )
        if state.is_main_process:
            _tell_slow_bf16(model, compute_dtype)
        not_shared = None if share_prompts is False else why_not_exact(model)
        if not_shared is not None and share_prompts is True:
            raise ValueError(
                f"share_prompts=True must have a model for which it is exact; {not_shared}. Use "
                "'auto' or False."
            )
        packed = share_prompts is not False and not_shared is None
        store = open_store(str(output), identity)
        source = tokenize(
            dataset,
            completions,
            processing_class,
            max_length=max_length,
            truncation_mode=truncation_mode,
        )
        scorer = Scorer(model, compute_dtype, pad_token_id(processing_class), inference_mode=ours)
        with fused_head(model), packed_attention(model, packed):
            report = fill(
                store,
                str(output),
                source,
                index_records(source),
                scorer,
                max_tokens=max_tokens_per_batch,
                per_token=per_token,
                rank=state.process_index,
                world_size=state.num_processes,
                verify_sample=verify_sample,
                progress=progress or Progress(),
            )
    report = replace(report, not_shared=not_shared)
    if report.sample is not None and state.num_processes > 1:
        from accelerate.utils import gather_object

        report = replace(report, sample=combined(gather_object([report.sample])))
    return report


def reference_of(
    model: Any,
    *,
    dtype: str,
    autocast: str,
    revision: str | None,
    attn_implementation: str | None,
    ref_adapter: str | os.PathLike[str] | None,
) -> tuple[Any, dict[str, Any]]:
    """Return the model that scores, loaded if it is a name, and its identity."""
    from .identity import model_identity
    from .reference import check_head, load_reference

    compute_dtype = autocast_dtype(autocast)
    if isinstance(model, (str, os.PathLike)):
        model = load_reference(
            os.fspath(model),
            dtype=dtype,
            revision=revision,
            attn_implementation=attn_implementation,
            ref_adapter=None if ref_adapter is None else os.fspath(ref_adapter),
        )
    elif ref_adapter is not None:
        raise ValueError("ref_adapter needs a model given by its path or name; pass a PeftModel.")
    name = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
    identity = model_identity(model, autocast=name)
    check_head(model)
    return model, identity


def _tell_slow_bf16(model: Any, autocast: torch.dtype | None) -> None:
    slow = slow_bf16(next(model.parameters()).device)
    remedies = []
    if autocast == torch.bfloat16:
        remedies.append("autocast 'no' here, bf16=False in the training")
    if has_bf16_weights(model):
        remedies.append("weights of dtype 'float32' in both")
    if slow is not None and remedies:
        print(f"fusedpo: {slow}. For fp32: {'; '.join(remedies)}.", file=sys.stderr)


def require_packages(*, peft: bool) -> None:
    """Raise ImportError with the remedy where an extra of fusedpo is not installed."""
    needed = ["trl", "transformers", "datasets", "accelerate", *(["peft"] if peft else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"precomputing needs {', '.join(missing)}, which is not installed: "
            'pip install "fusedpo[all]"'
        )


def _check_count(name: str, value: int, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
