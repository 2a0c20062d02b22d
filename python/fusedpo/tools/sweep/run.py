"""Trainings that differ in beta and loss, and share one reference store.

A run is finished when its folder has a report.json, which is written last and whole. A sweep that
was killed goes on by the same command: finished runs are read, a run that was cut off begins again,
and what the store has is not scored twice.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from fusedpo.tools.sweep.report import SweepReport, SweepRun
from fusedpo.tools.train.options import read_config
from fusedpo.tools.train.plan import Config, Plan, plan_stages
from fusedpo.tools.train.report import FILE
from fusedpo.tools.train.requirements import require_packages
from fusedpo.tools.train.run import run_plan
from fusedpo.tools.train.strategies import find

# Options of the reference, which losses without one have no use for.
_REFERENCE = ("ref_store", "ref_miss", "ref_identity", "share_prompts", "precompute_ref_log_probs")
# Paths, which may be written in several ways (the rows are compared by their content), and what
# only tells of other options.
_NOT_COMPARED = frozenset(
    {"arguments.output_dir", "settings.ref_store", "data.dataset_name", "notes", "changed"}
)


def sweep(
    config: Config,
    *,
    betas: Sequence[float] = (),
    losses: Sequence[str] = (),
    output_dir: str | None = None,
) -> SweepReport:
    """Train once for every loss and every beta, on one reference store.

    Every combination is checked before the first training begins.

    Args:
        config: as for `fusedpo.tools.train.train`.
        betas: values of beta; none: the configuration's.
        losses: strategies with preferences (sigmoid, ipo, simpo, orpo, ...); none: the
            configuration's strategy.
        output_dir: the sweep's folder, in place of the configuration's.

    Returns:
        SweepReport, which is in the folder as sweep.json and sweep.md, too.

    Raises:
        ValueError: nothing to sweep over, a value twice, an unknown loss, an option that one of
            the losses does not have, or a run in the folder that was made with another
            configuration; and whatever `train` raises.

    Example:

        sweep("dpo.yaml", betas=[0.05, 0.1], losses=["sigmoid", "ipo"], output_dir="sweep").runs
    """
    require_packages()
    given = read_config(config)
    _check(betas, losses)
    folder = output_dir or given.get("output_dir") or _default_folder(given)
    own_store = given.get("ref_store")
    store = own_store if isinstance(own_store, str) else os.path.join(folder, "refs")
    planned: list[tuple[str, str, float | None, Plan]] = []
    named = losses or [str(given.get("strategy"))]
    values: Sequence[float | None] = betas or [None]
    for loss, beta in itertools.product(named, values):
        name = loss if beta is None else f"{loss}-beta{repr(float(beta)).removesuffix('.0')}"
        options = _options(given, loss, beta, store, named=bool(losses))
        plans = plan_stages([options], output_dir=os.path.join(folder, "runs", name))
        planned.append((name, loss, beta, plans[0]))
    finished = {name: _finished(plan) for name, _, _, plan in planned}
    runs = []
    for name, loss, beta, plan in planned:
        report, reused = finished[name], finished[name] is not None
        if report is None:
            _clear(plan.run.output_dir)
            report = run_plan(plan).as_dict()
        runs.append(SweepRun(name, loss, beta, plan.run.output_dir, reused, report))
    uses_store = any(plan.run.uses_store for _, _, _, plan in planned)
    main = _processes().is_main_process
    plot = _plot(folder, runs) if main else None
    done = SweepReport(folder, store if uses_store else None, tuple(runs), plot)
    if main:
        done.write()
    return done


def _check(betas: Sequence[float], losses: Sequence[str]) -> None:
    if not betas and not losses:
        raise ValueError("a sweep must have several values of beta or loss; got none.")
    for name, values in (("beta", betas), ("loss", losses)):
        if len(set(values)) < len(values):
            raise ValueError(f"every {name} must be there once; got {list(values)}.")
    for loss in losses:
        if find(loss).trainer == "sft":
            raise ValueError("sft has no beta and learns from no pairs; train it by itself.")


def _default_folder(given: Mapping[str, Any]) -> str:
    model = given.get("model_name") or given.get("model_name_or_path") or "model"
    return f"{os.path.basename(str(model).rstrip('/'))}-sweep"


def _options(
    given: Mapping[str, Any], loss: str, beta: float | None, store: str, *, named: bool
) -> dict[str, Any]:
    """Return the configuration of one run."""
    options = dict(given)
    if named:
        options.pop("loss_type", None)
        options["strategy"] = loss
    if beta is not None:
        options["beta"] = beta
    if find(loss).trainer != "dpo":
        return {key: value for key, value in options.items() if key not in _REFERENCE}
    in_memory = options.get("ref_store") is False or options.get("sync_ref_model")
    if not in_memory and options.get("precompute_ref_log_probs") is not False:
        options["ref_store"] = store
    return options


def _finished(plan: Plan) -> dict[str, Any] | None:
    """Return the report of a run that was finished before, or None.

    Raises:
        ValueError: it was made with another configuration or other data.
    """
    file = pathlib.Path(plan.run.output_dir, FILE)
    if not file.is_file():
        return None
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    now = json.loads(json.dumps({**_flat(plan.run.as_dict()), "rows": plan.data.digest}))
    before = {**_flat(report["run"]), "rows": report["data"]["sha256"]}
    differing = sorted(k for k in now.keys() | before.keys() if now.get(k) != before.get(k))
    if differing:
        told = "; ".join(f"{k} was {before.get(k)!r}, is {now.get(k)!r}" for k in differing[:5])
        raise ValueError(
            f"{plan.run.output_dir} was trained with another configuration: {told}. Use another "
            "output_dir, or remove that folder."
        )
    return report


def _clear(folder: str) -> None:
    """Remove what a kill has left of a run."""
    if _processes().is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    _processes().wait_for_everyone()


def _processes() -> Any:
    from accelerate import PartialState

    return PartialState()


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run by one name each, but for those that say where things are."""
    flat: dict[str, Any] = {}
    for name, value in run.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{inner}": each for inner, each in value.items()}
        else:
            flat[name] = value
    return {name: value for name, value in flat.items() if name not in _NOT_COMPARED}


def _plot(folder: str, runs: Sequence[SweepRun]) -> str | None:
    with_plot = [run.folder for run in runs if run.report["plot"] is not None]
    if find_spec("matplotlib") is None or not with_plot:
        return None
    from fusedpo.tools.plot import plot

    return plot(with_plot, os.path.join(folder, "plot.png")).path
