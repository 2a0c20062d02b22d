"""Options that several subcommands have, with their help."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

WHAT = "What to score"
HOW = "How to score: as in the training, or its records will not be found"
DATA_HELP = (
    "A file (.jsonl, .json, .csv, .parquet, .arrow), a directory, or a data set's name on the "
    "Hugging Face Hub; rows with prompt, chosen, rejected, or prompt, completion; text or messages."
)


def length(text: str | int) -> int:
    """A number of tokens; 0 for "none", as None would mean that nothing was given."""
    if text == "none":
        return 0
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise typer.BadParameter(f'must be a number of tokens, or "none"; got {text}')
    return value


Store = Annotated[str, typer.Argument(metavar="DIR", help="The store's directory.")]
Model = Annotated[
    str,
    typer.Option(
        metavar="M", help="The reference: a path, or a name on the Hub.", show_default=False
    ),
]
Data = Annotated[str, typer.Option(metavar="D", help=DATA_HELP, show_default=False)]
OptionalData = Annotated[str | None, typer.Option(metavar="D", help=DATA_HELP)]
Split = Annotated[str | None, typer.Option(metavar="S", help='Which split. Default: "train".')]
Revision = Annotated[
    str | None, typer.Option(metavar="R", help="Which revision of the model on the Hub.")
]
TokenizerModel = Annotated[
    str | None,
    typer.Option(
        metavar="M",
        help="Whose tokenizer to use. Default: that of the model the store was made with.",
    ),
]
MaxLength = Annotated[
    int,
    typer.Option(
        parser=length,
        metavar="N",
        help='Cut prompt and completion to N tokens, as DPOConfig.max_length; "none": do not cut.',
    ),
]
TruncationMode = Annotated[
    Literal["keep_start", "keep_end"],
    typer.Option(help="Which end to keep, as DPOConfig.truncation_mode."),
]
RefAdapter = Annotated[
    str | None,
    typer.Option(
        metavar="DIR", rich_help_panel=HOW, help="A PEFT adapter that belongs to the reference."
    ),
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16", "auto"],
    typer.Option(rich_help_panel=HOW, help="Of the weights; auto: as saved."),
]
Autocast = Annotated[
    Literal["auto", "bf16", "fp16", "no"],
    typer.Option(rich_help_panel=HOW, help="auto: bf16, as a training with DPOConfig's defaults."),
]
Attention = Annotated[
    str | None,
    typer.Option(
        metavar="A",
        rich_help_panel=HOW,
        help="E.g. sdpa, eager; with flash_attention_2 no prompt is shared.",
    ),
]
Abandoned = Annotated[
    bool,
    typer.Option(
        "--abandoned",
        help="Also take over logs that were never closed, of runs that were killed; only when no "
        "run writes to the store.",
    ),
]
