"""The checks of trl_two_ranks under DeepSpeed, in an environment that has it."""

from __future__ import annotations

import copy
import pathlib
from typing import Any

from fusedpo.trl import FusedDPOTrainer
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl_curves import CURVES, Curve, curve_trainer, save_curve, trained, whole
from trl_helpers import logged


def zero2(folder: pathlib.Path) -> Any:
    return _zero(folder, {"stage": 2})


def zero3(folder: pathlib.Path) -> Any:
    # Without the threshold, parameters as small as these would not be sharded.
    return _zero(folder, {"stage": 3, "stage3_param_persistence_threshold": 0})


def _zero(folder: pathlib.Path, optimization: dict[str, Any]) -> Any:
    """As `ddp`, under ZeRO."""
    import deepspeed

    config = {
        "zero_optimization": optimization,
        "zero_allow_untested_optimizer": True,  # torch's SGD
        "gradient_clipping": 0.0,  # 1 if it is not named
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    for name in CURVES:
        # Else transformers would already shard the model while make_model gives it its weights.
        unset_hf_deepspeed_config()
        trainer = curve_trainer(
            FusedDPOTrainer, folder, name, pairs_per_rank=2, deepspeed=copy.deepcopy(config)
        )
        assert trainer._shared_prompts.active
        first = _FirstGradientsOfEngine(trainer)
        trainer.train()
        parameters = trained(trainer.model)
        with deepspeed.zero.GatheredParameters(list(parameters.values())):
            end = {n: whole(p) for n, p in parameters.items()}
        save_curve(Curve({}, first.gradients, end, logged(trainer)), folder, name)
    return list(CURVES)


class _FirstGradientsOfEngine(TrainerCallback):  # type: ignore[misc]
    """Accelerate lets DeepSpeed's engine step in `backward`: gradients exist in between only."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.gradients = trainer, {}
        trainer.add_callback(self)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        from deepspeed.utils import safe_get_full_grad

        engine = self.trainer.model_wrapped
        step = engine.step

        def noted(*args: Any, **keywords: Any) -> Any:
            if not self.gradients:
                self.gradients = {
                    n: whole(safe_get_full_grad(p)) for n, p in trained(self.trainer.model).items()
                }
            return step(*args, **keywords)

        engine.step = noted
