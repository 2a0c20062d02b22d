"""The rows of a training: any form of preference data, brought to the columns that TRL wants, and
split so that no prompt is on both sides."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fusedpo.tools.formats import LabelledCompletion, PreferencePair, Problem, read_rows
from fusedpo.tools.formats.files import read_records
from fusedpo.tools.train.models import source_options
from fusedpo.tools.train.resolving import Resolved

_FILES = (".jsonl", ".json", ".csv", ".parquet")
# What SFTTrainer takes besides: columns of its own that no preference data has.
_SFT_COLUMNS = ({"text"}, {"messages"}, {"prompt", "completion"})


@dataclass(frozen=True)
class Data:
    """What is trained on, and what is held out.

    Attributes:
        train, evaluation: `datasets.Dataset`; evaluation is None without an eval_split.
        form: of the file, as `fusedpo.tools.formats` names it; "hub" where `datasets` loaded it.
        problems: rows that could not be read; they are left out.
        unused: rows without a use in this training (SFT learns from no bad completion).
    """

    train: Any
    evaluation: Any
    form: str
    problems: tuple[Problem, ...] = ()
    unused: int = 0

    @functools.cached_property
    def digest(self) -> str:
        """A SHA-256 of all rows, in their order."""
        content = hashlib.sha256()
        for side in (self.train, self.evaluation):
            for row in () if side is None else side:
                # default: times and the like, which JSON does not have.
                text = json.dumps(row, sort_keys=True, default=str)
                content.update(text.encode() + b"\n")
            content.update(b"\n")
        return content.hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the counts, the digest, and the first ten problems."""
        return {
            "form": self.form,
            "sha256": self.digest,
            "train_rows": len(self.train),
            "eval_rows": 0 if self.evaluation is None else len(self.evaluation),
            "unreadable_rows": len(self.problems),
            "problems": [f"{p.file}:{p.line}: {p.reason}" for p in self.problems[:10]],
            "unused_rows": self.unused,
        }


def load_data(run: Resolved) -> Data:
    """Read the rows of a training, and hold some out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file's form is unknown, or not one that the strategy can learn from; or
            there are too few rows to hold some out.
    """
    name, split = run.data["dataset_name"], run.settings.eval_split
    kind = run.strategy.trainer
    if _is_file(name):
        _check_file_options(run)
        train, form, problems, unused = _from_file(name, kind)
    else:
        train = _from_hub(run, run.data.get("dataset_train_split", "train"))
        form, problems, unused = "hub", (), 0
    if split is None:
        return Data(train, None, form, problems, unused)
    if isinstance(split, str):
        if not _is_file(split):
            return Data(train, _from_hub(run, split), form, problems, unused)
        held_out, _, more_problems, more_unused = _from_file(split, kind)
        return Data(train, held_out, form, problems + more_problems, unused + more_unused)
    return Data(*_hold_out(train, split, run.args.seed), form, problems, unused)


def check_chat_template(data: Data, run: Resolved, model: str) -> None:
    """Check that conversations can be turned into text.

    Args:
        data, run: from `load_data` and `resolve`.
        model: whose tokenizer it is.

    Raises:
        ValueError: there are messages, and the tokenizer has no chat template.
    """
    first = next(iter(data.train))
    has_messages = any(isinstance(first.get(name), list) for name in ("prompt", "messages"))
    if not has_messages or getattr(run.args, "chat_template_path", None) is not None:
        return
    from transformers import AutoTokenizer

    if AutoTokenizer.from_pretrained(model, **source_options(run)).chat_template is None:
        raise ValueError(
            f"{run.data['dataset_name']} has conversations, which need a chat template; the "
            f"tokenizer of {model} has none. Write them as texts with `fusedpo convert IN OUT --to "
            "preference --template chatml` (or hh, llama, zephyr, plain), or train another model."
        )


def prompts_of(dataset: Any, limit: int) -> list[Any]:
    """Return the first distinct prompts, texts or lists of messages; none where there are none."""
    if "prompt" not in dataset.column_names:
        return []
    found: dict[str, Any] = {}
    for prompt in dataset["prompt"]:
        found.setdefault(json.dumps(prompt, default=str), prompt)
        if len(found) == limit:
            break
    return list(found.values())


def _is_file(name: str) -> bool:
    """A name on the Hub has no such ending."""
    return os.path.splitext(name)[1].lower() in _FILES


def _check_file_options(run: Resolved) -> None:
    """A file has no splits and no configurations."""
    name, split = run.data["dataset_name"], run.settings.eval_split
    for key in ("dataset_train_split", "dataset_config"):
        if run.data.get(key) is not None:
            raise ValueError(f"{key} is for data on the Hub, and {name} is a file; leave it out.")
    if isinstance(split, str) and not _is_file(split):
        raise ValueError(
            f"eval_split must be a share between 0 and 1, a number of rows, or a file "
            f"({', '.join(_FILES)}), as {name} is a file; got {split!r}."
        )


def _from_hub(run: Resolved, split: str) -> Any:
    """A name on the Hub or a folder, which `datasets` reads; its columns must be TRL's."""
    from datasets import load_dataset

    return load_dataset(run.data["dataset_name"], run.data.get("dataset_config"), split=split)


def _from_file(path: str, kind: str) -> tuple[Any, str, tuple[Problem, ...], int]:
    from datasets import Dataset

    if kind == "sft" and _is_for_sft(path):
        found = list(read_records(path))
        rows = [row for _, row in found if isinstance(row, dict)]
        broken = [Problem(path, line, str(r)) for line, r in found if not isinstance(r, dict)]
        return Dataset.from_list(rows), "sft", tuple(broken), 0
    loaded = read_rows(path)
    rows = [each for row in loaded.rows for each in _columns(row.value, kind)]
    if not rows:
        wanted = {"kto": "pairs or labelled completions", "sft": "good completions"}
        raise ValueError(
            f"{path} must have {wanted.get(kind, 'pairs of a chosen and a rejected completion')} "
            f"for this strategy; got {len(loaded.rows)} rows of the form {loaded.form!r} without."
        )
    unused = len(loaded.rows) - len(rows)
    return Dataset.from_list(rows), loaded.form, tuple(loaded.problems), unused


def _is_for_sft(path: str) -> bool:
    first = next((row for _, row in read_records(path) if isinstance(row, dict)), {})
    columns = {name for name, value in first.items() if value is not None}
    labelled = columns & {"label", "kto_tag", "chosen", "rejected"}
    return not labelled and any(wanted <= columns for wanted in _SFT_COLUMNS)


def _columns(value: PreferencePair | LabelledCompletion, kind: str) -> Iterator[dict[str, Any]]:
    """Yield the rows that a value is to a trainer: none where it has no use for it."""
    if isinstance(value, PreferencePair):
        if kind == "sft":
            yield {"prompt": value.prompt, "completion": value.chosen}
        else:  # KTOTrainer takes pairs apart itself, in the order that its estimate of the KL needs
            yield {"prompt": value.prompt, "chosen": value.chosen, "rejected": value.rejected}
    elif kind == "kto":
        row = {"prompt": value.prompt, "completion": value.completion, "label": value.label}
        yield row
    elif kind == "sft" and value.label:
        yield {"prompt": value.prompt, "completion": value.completion}


def _hold_out(dataset: Any, size: float, seed: int) -> tuple[Any, Any]:
    """Split by prompts: the same prompt on both sides would let memory pass for learning."""
    keys = [json.dumps(row.get("prompt", row), default=str) for row in dataset]
    wanted = round(size * len(keys)) if size < 1 else int(size)
    prompts = sorted(set(keys))
    random.Random(seed).shuffle(prompts)
    counts = dict.fromkeys(prompts, 0)
    for key in keys:
        counts[key] += 1
    held_out: set[str] = set()
    rows = 0
    for prompt in prompts:
        if rows >= wanted:
            break
        held_out.add(prompt)
        rows += counts[prompt]
    if not 0 < rows < len(keys):
        raise ValueError(
            f"eval_split {size} must leave rows on both sides; of {len(keys)} rows with "
            f"{len(prompts)} different prompts it holds out {rows}."
        )
    train = [index for index, key in enumerate(keys) if key not in held_out]
    evaluation = [index for index, key in enumerate(keys) if key in held_out]
    return dataset.select(train), dataset.select(evaluation)
