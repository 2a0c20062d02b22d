"""A configuration as it is written: read from a file, and its keys brought to TRL's names.

Two spellings are understood, also mixed: TRL's own (the fields of the strategy's config class, of
`trl.ModelConfig`, and of `trl.ScriptArguments` that name the data), and the short form in common
use (`model_name`, `dataset`, `max_seq_length`, `use_4bit`, `warmup_ratio`, ...). A key that is
neither is an error: a misspelt `learning_rte` must not train with the default.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fusedpo.tools.train.strategies import Strategy, did_you_mean, find
from fusedpo.tools.train.value_types import check_types, list_of_one

# Another spelling, and the name that is used from there on.
ALIASES = {
    "model_name": "model_name_or_path",
    "dataset": "dataset_name",
    "max_seq_length": "max_length",
    "use_4bit": "load_in_4bit",
    "dataset_test_split": "eval_split",
}
DATA = ("dataset_name", "dataset_config", "dataset_train_split")
_PROVIDERS = ("huggingface", "unsloth")
# What people write for the one task that preference optimisation has.
_CAUSAL = ("causal_lm", "text_generation", "chat", "instruction_tuning")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options that are neither TRL's nor PEFT's."""

    provider: str = "huggingface"  # or "unsloth"
    eval_split: float | int | str | None = None  # a share, a number of rows, or a split or file
    ref_store: str | bool | None = None  # a folder; None: one below output_dir; False: none
    ref_miss: str = "compute"  # or "error"
    ref_identity: str = "check"  # or "ignore"
    share_prompts: str | bool = "auto"
    kl_prompts: int = 64  # 0: no estimate
    kl_max_new_tokens: int = 128


@dataclasses.dataclass(frozen=True)
class Options:
    """A configuration by TRL's names, shared out among those whom it concerns."""

    strategy: Strategy
    args: dict[str, Any]  # fields of the config class
    model: dict[str, Any]  # fields of trl.ModelConfig
    data: dict[str, Any]  # the fields of DATA
    settings: Settings
    notes: tuple[str, ...]  # what was put in another form


def read_config(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration as a dict: a mapping, or a .json, .yaml or .yml file.

    Raises:
        ValueError: another kind of file, or one that holds no mapping; the message names it.
        FileNotFoundError: there is no such file.
    """
    if isinstance(config, Mapping):
        return dict(config)
    path = os.fspath(config)
    kind = os.path.splitext(path)[1].lower()
    if kind not in (".json", ".yaml", ".yml"):
        raise ValueError(f"{path}: a configuration must be a .json, .yaml or .yml file.")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file.")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        read = json.loads(text) if kind == ".json" else _yaml(text)
    except ValueError as error:
        raise ValueError(f"{path}: this is no valid {kind[1:].upper()}: {error}") from None
    if not isinstance(read, Mapping):
        raise ValueError(
            f"{path}: a configuration must be a mapping of options to values; got "
            f"{type(read).__name__}."
        )
    return dict(read)


def _yaml(text: str) -> Any:
    import yaml

    # YAML 1.1 takes 5e-5 for a string; everybody else, and JSON, for a number.
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    number = re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader=loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def sort_out(config: Mapping[str, Any], config_class: Any, model_config: Any) -> Options:
    """Bring a configuration to TRL's names.

    Args:
        config: from `read_config`, with a `strategy`.
        config_class: the strategy's, e.g. `trl.DPOConfig`.
        model_config: `trl.ModelConfig`.

    Raises:
        ValueError: an unknown key, one option under two names, or values that contradict each
            other or have the wrong type; the message names the keys.
    """
    given = dict(config)
    notes: list[str] = []
    strategy = find(given.pop("strategy", None))
    _check_task(given.pop("task", None))
    for short, name in ALIASES.items():
        if short in given:
            _refuse_twice(given, short, name)
            given[name] = given.pop(short)
    args_fields = _fields(config_class)
    given = {k: list_of_one(k, v, config_class, model_config) for k, v in given.items()}
    _map_warmup(given, args_fields, notes)
    _settle(given, strategy)
    owners: dict[str, Iterable[str]] = {
        "settings": _fields(Settings),
        "data": DATA,
        "model": _fields(model_config),
        "args": args_fields,
    }
    parts: dict[str, dict[str, Any]] = {owner: {} for owner in owners}
    for key, value in given.items():
        owner = next((each for each, keys in owners.items() if key in keys), None)
        if owner is None:
            raise ValueError(_unknown(key, strategy, owners))
        parts[owner][key] = value
    for owner, checked in (
        ("settings", Settings),
        ("model", model_config),
        ("args", config_class),
    ):
        check_types(parts[owner], checked)
    settings = Settings(**parts["settings"])
    _check_settings(settings, strategy, parts["settings"])
    return Options(strategy, parts["args"], parts["model"], parts["data"], settings, tuple(notes))


def _fields(config_class: Any) -> list[str]:
    return [each.name for each in dataclasses.fields(config_class)]


def _unknown(key: str, strategy: Strategy, owners: Mapping[str, Iterable[str]]) -> str:
    known = {"strategy", "task", "warmup_ratio", *ALIASES}.union(*owners.values())
    return (
        f"{key!r} is no option of a training with strategy {strategy.name!r}."
        f"{did_you_mean(key, sorted(known))} Known are TRL's options for it, those of "
        f"trl.ModelConfig, and {', '.join(sorted({*ALIASES, *_fields(Settings)}))}."
    )


def _refuse_twice(given: Mapping[str, Any], short: str, name: str) -> None:
    if name in given:
        raise ValueError(f"{short} and {name} are the same option; give one of them.")


def _check_task(task: object) -> None:
    if task is None:
        return
    if str(task).lower().replace("-", "_") not in _CAUSAL:
        raise ValueError(
            f"task must be one of {', '.join(_CAUSAL)}, which all mean a causal language model; "
            f"got {task!r}. Preference optimisation trains no other."
        )


def _map_warmup(given: dict[str, Any], fields: list[str], notes: list[str]) -> None:
    """transformers 5 has no `warmup_ratio`: a `warmup_steps` below 1 is the ratio."""
    if "warmup_ratio" not in given or "warmup_ratio" in fields:
        return
    _refuse_twice(given, "warmup_ratio", "warmup_steps")
    ratio = given.pop("warmup_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio < 1:
        raise ValueError(f"warmup_ratio must be a number in [0, 1); got {ratio!r}.")
    given["warmup_steps"] = float(ratio)
    notes.append(f"warmup_ratio {ratio} is warmup_steps {float(ratio)}: below 1, a share of steps")


def _settle(given: dict[str, Any], strategy: Strategy) -> None:
    """Put in what the strategy's name implies."""
    for key, value in strategy.fixed.items():
        if given.setdefault(key, value) != value:
            raise ValueError(
                f"strategy {strategy.name!r} has {key} {value!r}; got {given[key]!r}. Leave {key} "
                f"out, or use strategy {strategy.trainer!r}."
            )
    for key, value in strategy.defaults.items():
        given.setdefault(key, value)


def _check_settings(settings: Settings, strategy: Strategy, given: Mapping[str, Any]) -> None:
    if settings.provider not in _PROVIDERS:
        raise ValueError(f"provider must be one of {_PROVIDERS}; got {settings.provider!r}.")
    if settings.kl_prompts < 0 or settings.kl_max_new_tokens < 1:
        raise ValueError("kl_prompts must be at least 0 and kl_max_new_tokens at least 1.")
    split = settings.eval_split
    if _is_number(split) if isinstance(split, str) else split is not None and not _is_size(split):
        raise ValueError(
            "eval_split must be a share between 0 and 1, a whole number of rows, or the name of a "
            f"split or file; got {split!r}."
        )
    if strategy.trainer == "dpo":
        return
    for key in ("ref_store", "ref_miss", "ref_identity", "share_prompts"):
        if given.get(key) not in (None, False):
            raise ValueError(
                f"{key} is an option of the DPO losses; strategy {strategy.name!r} has no use for "
                "it. Leave it out."
            )


def _is_size(split: float) -> bool:
    return split >= 1 if isinstance(split, int) else 0 < split < 1


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
