"""Generations for fixed prompts at every evaluation of a training: files to read, and pathology
counts in the training's log."""

from __future__ import annotations

import os
import pathlib
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback

from fusedpo.tools.checkpoints import FILE_NAME
from fusedpo.tools.generate import Generation, Prompt, generate
from fusedpo.tools.generations import (
    as_markdown,
    prompt_key,
    read_generations,
    read_prompts,
    write_generations,
    write_text,
)
from fusedpo.tools.pathologies import check
from fusedpo.tools.patterns import load_patterns
from fusedpo.tools.sampling import Sampling


class GenerationCallback(TrainerCallback):  # type: ignore[misc]
    """Generates for the same prompts before the training and at every evaluation.

    Writes `generations-STEP.jsonl` and `.md` into `<output_dir>/generations`, and logs the shares
    of pathologies as `eval_pathologies/NAME`, the mean length as `eval_generations/characters`, to
    wherever the trainer logs. Those of step 0 are the reference that verbosity is relative to:
    a training by DPO starts from its reference.

    Example::

        trainer = DPOTrainer(...)
        trainer.add_callback(GenerationCallback(trainer, "prompts.jsonl"))

    Args:
        trainer: whose model generates; its tokenizer, output_dir and log are used.
        prompts: a list, or a file for `read_prompts`.
        n, max_new_tokens, temperature, seed, batch_size: as in `generate`.
        patterns: a file that extends `patterns.yaml`.

    Raises:
        ValueError: no prompts, an option out of its range, a patterns file that is none.
    """

    def __init__(
        self,
        trainer: Any,
        prompts: str | os.PathLike[str] | Sequence[Prompt],
        *,
        n: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
        patterns: str | os.PathLike[str] | None = None,
    ) -> None:
        self._trainer = trainer
        if isinstance(prompts, (str, os.PathLike)):
            prompts = read_prompts(prompts)
        self._prompts = list(prompts)
        if not self._prompts:
            raise ValueError("prompts must hold at least one prompt; got none.")
        self._options: dict[str, Any] = {
            "n": n,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "batch_size": batch_size,
        }
        Sampling(**self._options)  # what is wrong with them shows before the training
        self._patterns = load_patterns(patterns)
        self._folder = pathlib.Path(trainer.args.output_dir) / "generations"
        self._reference: list[Generation] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check_whole(self._trainer.model)
        if not state.is_world_process_zero:
            return
        if args.eval_strategy == "no":
            warnings.warn(
                "fusedpo: the training has no evaluations, at which GenerationCallback generates; "
                'set eval_strategy="steps" and eval_steps.',
                stacklevel=2,
            )
        before = self._folder / FILE_NAME.format(step=0)
        if state.global_step == 0:
            self._reference = self._generate(0)
            self._log(self._reference)
        elif before.exists():
            self._reference = self._matching(read_generations(before))
        else:
            warnings.warn(
                f"fusedpo: the training goes on at step {state.global_step}, and {before} from "
                "its beginning is missing: verbosity is not counted.",
                stacklevel=2,
            )

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Evaluations outside a training, as before it, have no step of their own.
        if state.is_world_process_zero and state.global_step > 0:
            self._log(self._generate(state.global_step))

    def _generate(self, step: int) -> list[Generation]:
        processor = self._trainer.processing_class
        made = generate(
            self._trainer.model,
            self._prompts,
            tokenizer=getattr(processor, "tokenizer", processor),
            **self._options,
        )
        file = self._folder / FILE_NAME.format(step=step)
        write_generations(file, made)
        write_text(file.with_suffix(".md"), as_markdown(made, f"Step {step}"))
        return made

    def _log(self, made: list[Generation]) -> None:
        report = check(made, self._reference, self._patterns)
        logs = {f"eval_pathologies/{name}": report.share(name) for name in report.counts}
        logs["eval_generations/characters"] = report.mean_characters
        # In its evaluation mode a trainer of TRL leaves the averages of the training alone.
        model = self._trainer.model
        training = model.training
        model.eval()
        self._trainer.log(logs)
        model.train(training)

    def _matching(self, before: list[Generation]) -> list[Generation]:
        known = {prompt_key(each.prompt) for each in before}
        if missing := [p for p in self._prompts if prompt_key(p) not in known]:
            raise ValueError(
                f"the prompts must be those of the training's beginning; {len(missing)} of "
                f"{len(self._prompts)} are not in {self._folder}. Use the same prompts, or move "
                "that folder away."
            )
        return before


def _check_whole(model: Any) -> None:
    """Raise where each process holds a part of the weights, with which none can generate alone."""
    from torch.distributed.tensor import DTensor

    parts = (hasattr(p, "ds_id") or isinstance(p, DTensor) for p in model.parameters())
    sharded = any(parts) or type(model).__name__ == "FullyShardedDataParallel"
    if sharded:
        raise ValueError(
            "GenerationCallback needs the whole model in a process; ZeRO-3, FSDP and tensor "
            "parallelism share it out. Generate from the checkpoints: fusedpo generate."
        )
