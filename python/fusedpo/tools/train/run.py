"""`fusedpo train`: one training, or several stages of it, from configurations."""

from __future__ import annotations

import gc
import os
import pathlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, overload

from fusedpo.tools.runs import STATE_FILE
from fusedpo.tools.train.data import Data, prompts_of
from fusedpo.tools.train.kl import KLEstimate, estimate_kl
from fusedpo.tools.train.models import load, whole_model
from fusedpo.tools.train.peak import PeakMemory
from fusedpo.tools.train.plan import Config, Plan, plan_stages
from fusedpo.tools.train.report import FILE, TrainReport, warnings_of
from fusedpo.tools.train.resolving import Resolved
from fusedpo.tools.train.trainers import build, fused_head, trainer_class


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
            refuse, and an `output_dir` with the checkpoints of another training, before anything
            is written.

    Example:

        train({"strategy": "dpo", "model_name": "Qwen/Qwen2.5-0.5B-Instruct",
               "dataset": "pairs.jsonl", "eval_split": 0.1}).accuracy
    """
    plan = plan_stages([config], output_dir=output_dir)[0]
    if dry_run:
        return plan
    _refuse_checkpoints(plan)
    return run_plan(plan)


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
    plans = plan_stages(configs, output_dir=output_dir)
    for plan in plans:
        _refuse_checkpoints(plan)
    return [run_plan(plan) for plan in plans]


def _refuse_checkpoints(plan: Plan) -> None:
    """A second training would mix its checkpoints with those of the first."""
    folder = pathlib.Path(plan.run.output_dir)
    if plan.run.args.resume_from_checkpoint is None and any(folder.glob("checkpoint-*")):
        raise ValueError(
            f"{folder} has checkpoints of another training; remove them, name another output_dir, "
            "or set resume_from_checkpoint."
        )


def run_plan(plan: Plan) -> TrainReport:
    """Train, evaluate, save, and write the report."""
    run, data = plan.run, plan.data
    told = run.as_dict()  # a trainer changes its arguments
    rows = data.as_dict()
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
    # The training is done, and shall have its report: what fails here is told there.
    try:
        reference = load(model, run).to(policy.device) if run.peft is None else None
        with trainer.accelerator.autocast():
            return estimate_kl(
                policy,
                reference,
                trainer.processing_class,
                prompts,
                max_new_tokens=run.settings.kl_max_new_tokens,
                batch_size=run.args.per_device_eval_batch_size,
                seed=run.args.seed,
            )
    except (ValueError, RuntimeError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def _plot(trainer: Any, folder: str) -> str | None:
    """Draw the curves; without matplotlib, or where nothing was logged, there is no plot."""
    logged = any("loss" in entry or "eval_loss" in entry for entry in trainer.state.log_history)
    if find_spec("matplotlib") is None or not logged or not trainer.is_world_process_zero():
        return None
    from fusedpo.tools.plot import plot

    # By the file: a folder may have a checkpoint with more steps, of a training before.
    state = os.path.join(folder, STATE_FILE)
    return plot([state], os.path.join(folder, "plot.png")).path
