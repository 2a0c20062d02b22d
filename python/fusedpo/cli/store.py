"""`fusedpo precompute` and what else makes, shows and changes a reference store."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

import fusedpo
from fusedpo import RefStore
from fusedpo._precompute.filling import open_store
from fusedpo._precompute.run import reference_of, require_packages
from fusedpo.cli import options as opt
from fusedpo.cli import output
from fusedpo.cli.command import Result
from fusedpo.store import verify as verify_store

_SHARE_PROMPTS: dict[str, str | bool] = {"auto": "auto", "always": True, "never": False}
RUN = "How to run"


def precompute(
    *,
    model: opt.Model,
    data: opt.Data,
    output_dir: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="DIR",
            help="The store's directory; made if not there.",
            show_default=False,
        ),
    ],
    split: opt.Split = None,
    ref_adapter: opt.RefAdapter = None,
    max_length: opt.MaxLength = 1024,
    truncation_mode: opt.TruncationMode = "keep_start",
    dtype: opt.Dtype = "float32",
    autocast: opt.Autocast = "auto",
    revision: opt.Revision = None,
    attn_implementation: opt.Attention = None,
    max_tokens_per_batch: Annotated[
        int,
        typer.Option(
            metavar="N",
            rich_help_panel=RUN,
            help="Tokens that the model computes for a batch; bounds the memory.",
        ),
    ] = 8192,
    share_prompts: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(
            rich_help_panel=RUN,
            help="Compute a prompt once for all its completions, without padding: where that is "
            "exact, or fail where it is not, or never.",
        ),
    ] = "auto",
    per_token: Annotated[
        bool,
        typer.Option(
            "--per-token",
            rich_help_panel=RUN,
            help="Store each token's log-prob, too; DPOConfig(ld_alpha=...) needs them.",
        ),
    ] = False,
    verify_sample: Annotated[
        int,
        typer.Option(
            metavar="N",
            rich_help_panel=RUN,
            help="Score N records again, one by one, and report the largest difference; exit code "
            "1 where one differs by more than rounding allows.",
        ),
    ] = 0,
) -> Result:
    """Score a data set with the reference model, into a store; run it again after an interruption,
    and it does what is missing."""
    report = fusedpo.precompute(
        model,
        data,
        output_dir,
        split=split,
        ref_adapter=ref_adapter,
        max_length=max_length or None,
        truncation_mode=truncation_mode,
        dtype=dtype,
        autocast=autocast,
        revision=revision,
        attn_implementation=attn_implementation,
        max_tokens_per_batch=max_tokens_per_batch,
        share_prompts=_SHARE_PROMPTS[share_prompts],
        per_token=per_token,
        verify_sample=verify_sample,
        progress=output.ProgressBar() if output.is_main_process() else None,
    )
    failed = report.sample is not None and report.sample.disagreeing > 0
    return Result(report.as_dict(), output.precompute_text(report), 1 if failed else 0)


def inspect(store: opt.Store) -> Result:
    """Show what a store holds and which reference it belongs to."""
    report = RefStore(store).inspect()
    return Result(report, output.inspect_text(report))


def verify(store: opt.Store) -> Result:
    """Check every checksum, the order and the counts of a store."""
    report = verify_store(store)
    # The files and problems are named tuples, which JSON would make lists.
    fields = asdict(report)
    for name in ("problems", "notes", "files"):
        fields[name] = [each._asdict() for each in getattr(report, name)]
    return Result(fields, output.verify_text(store, report), 0 if report.ok else 1)


def merge(store: opt.Store, abandoned: opt.Abandoned = False) -> Result:
    """Put all logs of a store into one sorted snapshot."""
    report = _writable(store).merge(abandoned=abandoned)
    return Result(asdict(report), output.merge_text(store, report))


def export(
    store: opt.Store,
    *,
    output_file: Annotated[
        str,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Records: .parquet or .arrow; a data set: .parquet or .jsonl.",
            show_default=False,
        ),
    ],
    data: opt.OptionalData = None,
    split: opt.Split = None,
    model: opt.TokenizerModel = None,
    revision: opt.Revision = None,
    max_length: opt.MaxLength = 1024,
    truncation_mode: opt.TruncationMode = "keep_start",
) -> Result:
    """Write a store's records, or (with --data) a data set with columns ref_chosen_logps and
    ref_rejected_logps, to a file."""
    records = RefStore(store)
    if data is None:
        rows = records.export(output_file)
    else:
        from fusedpo._precompute import tables

        texts = _texts(records, data, split, model, revision)
        dataset = tables.with_columns(records, *texts, **_lengths(max_length, truncation_mode))
        tables.write(dataset, output_file)
        rows = len(dataset)
    return Result({"output": output_file, "rows": rows}, f"{output_file}: {rows} rows")


def import_(
    store: opt.Store,
    *,
    model: opt.Model,
    data: opt.Data,
    split: opt.Split = None,
    ref_adapter: opt.RefAdapter = None,
    max_length: opt.MaxLength = 1024,
    truncation_mode: opt.TruncationMode = "keep_start",
    dtype: opt.Dtype = "float32",
    autocast: opt.Autocast = "auto",
    revision: opt.Revision = None,
    attn_implementation: opt.Attention = None,
) -> Result:
    """Take reference log-probs from a data set's columns ref_chosen_logps and ref_rejected_logps
    into a store."""
    require_packages(peft=ref_adapter is not None)
    from fusedpo._precompute import tables

    _, identity = reference_of(
        model,
        dtype=dtype,
        autocast=autocast,
        revision=revision,
        attn_implementation=attn_implementation,
        ref_adapter=ref_adapter,
    )
    into = open_store(store, identity)
    texts = _texts(into, data, split, model, revision)
    records = tables.take_columns(into, *texts, **_lengths(max_length, truncation_mode))
    report = {"store": store, "imported": records, "records": len(into)}
    text = f"{store}: imported {records} values; {len(into)} records are there now"
    return Result(report, text)


def prune(
    store: opt.Store,
    *,
    data: opt.Data,
    split: opt.Split = None,
    model: opt.TokenizerModel = None,
    revision: opt.Revision = None,
    max_length: opt.MaxLength = 1024,
    truncation_mode: opt.TruncationMode = "keep_start",
    abandoned: opt.Abandoned = False,
) -> Result:
    """Drop every record that a data set does not have."""
    from fusedpo._precompute import tables

    records = _writable(store)
    texts = _texts(records, data, split, model, revision)
    lengths = _lengths(max_length, truncation_mode)
    report = tables.prune(records, *texts, **lengths, abandoned=abandoned)
    return Result(asdict(report), output.merge_text(store, report))


def doctor() -> Result:
    """Tell what is built, loaded and supported, and what to do about the rest."""
    from fusedpo import _doctor

    report = _doctor.examine()
    return Result(report, _doctor.render(report), 1 if report["broken"] else 0)


def _texts(
    store: RefStore, data: str, split: str | None, model: str | None, revision: str | None
) -> tuple[Any, Any]:
    """The data set, and the tokenizer of the model that is named, or that made the store."""
    require_packages(peft=False)
    from fusedpo._precompute.data import load_data
    from fusedpo._precompute.reference import load_processing_class

    model = model or store.identity.get("info", {}).get("model")
    if not model:
        raise ValueError("the store does not tell its model. Name one: --model M")
    return load_data(data, split), load_processing_class(model, revision)


def _writable(path: str) -> RefStore:
    RefStore(path)  # says that there is no store, where "a" would ask for what a new one needs
    return RefStore(path, "a")


def _lengths(max_length: int, truncation_mode: str) -> dict[str, Any]:
    return {"max_length": max_length or None, "truncation_mode": truncation_mode}
