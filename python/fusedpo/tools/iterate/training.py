"""The training of one round: a configuration of its own, done once, gone on with after a kill."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from fusedpo.tools.files import write_whole
from fusedpo.tools.train import resolve, train
from fusedpo.tools.train.report import FILE

Schedule = float | Sequence[float] | None

TRAINING = "training"
_CONFIG = "training.json"
# What a round decides itself.
_OWN = (
    *("model_name", "model_name_or_path", "dataset", "dataset_name", "output_dir"),
    *("resume_from_checkpoint", "ref_store"),
)


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse what each round sets for itself.

    Raises:
        ValueError: the message names the key.
    """
    own = [name for name in _OWN if name in config]
    if own:
        raise ValueError(
            f"the training's configuration must not have {', '.join(own)}: each round has its own "
            "model, pairs, folder and reference store. Leave it out."
        )


def scheduled(name: str, schedule: Schedule, rounds: int) -> list[float | None]:
    """Return an option's value for each round: one number for all, or one for each.

    Raises:
        ValueError: there are more or fewer numbers than rounds.

    Example:
        >>> scheduled("beta", [0.1, 0.05], 2), scheduled("beta", 0.1, 2), scheduled("beta", None, 2)
        ([0.1, 0.05], [0.1, 0.1], [None, None])
    """
    if schedule is None or isinstance(schedule, (int, float)):
        return [schedule] * rounds
    if len(schedule) != rounds:
        raise ValueError(
            f"{name} must be one number, or one for each of {rounds} rounds; got {len(schedule)}: "
            f"{list(schedule)}."
        )
    return list(schedule)


def round_config(
    config: Mapping[str, Any], options: Mapping[str, float | None], *, model: str, pairs: str
) -> dict[str, Any]:
    """Return a round's configuration.

    Raises:
        ValueError: an option is scheduled, and in the configuration, too; or `resolve` refuses it.
    """
    given = {name: value for name, value in options.items() if value is not None}
    twice = sorted(given.keys() & config.keys())
    if twice:
        raise ValueError(
            f"{', '.join(twice)} must be either in the training's configuration or scheduled by "
            "round, and is both."
        )
    return {**config, **given, "model_name": model, "dataset": pairs}


def check_resolves(config: Mapping[str, Any], folder: str) -> None:
    """Let the training refuse a configuration before anything is sampled."""
    resolve(config, output_dir=folder)


def train_round(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Train in `folder/training`, or return the report of the training that is there.

    A training that was cut off goes on from its last whole checkpoint, if it has one. Without one
    it begins again, and parts of checkpoints are removed.

    Raises:
        ValueError: the training that is there has another configuration.
    """
    kept = folder / _CONFIG
    if kept.exists():
        before = json.loads(kept.read_text(encoding="utf-8"))
        differing = sorted(
            name for name in before.keys() | config.keys() if before.get(name) != config.get(name)
        )
        if differing:
            raise ValueError(
                f"{folder} was trained with another {', '.join(differing)}: "
                f"{[before.get(name) for name in differing]}, now "
                f"{[config.get(name) for name in differing]}. Use the same, or name another folder."
            )
    else:
        write_whole(kept, json.dumps(config, indent=2) + "\n")
    training = folder / TRAINING
    report = training / FILE  # what a training writes last
    if report.exists():
        found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return found
    checkpoint = last_checkpoint(training)
    if checkpoint is None:
        for part in training.glob("checkpoint-*"):
            shutil.rmtree(part)
    more = {} if checkpoint is None else {"resume_from_checkpoint": str(checkpoint)}
    return train({**config, **more}, output_dir=str(training)).as_dict()


def last_checkpoint(training: pathlib.Path) -> pathlib.Path | None:
    """Return the last checkpoint that a training can go on from as if it had not stopped."""
    whole = [path for path in training.glob("checkpoint-*") if _is_whole(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: pathlib.Path) -> bool:
    """transformers writes trainer_state.json last, and no optimizer where it keeps the model
    alone."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / "optimizer.pt").exists()
