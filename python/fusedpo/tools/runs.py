"""Read what a training logged: the history in trainer_state.json of any run of TRL.

transformers writes that file into every checkpoint, and into the run's folder by
`trainer.save_state()`. A run is named by its folder, by one of its checkpoints or by the file.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .log_history import Series, split
from .saved_arguments import FILE as ARGUMENTS_FILE
from .saved_arguments import read_arguments

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True, eq=False)
class Run:
    """What one training logged.

    `train` has TRL's names (`loss`, `rewards/margins`, `logps/chosen`, ...); `evaluations` has the
    same names for each evaluated data set, by the prefix that TRL gave it (`eval`, or
    `eval_<name>`). `arguments` are those of training_args.bin and `config` the name of their class
    (`DPOConfig`); {} and None where none was saved, and `arguments_problem` says why they could
    not be read. `summary` is what the end of the training logged (`train_runtime`, ...).
    """

    name: str
    path: pathlib.Path
    train: Mapping[str, Series]
    evaluations: Mapping[str, Mapping[str, Series]]
    summary: Mapping[str, float] = field(default_factory=dict)
    config: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    arguments_problem: str | None = None

    @property
    def last_step(self) -> int:
        """The last step that logged anything."""
        return max(int(each.steps[-1]) for each in all_series(self))


def all_series(run: Run) -> list[Series]:
    """Every series of a run, of the training and of all evaluations."""
    evaluated = [each for found in run.evaluations.values() for each in found.values()]
    return [*run.train.values(), *evaluated]


def read_run(path: str | os.PathLike[str], *, name: str | None = None) -> Run:
    """Read one run.

    Args:
        path: a run's folder (of its own trainer_state.json and those of its checkpoints the one
            with the most steps is read that belongs to the same training), a checkpoint's folder,
            or a trainer_state.json.
        name: how the run is called; by default the folder's name.

    Raises:
        FileNotFoundError: there is no trainer_state.json.
        ValueError: the file is not one, or nothing was logged.

    Example:

        run = read_run("dpo_output")
        run.train["rewards/margins"].values[-1]
    """
    file = _state_file(pathlib.Path(path))
    state = _load(file)
    train, evaluations, summary = split(file, state["log_history"])
    folder = _run_folder(file)
    config, arguments, problem = _arguments(file.parent, folder, *_checkpoints(folder)[-1:])
    run = Run(
        name=name or folder.resolve().name,
        path=file,
        train=train,
        evaluations=evaluations,
        summary=summary,
        config=config,
        arguments=arguments,
        arguments_problem=problem,
    )
    if not all_series(run):
        raise ValueError(
            f"{file} must have logged values; got none. Train for at least logging_steps steps, "
            "or set logging_steps=1"
        )
    return run


def read_runs(paths: Sequence[str | os.PathLike[str]]) -> list[Run]:
    """Read several runs, each under a name of its own: the shortest end of its path that tells it
    from the others."""
    if not paths:
        raise ValueError("at least one run must be named; got none")
    folders = [_run_folder(_state_file(pathlib.Path(path))).resolve() for path in paths]
    depth = 1
    while depth < max(len(folder.parts) for folder in folders) and not _differ(folders, depth):
        depth += 1
    names = ["/".join(folder.parts[-depth:]) for folder in folders]
    if len(set(names)) < len(names):  # checkpoints of one run, or a run that is named twice
        names = [str(pathlib.Path(path)) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"each run must be named once; got {', '.join(names)}")
    return [read_run(path, name=name) for path, name in zip(paths, names, strict=True)]


def tokens_per_step(run: Run) -> Series | None:
    """Mean number of tokens in the batch of a step, prompts and both completions together, from
    TRL's running total `num_tokens`; None where that was not logged.

    TRL begins to count again when a training is resumed: that step has no value.
    """
    total = run.train.get("num_tokens")
    if total is None:
        return None
    steps = np.diff(total.steps, prepend=0)
    tokens = np.diff(total.values, prepend=0.0)
    kept = (tokens > 0) & (steps > 0)
    return Series(total.steps[kept], tokens[kept] / steps[kept])


def _differ(folders: Sequence[pathlib.Path], depth: int) -> bool:
    return len({folder.parts[-depth:] for folder in folders}) == len(folders)


# The file ----------------------------------------------------------------------------------------


def _state_file(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(f"a run must be a folder or a {STATE_FILE}; {path} does not exist")
    states = (folder / STATE_FILE for folder in (path, *_checkpoints(path)[-1:]))
    found = [state for state in states if state.is_file()]
    if not found:
        raise FileNotFoundError(
            f"a run's folder must have a {STATE_FILE}, or checkpoint-* folders that have one; "
            f"{path} has neither. transformers writes it with each checkpoint "
            "(save_strategy), and trainer.save_state() writes it at any time"
        )
    own, newest = found[0], found[-1]
    return newest if _goes_on(_load(own), _load(newest)) else own


def _goes_on(own: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has more steps than a run's own state, of the same training. The
    checkpoints of another one may be left in the folder."""
    if checkpoint.get("global_step", 0) <= own.get("global_step", 0):
        return False  # of equally many steps the run's own has the summary and last evaluation
    before, after = (
        [entry for entry in state["log_history"] if "loss" in entry] for state in (own, checkpoint)
    )
    return after[: len(before)] == before


def _checkpoints(folder: pathlib.Path) -> list[pathlib.Path]:
    """A run's checkpoints with a state, the newest last."""

    def steps(checkpoint: pathlib.Path) -> int:
        number = checkpoint.name.removeprefix("checkpoint-")
        return int(number) if number.isdigit() else -1

    found = (state.parent for state in folder.glob(f"checkpoint-*/{STATE_FILE}"))
    return sorted(found, key=steps)


def _load(file: pathlib.Path) -> dict[str, Any]:
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} must be a {STATE_FILE}, which is JSON: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise ValueError(
            f"{file} must be a {STATE_FILE} of transformers, an object with a list log_history"
        )
    return state


def _run_folder(file: pathlib.Path) -> pathlib.Path:
    folder = file.parent
    return folder.resolve().parent if folder.resolve().name.startswith("checkpoint-") else folder


def _arguments(*folders: pathlib.Path) -> tuple[str | None, dict[str, Any], str | None]:
    for folder in folders:
        if (folder / ARGUMENTS_FILE).is_file():
            try:
                return *read_arguments(folder / ARGUMENTS_FILE), None
            except ValueError as error:
                return None, {}, str(error)
    return None, {}, None
