"""From a configuration to the arguments of TRL and PEFT; nothing is loaded or written here.

What the run will need and this machine lacks (bitsandbytes, unsloth, a device) is refused here,
before anything is half done.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch

from fusedpo.tools.train.checks import check_arguments, check_options
from fusedpo.tools.train.options import Options, Settings, read_config, sort_out
from fusedpo.tools.train.requirements import require_packages, require_provider
from fusedpo.tools.train.strategies import TRAINERS, Strategy, find


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A run, as TRL and PEFT are told of it.

    Attributes:
        strategy: which, with the trainer that it stands for.
        args: the trainer's config (a `trl.DPOConfig`, ...).
        peft: a `peft.LoraConfig`, or None where all weights are trained.
        quantization: a `transformers.BitsAndBytesConfig`, or None.
        model: the model's name or folder. An adapter's folder is merged into its base first.
        model_options: keywords of `from_pretrained`: revision, dtype, attn_implementation, ...
        data: dataset_name, and for the Hub dataset_config and dataset_train_split.
        settings: what is neither TRL's nor PEFT's.
        changed: the names of the options of `args` that the configuration, or what follows from
            it, sets.
        notes: what was put in another form, in sentences.
    """

    strategy: Strategy
    args: Any
    peft: Any
    quantization: Any
    model: str
    model_options: dict[str, Any]
    data: dict[str, Any]
    settings: Settings
    changed: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def output_dir(self) -> str:
        """Where everything of the run goes."""
        return str(self.args.output_dir)

    @property
    def uses_store(self) -> bool:
        """Whether reference log-probs come from a store on disk."""
        own = self.strategy.trainer == "dpo" and self.args.precompute_ref_log_probs
        return own or isinstance(self.settings.ref_store, str)

    def as_dict(self) -> dict[str, Any]:
        """Return everything in JSON's types."""
        return {
            "strategy": self.strategy.name,
            "trainer": TRAINERS[self.strategy.trainer],
            "model": self.model,
            "model_options": {name: _json(value) for name, value in self.model_options.items()},
            "data": dict(self.data),
            "settings": dataclasses.asdict(self.settings),
            "arguments": _json(self.args.to_dict()),
            "peft": None if self.peft is None else _json(self.peft.to_dict()),
            "quantization": None if self.quantization is None else _json(_diff(self.quantization)),
            "changed": list(self.changed),
            "notes": list(self.notes),
        }


def resolve(
    config: str | os.PathLike[str] | Mapping[str, Any], *, output_dir: str | None = None
) -> Resolved:
    """Return what a configuration means for TRL and PEFT.

    Args:
        config: a .json or .yaml file, or a mapping.
        output_dir: in place of the configuration's.

    Raises:
        ValueError: a key that is unknown, missing, given twice, of the wrong type, or in
            contradiction with another one; the message names it.
        ImportError: a library that the configuration needs is not installed.
        RuntimeError: a device that it needs is not there.

    Example:

        >>> run = resolve({"strategy": "ipo", "model_name": "m", "dataset": "d.jsonl",
        ...                "warmup_ratio": 0.1, "output_dir": "out"})
        >>> run.args.loss_type, run.args.warmup_steps
        (['ipo'], 0.1)
    """
    require_packages()
    given = read_config(config)
    strategy = find(given.get("strategy"))
    config_class = _config_class(strategy.trainer)
    from trl import ModelConfig

    if output_dir is not None:
        given["output_dir"] = output_dir
    options = sort_out(given, config_class, ModelConfig)
    for name, spelt in (("model_name_or_path", "model_name"), ("dataset_name", "dataset")):
        if not {**options.model, **options.data}.get(name):
            raise ValueError(f"the configuration must name the {spelt.split('_')[0]}: {spelt}.")
    check_options(options)
    model_args = _model_args(options, ModelConfig)
    require_provider(options.settings.provider, model_args)
    arguments, notes = _arguments(options, config_class)
    from trl import get_peft_config, get_quantization_config

    args = config_class(**arguments)
    peft = get_peft_config(model_args)
    targets = None if peft is None else peft.target_modules
    if isinstance(targets, str) and targets.isidentifier():
        # ModelConfig takes a list of one apart, and PEFT takes a string for a pattern of the whole
        # path of a module, which a bare name never matches.
        peft.target_modules = {targets}
    check_arguments(strategy, args)
    model_options = _model_options({**options.args, **options.model}, args)
    # TRL loads a model that is named with these; for the others models.py does.
    named = strategy.trainer in ("dpo", "sft", "kto") and options.settings.provider != "unsloth"
    args.model_init_kwargs = dict(model_options) if named else None
    return Resolved(
        strategy=options.strategy,
        args=args,
        peft=peft,
        quantization=get_quantization_config(model_args),
        model=options.model["model_name_or_path"],
        model_options=model_options,
        data=options.data,
        settings=options.settings,
        changed=tuple(arguments),
        notes=(*options.notes, *notes),
    )


def _config_class(trainer: str) -> Any:
    import trl

    if trainer in ("cpo", "orpo"):
        # TRL warns of everything experimental at each import; docs/tools/train.md says it once.
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental import cpo, orpo

        return cpo.CPOConfig if trainer == "cpo" else orpo.ORPOConfig
    return {"dpo": trl.DPOConfig, "sft": trl.SFTConfig, "kto": trl.KTOConfig}[trainer]


def _model_args(options: Options, model_config: Any) -> Any:
    given = dict(options.model)
    of_lora = [k for k in given if k.startswith("lora_") or k in ("use_rslora", "use_dora")]
    if of_lora and given.setdefault("use_peft", True) is False:
        raise ValueError(f"use_peft is false, and {', '.join(of_lora)} are LoRA's options.")
    model_args = model_config(**given)
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise ValueError(
            "quantised weights cannot be trained themselves: use_4bit needs LoRA. Give lora_r."
        )
    return model_args


def _arguments(options: Options, config_class: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the config class's arguments, and what was added to them."""
    given, notes = dict(options.args), []
    if "output_dir" not in given:
        model = os.path.basename(str(options.model["model_name_or_path"]).rstrip("/"))
        given["output_dir"] = f"{model}-{options.strategy.name}"
        notes.append(f"output_dir is {given['output_dir']}")
    if not torch.accelerator.is_available():
        given.setdefault("use_cpu", True)
        if given.get("bf16") is None and not given.get("fp16"):
            given["bf16"] = False
            notes.append("bf16 is off, which TRL has on by default: there is no accelerator")
    if options.settings.eval_split is None:
        if given.get("eval_strategy", "no") != "no":
            raise ValueError("eval_strategy needs rows to evaluate: set eval_split, e.g. 0.1.")
    elif "eval_strategy" not in given:
        given["eval_strategy"] = "epoch"
        notes.append("eval_strategy is epoch, as there is an eval_split")
    if options.strategy.trainer == "dpo" and options.settings.ref_store in (None, True):
        # A store below output_dir, one folder for each reference.
        given.setdefault("precompute_ref_log_probs", not given.get("sync_ref_model", False))
    return given, notes


def _model_options(given: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """Keywords of `from_pretrained`: by their own names, and from `model_init_kwargs`."""
    names = ("dtype", "attn_implementation", "trust_remote_code")
    options = {name: given[name] for name in names if name in given}
    if "model_revision" in given:
        options["revision"] = given["model_revision"]
    own = args.model_init_kwargs or {}
    twice = sorted(options.keys() & own.keys())
    if twice:
        raise ValueError(f"{', '.join(twice)} must not be in model_init_kwargs, too.")
    return {"dtype": "float32", **options, **own}


def _diff(config: Any) -> dict[str, Any]:
    return dict(config.to_diff_dict())


def _json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _json(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_json(each) for each in value]
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return str(getattr(value, "value", value))
