"""A training that could begin: resolved, its data read, its memory estimated, nothing written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusedpo.tools.train import memory
from fusedpo.tools.train.data import Data, check_chat_template, load_data
from fusedpo.tools.train.memory import MemoryEstimate, estimate_memory
from fusedpo.tools.train.options import read_config
from fusedpo.tools.train.resolving import Resolved, resolve

Config = str | os.PathLike[str] | Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """A training that could begin: what `--dry-run` shows."""

    run: Resolved
    data: Data
    memory: MemoryEstimate

    def as_dict(self) -> dict[str, Any]:
        """Return everything in JSON's types."""
        return {
            "run": self.run.as_dict(),
            "data": self.data.as_dict(),
            "memory_estimate": self.memory.as_dict(),
        }

    def render(self) -> Any:
        """Return a rich table; of TRL's arguments those that are not at their defaults."""
        from rich.table import Table

        told, rows = self.run.as_dict(), self.data.as_dict()
        table = Table(title=f"{told['trainer']} on {self.run.model}", show_header=False)
        for name in self.run.changed:
            table.add_row(name, str(told["arguments"][name]))
        for name, value in self.run.model_options.items():
            table.add_row(f"model: {name}", str(value))
        for name in ("r", "lora_alpha", "lora_dropout", "target_modules"):
            if self.run.peft is not None:
                table.add_row(f"LoRA: {name}", str(told["peft"][name]))
        if self.run.quantization is not None:
            table.add_row("quantization", str(told["quantization"]))
        table.add_row("rows", f"{rows['train_rows']} trained, {rows['eval_rows']} held out")
        for problem in rows["problems"]:
            table.add_row("not readable", problem)
        table.add_section()
        for name, size in memory.table(self.memory).items():
            table.add_row(f"memory: {name}", size)
        table.add_section()
        for note in self.run.notes:
            table.add_row("note", note)
        return table


def plan_stages(configs: Sequence[Config], *, output_dir: str | None = None) -> list[Plan]:
    """Resolve every stage, read its data and estimate its memory; nothing is written."""
    given = [read_config(config) for config in configs]
    plans: list[Plan] = []
    for number, stage in enumerate(given, start=1):
        folder = output_dir
        if output_dir is not None and len(given) > 1:
            folder = os.path.join(output_dir, f"{number}-{stage.get('strategy')}")
        run = _stage(stage, folder, plans)
        begins = plans[0].run.model if plans else run.model
        data = load_data(run)
        if not any(_brings_template(before.run) for before in plans):
            check_chat_template(data, run, begins)
        plans.append(Plan(run, data, estimate_memory(run, begins)))
    return plans


def _brings_template(run: Resolved) -> bool:
    """Whether the tokenizer has a chat template after this stage, whatever it had before."""
    return getattr(run.args, "chat_template_path", None) is not None


def _stage(stage: dict[str, Any], folder: str | None, before: Sequence[Plan]) -> Resolved:
    if not before:
        return resolve(stage, output_dir=folder)
    names = ("model_name", "model_name_or_path")
    first, own = before[0].run.model, next((stage[name] for name in names if name in stage), None)
    if own not in (None, first):
        raise ValueError(
            f"every stage goes on with the model of the one before, which began with {first!r}; a "
            f"later one names {own!r}. Leave model_name out there, or train it by itself."
        )
    stage = {key: value for key, value in stage.items() if key not in names}
    last = before[-1].run.output_dir
    if folder is None and "output_dir" not in stage:
        folder = f"{os.path.basename(first.rstrip('/'))}-{stage.get('strategy')}"
    run = resolve({**stage, "model_name": last}, output_dir=folder)
    if run.output_dir in [plan.run.output_dir for plan in before]:
        raise ValueError(f"every stage must have an output_dir of its own; two have {folder!r}.")
    return run
