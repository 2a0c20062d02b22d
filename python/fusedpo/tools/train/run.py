"""`fusedpo train`: one training, or several stages of it, from configurations."""

from __future__ import annotations

import gc
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, overload

from fusedpo.tools.train import memory
from fusedpo.tools.train.data import Data, check_chat_template, load_data, prompts_of
from fusedpo.tools.train.kl import KLEstimate, estimate_kl
from fusedpo.tools.train.memory import MemoryEstimate, estimate_memory
from fusedpo.tools.train.models import load, whole_model
from fusedpo.tools.train.options import read_config
from fusedpo.tools.train.peak import PeakMemory
from fusedpo.tools.train.report import FILE, TrainReport, warnings_of
from fusedpo.tools.train.resolving import Resolved, resolve
from fusedpo.tools.train.trainers import build, fused_head, trainer_class

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


@overload
def train(
    config: Config, *, output_dir: str | None = None, dry_run: Literal[False] = False
) -> TrainReport: ...
@overload
def train(config: Config, *, output_dir: str | None = None, dry_run: Literal[True]) -> Plan: ...
def train(
    config: Config, *, output_dir: str | None = None, dry_run: bool = False
) -> TrainReport | Plan:
    """Train from one configuration, with TRL's trainers.

    Args:
        config: a .json or .yaml file, or a mapping; docs/tools/train.md lists what may be in it.
        output_dir: in place of the configuration's.
        dry_run: read the configuration and the data, estimate the memory, write nothing.

    Returns:
        TrainReport, which is in `output_dir` as report.json and report.md, too; or with `dry_run`
        a Plan.

    Raises:
        ValueError, ImportError, RuntimeError, FileNotFoundError: what `resolve` and `load_data`
            refuse, before anything is written.

    Example:

        train({"strategy": "dpo", "model_name": "Qwen/Qwen2.5-0.5B-Instruct",
               "dataset": "pairs.jsonl", "eval_split": 0.1}).accuracy
    """
    plans = plan_stages([config], output_dir=output_dir)
    return plans[0] if dry_run else run_plan(plans[0])


def train_stages(configs: Sequence[Config], *, output_dir: str | None = None) -> list[TrainReport]:
    """Train one configuration after the other, each on the model of the one before.

    All of them are checked before the first one begins.

    Args:
        configs: the first one names the model; the others leave it out, or name the same one.
        output_dir: with several configurations a folder for the folders of all stages.

    Raises:
        as `train`; and ValueError where two stages would share an output_dir or name different
        models.
    """
    return [run_plan(plan) for plan in plan_stages(configs, output_dir=output_dir)]


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
        check_chat_template(data, run, begins)
        plans.append(Plan(run, data, estimate_memory(run, begins)))
    return plans


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


def run_plan(plan: Plan) -> TrainReport:
    """Train, evaluate, save, and write the report."""
    run, data = plan.run, plan.data
    told = run.as_dict()  # a trainer changes its arguments
    # Of a training before: until this one is over, the folder is not finished.
    pathlib.Path(run.output_dir, FILE).unlink(missing_ok=True)
    model = whole_model(run)
    kind = trainer_class(run.strategy.trainer)  # imported here: modules are no memory of a training
    with fused_head(run):
        with PeakMemory() as peak:
            trainer = build(kind, run, data, model)
            result = trainer.train(resume_from_checkpoint=run.args.resume_from_checkpoint)
        metrics = {**result.metrics, **_last_logged(trainer)}
        if data.evaluation is not None:
            metrics |= _evaluated(trainer)
    speed = _tokens_per_second(trainer, metrics["train_runtime"])
    rows = data.as_dict()
    trainer.save_model()
    trainer.save_state()
    kl = _kl(trainer, run, data, model)
    report = TrainReport(
        strategy=run.strategy.name,
        model=run.model,
        output_dir=run.output_dir,
        model_dir=run.output_dir,
        metrics=metrics,
        kl=kl,
        tokens_per_second=speed,
        peak_memory=peak.peak - (peak.before if peak.device == "process" else 0),
        memory=plan.memory,
        data=rows,
        run=told,
        plot=_plot(trainer, run.output_dir),
        warnings=tuple(warnings_of(metrics, kl, rows)),
    )
    if trainer.is_world_process_zero():
        report.write()
    del trainer
    gc.collect()  # a trainer is in cycles, and holds the model and the optimizer
    return report


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in entry.items() if isinstance(v, (int, float))}


def _last_logged(trainer: Any) -> dict[str, float]:
    """The last step's metrics, as `train_...`."""
    logged = [each for each in trainer.state.log_history if "loss" in each]
    last = _numbers(logged[-1]) if logged else {}
    return {f"train_{name}": value for name, value in last.items() if name not in ("loss", "step")}


def _evaluated(trainer: Any) -> dict[str, float]:
    """The evaluation of the model as it is now, which the training may have made already."""
    state, best = trainer.state, trainer.args.load_best_model_at_end
    made = [entry for entry in state.log_history if "eval_loss" in entry]
    if not made or made[-1]["step"] != state.global_step or best:
        trainer.evaluate()
    last = next(entry for entry in reversed(state.log_history) if "eval_loss" in entry)
    return {k: v for k, v in _numbers(last).items() if k.startswith("eval_")}


def _tokens_per_second(trainer: Any, seconds: float) -> float | None:
    logged = [each for each in trainer.state.log_history if "num_tokens" in each]
    sides = ["chosen_input_ids", "rejected_input_ids"]
    if logged:  # not after every step
        last = logged[-1]
        tokens = last["num_tokens"] * trainer.state.global_step / last["step"]
    elif set(sides) <= set(trainer.train_dataset.column_names):  # CPO and ORPO do not count them
        rows = trainer.train_dataset.select_columns(sides)
        tokens = sum(len(ids) for row in rows for ids in row.values()) * trainer.state.epoch
    else:
        return None
    return float(tokens / seconds) if seconds else None


def _kl(trainer: Any, run: Resolved, data: Data, model: str) -> KLEstimate | str:
    """KL to the model as it was before, on held-out prompts, in the precision of the training; or
    why there is none."""
    if data.evaluation is None:
        return "nothing was held out"
    if not run.settings.kl_prompts:
        return "kl_prompts is 0"
    prompts = prompts_of(data.evaluation, run.settings.kl_prompts)
    if not prompts:
        return "the data has no column prompt"
    policy = trainer.accelerator.unwrap_model(trainer.model)
    reference = None
    if run.peft is None:
        reference = load(model, run).to(policy.device)
    with trainer.accelerator.autocast():
        try:
            return estimate_kl(
                policy,
                reference,
                trainer.processing_class,
                prompts,
                max_new_tokens=run.settings.kl_max_new_tokens,
                batch_size=run.args.per_device_eval_batch_size,
                seed=run.args.seed,
            )
        except ValueError as error:  # the training is done, and shall have its report
            return str(error)


def _plot(trainer: Any, folder: str) -> str | None:
    """Draw the curves; without matplotlib, or where nothing was logged, there is no plot."""
    logged = any("loss" in entry or "eval_loss" in entry for entry in trainer.state.log_history)
    if find_spec("matplotlib") is None or not logged or not trainer.is_world_process_zero():
        return None
    from fusedpo.tools.plot import plot

    return plot([folder], os.path.join(folder, "plot.png")).path
