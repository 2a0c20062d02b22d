"""What the `fusedpo` command accepts, and its help."""

from __future__ import annotations

import argparse
from typing import Any

import fusedpo

_DATA_HELP = (
    "a file (.jsonl, .json, .csv, .parquet, .arrow), a directory, or a data set's name on the "
    "Hugging Face Hub; rows with prompt, chosen, rejected, or prompt, completion; text or messages"
)
_EPILOG = """\
exit codes: 0 done; 1 it failed, or a check found something; 2 wrong usage;
            130, 143 stopped by Ctrl-C, by SIGTERM (run it again to go on)

example: score the reference once, look at the result, train with it
  fusedpo precompute --model Qwen/Qwen2.5-0.5B-Instruct --data pairs.jsonl --output refs/
  fusedpo inspect refs/
  FusedDPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", ref_store="refs/", ...)      in Python

several processes share the work:
  torchrun --nproc-per-node 8 -m fusedpo precompute --model ... --data ... --output refs/
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fusedpo",
        description="Reference log-probabilities for preference optimisation: computed once, kept "
        "in a store, looked up in every training.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fusedpo {fusedpo.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _precompute(commands)
    _inspect(commands)
    _verify(commands)
    _merge(commands)
    _export(commands)
    _import(commands)
    _prune(commands)
    _add(
        commands,
        "doctor",
        "tell what is built, loaded and supported, and what to do about the rest",
        store=False,
    )
    return parser


def _add(commands: Any, name: str, what: str, *, store: bool = True) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + "."
    )
    if store:
        parser.add_argument("store", metavar="DIR", help="the store's directory")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


def _precompute(commands: Any) -> None:
    parser = _add(
        commands,
        "precompute",
        "score a data set with the reference model, into a store; run it again after an "
        "interruption, and it does what is missing",
        store=False,
    )
    needed = parser.add_argument_group("what to score")
    _model_arguments(needed)
    _data_arguments(needed)
    needed.add_argument(
        "--output", required=True, metavar="DIR", help="the store's directory; made if not there"
    )
    _scoring_arguments(parser)
    run = parser.add_argument_group("how to run")
    run.add_argument(
        "--max-tokens-per-batch",
        type=int,
        default=8192,
        metavar="N",
        help="tokens that the model computes for a batch; bounds the memory (default: %(default)s)",
    )
    run.add_argument(
        "--share-prompts",
        choices=("auto", "always", "never"),
        default="auto",
        help="compute a prompt once for all its completions, without padding: where that is exact, "
        "or fail where it is not, or never (default: %(default)s)",
    )
    run.add_argument(
        "--per-token",
        action="store_true",
        help="store each token's log-prob, too; DPOConfig(ld_alpha=...) needs them",
    )
    run.add_argument(
        "--verify-sample",
        type=int,
        default=0,
        metavar="N",
        help="score N records again, one by one, and report the largest difference; exit code 1 "
        "where one differs by more than rounding allows",
    )


def _inspect(commands: Any) -> None:
    _add(commands, "inspect", "show what a store holds and which reference it belongs to")


def _verify(commands: Any) -> None:
    _add(commands, "verify", "check every checksum, the order and the counts of a store")


def _merge(commands: Any) -> None:
    parser = _add(commands, "merge", "put all logs of a store into one sorted snapshot")
    _abandoned_argument(parser)


def _export(commands: Any) -> None:
    parser = _add(
        commands,
        "export",
        "write a store's records, or a data set with columns ref_chosen_logps and "
        "ref_rejected_logps, to a file",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help="records: .parquet or .arrow; a data set: .parquet or .jsonl",
    )
    data = parser.add_argument_group("a data set with columns, instead of bare records")
    _data_arguments(data, required=False)
    _tokenizer_arguments(data)


def _import(commands: Any) -> None:
    parser = _add(
        commands,
        "import",
        "take reference log-probs from a data set's columns ref_chosen_logps and "
        "ref_rejected_logps into a store",
    )
    needed = parser.add_argument_group("what the values belong to")
    _model_arguments(needed)
    _data_arguments(needed)
    _scoring_arguments(parser)


def _prune(commands: Any) -> None:
    parser = _add(commands, "prune", "drop every record that a data set does not have")
    data = parser.add_argument_group("what to keep")
    _data_arguments(data)
    _tokenizer_arguments(data)
    _abandoned_argument(parser)


def _abandoned_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--abandoned",
        action="store_true",
        help="also take over logs that were never closed, of runs that were killed; only when no "
        "run writes to the store",
    )


def _model_arguments(group: Any) -> None:
    group.add_argument(
        "--model", required=True, metavar="M", help="the reference: a path, or a name on the Hub"
    )


def _data_arguments(group: Any, *, required: bool = True) -> None:
    group.add_argument("--data", required=required, metavar="D", help=_DATA_HELP)
    group.add_argument("--split", metavar="S", help='which split (default: "train")')


def _tokenizer_arguments(group: Any) -> None:
    group.add_argument(
        "--model",
        metavar="M",
        help="whose tokenizer to use (default: that of the model the store was made with)",
    )
    group.add_argument("--revision", metavar="R", help="which revision of it on the Hub")
    _length_arguments(group)


def _length_arguments(group: Any) -> None:
    group.add_argument(
        "--max-length",
        type=_length,
        default=1024,
        metavar="N",
        help='cut prompt and completion to N tokens, as DPOConfig.max_length; "none": do not cut '
        "(default: %(default)s)",
    )
    group.add_argument(
        "--truncation-mode",
        choices=("keep_start", "keep_end"),
        default="keep_start",
        help="which end to keep, as DPOConfig.truncation_mode (default: %(default)s)",
    )


def _scoring_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "how to score",
        "as in the training, or its records will not be found; the defaults are DPOConfig's",
    )
    group.add_argument(
        "--ref-adapter", metavar="DIR", help="a PEFT adapter that belongs to the reference"
    )
    _length_arguments(group)
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "auto"),
        default="float32",
        help="of the weights; auto: as saved (default: %(default)s)",
    )
    group.add_argument(
        "--autocast",
        choices=("auto", "bf16", "fp16", "no"),
        default="auto",
        help="auto: bf16, as a training with DPOConfig's defaults (default: %(default)s)",
    )
    group.add_argument("--revision", metavar="R", help="which revision of the model on the Hub")
    group.add_argument(
        "--attn-implementation", metavar="A", help="e.g. sdpa, eager, flash_attention_2"
    )


def _length(text: str) -> int | None:
    return None if text == "none" else int(text)
