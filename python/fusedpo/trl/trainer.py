"""`FusedDPOTrainer`: TRL's DPOTrainer with log-probs, loss and metrics computed by fusedpo.

Data preparation, PEFT, evaluation and logging are TRL's. What changes is the head on
`model.forward` (fusedpo._head), the loss of a batch, how often metrics are read from the device
(metrics.py), and where precomputed reference log-probs are kept (ref_store.py).
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import get_config_model_id, use_adapter

from fusedpo import PairLogps, pair_logps
from fusedpo._packing.architectures import check_mode
from fusedpo._precompute.reference import check_head
from fusedpo.trl import packed_batch, ref_images
from fusedpo.trl.bindings import check_attributes
from fusedpo.trl.construct import construction
from fusedpo.trl.loss_options import batch_loss, loss_attributes, loss_call
from fusedpo.trl.metrics import step_metrics
from fusedpo.trl.parallelism import require_whole_sequences
from fusedpo.trl.precision import slow_precision
from fusedpo.trl.ref_store import RefStoreOptions, StoredReference
from fusedpo.trl.refusals import refuse_arguments, refuse_options
from fusedpo.trl.shared_prompt import SharedPrompts
from fusedpo.trl.versions import TRAINER

_TOKEN_COLUMNS = frozenset({"prompt_ids", "chosen_ids", "rejected_ids"})
_NOT_FOR_THE_MODEL = frozenset(
    {"completion_mask", "ref_chosen_logps", "ref_rejected_logps", packed_batch.KEY, ref_images.KEY}
)


class FusedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """Train by DPO; takes the arguments of `trl.DPOTrainer`, and a `trl.DPOConfig` stays valid as
    it is.

    Loss, gradients and metrics agree with DPOTrainer's. The head runs on completion tokens only,
    without storing logits, and the metrics of a step cost one device-to-host transfer.

    Args:
        model (`str` or `PreTrainedModel` or `PeftModel`): the model to train.
        ref_model (`PreTrainedModel`, *optional*): the reference; by default the model as it is
            before training.
        args (`trl.DPOConfig`, *optional*): the configuration.
        *rest, **keywords: the further arguments of `trl.DPOTrainer`, in its order.
        ref_store (path, *optional*): a store of reference log-probs, made by `fusedpo precompute`
            or here: then no reference model is loaded, and every record is looked up by its token
            ids. With `DPOConfig(precompute_ref_log_probs=True)` and no `ref_store` a store below
            `output_dir` is used.
        ref_miss (`str`, defaults to `"compute"`): what happens to records that the store lacks:
            `"compute"` scores and appends them, before the first step where the data set has a
            length; `"error"` refuses to train without them.
        ref_identity (`str`, defaults to `"check"`): `"check"` refuses a store that was made with
            another reference, or scored in another way; `"ignore"` uses its values, with a warning.
        share_prompts (`"auto"` or `bool`, defaults to `"auto"`): compute each prompt once for both
            completions, and no padding; the values are those of TRL's padded batches, to rounding.
            `"auto"` does so for models that are known to be exact, and says why where it does not;
            `True` refuses to train otherwise.

    Raises:
        TypeError: an unknown argument.
        ValueError: a loss that is unknown, an option that is out of range or not followed, an
            adapter on the language-model head that is not LoRA, or sequences that are split over
            processes; the message names it.
        UnsupportedTRLError: the installed TRL is too old, or newer and too different.
        fusedpo.StoreError: the store belongs to another reference, or is damaged.
        LookupError: records are missing, and `ref_miss` is "error".

    Example:

        trainer = FusedDPOTrainer(
            "Qwen/Qwen2.5-0.5B-Instruct", args=DPOConfig(), train_dataset=dataset
        )
        trainer.train()
    """

    data_collator: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: Any = None,
        *rest: Any,
        ref_store: Any = None,
        ref_miss: str = "compute",
        ref_identity: str = "check",
        share_prompts: str | bool = "auto",
        **keywords: Any,
    ) -> None:
        version = TRAINER.require()
        refuse_arguments(keywords, FusedDPOTrainer)
        if args is None:  # as DPOTrainer makes it
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = DPOConfig(f"{name.split('/')[-1]}-DPO")
        # Wrong options are refused before a model is loaded.
        refuse_options(args)
        self._loss_call = loss_call(args)
        check_mode(share_prompts)
        # The second argument after `args`.
        train_dataset = keywords.get("train_dataset", rest[1] if len(rest) > 1 else None)
        store = RefStoreOptions.of(ref_store, ref_miss, ref_identity, args, train_dataset)
        self._store_options = store
        self._stored_reference = None
        self._shared_prompts: SharedPrompts | None = None
        with construction(model, ref_model, args, store):
            super().__init__(model, ref_model, args, *rest, **keywords)
        check_attributes(self, version)
        self._loss_attributes = loss_attributes(self)
        check_head(self.model)
        if self.args.n_gpu > 1:
            raise ValueError(
                "FusedDPOTrainer must run on one GPU per process; this one sees "
                f"{self.args.n_gpu}, over which transformers would use nn.DataParallel. Start it "
                "by accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES to one of them."
            )
        require_whole_sequences(self.accelerator, stored_reference=store is not None)
        slow = slow_precision(self, stored_reference=store is not None and not store.own)
        if slow is not None:
            self.accelerator.print(f"fusedpo: {slow}")
        self._shared_prompts = SharedPrompts(self, share_prompts)
        self._refuse_store_of_shards()
        if store is not None and not self._is_sharded():
            # Batches carry no reference log-probs: they are looked up.
            self.precompute_ref_logps = False
            self._stored_reference = StoredReference(self, store)
            self._stored_reference.cover(self._splits())

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """As DPOTrainer's, which needs text; a data set of token ids alone stays as it is, but for
        the rows whose prompt fills `max_length`."""
        columns = next(iter(dataset)).keys()
        if "chosen" in columns or not columns >= _TOKEN_COLUMNS:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        if args.max_length is None or args.truncation_mode != "keep_start":
            return dataset
        return dataset.filter(_prompt_fits, fn_kwargs={"max_length": args.max_length})

    def _splits(self) -> dict[str, Any]:
        splits = {"train": self.train_dataset}
        if isinstance(self.eval_dataset, dict):
            splits |= {f"eval {name}": each for name, each in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            splits["eval"] = self.eval_dataset
        return splits

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Leave the data set as it is: the store has what TRL would put into columns."""
        if not self._is_sharded():
            return dataset
        self._refuse_store_of_shards()
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _refuse_store_of_shards(self) -> None:
        store = self._store_options
        if store is not None and not store.own and self._is_sharded():
            raise ValueError(
                "ref_store works on one process and under DDP; under FSDP and DeepSpeed the "
                "parameters are sharded. Use DPOConfig(precompute_ref_log_probs=True) there."
            )

    def _get_dataloader(self, dataset: Any, *arguments: Any, **keywords: Any) -> Any:
        """As `transformers.Trainer._get_dataloader`, through which every loader is made. Packing is
        put around the collator here, so around all that a user has put around it, too."""
        collator = self.data_collator
        if self._shared_prompts is not None:
            self.data_collator = self._shared_prompts.collator(collator, dataset, self.accelerator)
        try:
            return super()._get_dataloader(dataset, *arguments, **keywords)
        finally:
            self.data_collator = collator

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        row = packed_batch.packed_row(inputs)
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        prepared.pop(packed_batch.KEY, None)
        if row is not None and (moved := row.moved_to(prepared)) is not None:
            prepared[packed_batch.KEY] = moved
        return prepared

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """As `transformers.Trainer.train`; what was added to the reference store is closed."""
        with self._stored_reference or contextlib.nullcontext():
            return super().train(*arguments, **keywords)

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """As `transformers.Trainer.evaluation_loop`, which evaluate and predict call."""
        log = None if self.is_in_train else self._stored_reference
        with log or contextlib.nullcontext():
            return super().evaluation_loop(*arguments, **keywords)

    def _is_sharded(self) -> bool:
        return bool(self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def _tensor_parallel_size(self) -> int:
        """How many ranks are given each batch. (TRL 1.9 counts its tokens for each of them.)"""
        parallelism = self.accelerator.parallelism_config
        return 1 if parallelism is None else int(parallelism.tp_size)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Score a batch with the reference, without gradient; returns the chosen and rejected
        log-probs [B] in nats.

        `model` is the reference model, or the policy itself under PEFT (adapters are switched off,
        or to the "ref" adapter) and when precomputing before training.
        """
        pair = self._reference_pair(model, inputs)
        return pair.chosen, pair.rejected

    def token_logps(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Score a batch with `model` as it stands: log-probs [2B, T - 1] of the tokens in nats, 0
        outside completions."""
        outputs = self._score(model, inputs)
        # Prompt learning puts virtual tokens in front.
        log_probs: Tensor = outputs.log_probs[:, -(inputs["completion_mask"].shape[1] - 1) :]
        return log_probs

    def _tokens(self, inputs: dict[str, Any]) -> tuple[int, int]:
        """Return the tokens that the backbone computes for a batch, and those of the padded one."""
        packed = None if self._shared_prompts is None else self._shared_prompts.batch(inputs)
        padded = inputs["input_ids"].numel()
        return padded if packed is None else packed.packed.tokens, padded

    def _score(self, model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        """Return the fused head's output for the tokens of a batch, [2B, T - 1]."""
        packed = None if self._shared_prompts is None else self._shared_prompts.batch(inputs)
        if packed is None:
            labels = _labels(inputs)
            return model(**_model_inputs(inputs), **options, labels=labels, fused_lm_head=True)
        return packed.padded(model(packed=packed.packed, **options, fused_lm_head=True))

    def _reference_pair(self, model: Any, inputs: dict[str, Any]) -> PairLogps:
        adapter: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.ref_model is None and is_peft_model(self.model):
            policy = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(
                policy, adapter_name="ref" if "ref" in policy.peft_config else None
            )
        # Reentrant checkpointing under no_grad would warn that no input requires a gradient.
        checkpointing = disable_gradient_checkpointing(
            self.model, self.args.gradient_checkpointing_kwargs
        )
        # Precomputing runs a policy that accelerate has not prepared: without this context it would
        # miss the autocast.
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            token_logps = self.token_logps(model, inputs)
        return _pair(token_logps, inputs, self.ld_alpha)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        options = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = self._score(model, inputs, **options)
        policy = _pair(outputs.log_probs, inputs, self.ld_alpha)
        if self._stored_reference is not None:
            reference = self._stored_reference.pair(inputs, policy.chosen.dtype)
        elif self.precompute_ref_logps:
            reference = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(
                self.model if self.ref_model is None else self.ref_model, inputs
            )

        seq_len = inputs["completion_mask"].shape[1] - 1
        attributes = loss_attributes(self)
        if attributes != self._loss_attributes:
            self._loss_attributes, self._loss_call = attributes, loss_call(attributes)
        result = batch_loss(
            self._loss_call,
            policy,
            reference,
            outputs.log_probs[:, -seq_len:],
            outputs.log_sum_sq_probs[:, -seq_len:] if self.use_weighting else None,
            inputs["completion_mask"],
        )
        loss = result.loss
        aux_loss = outputs.aux_loss if self.aux_loss_enabled else None
        if aux_loss is not None:
            loss = loss + self.router_aux_loss_coef * aux_loss
        metrics, num_tokens = step_metrics(
            self.accelerator,
            outputs,
            inputs["completion_mask"][:, 1:],
            inputs["attention_mask"],
            policy,
            result,
            aux_loss,
            self._tokens(inputs),
            self._tensor_parallel_size(),
        )
        if mode == "train":
            self._total_train_tokens += num_tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, value in metrics.items():
            self._metrics[mode][name].append(value)

        if not return_outputs:
            return loss
        warnings.warn(
            "fusedpo: compute_metrics and return_outputs need logits; the fused head builds none, "
            "so a second forward pass runs. TRL removes both in its version 2.",
            FutureWarning,
            stacklevel=2,
        )
        with torch.no_grad():
            return loss, model(**_model_inputs(inputs), **options)


def _prompt_fits(row: dict[str, Any], max_length: int) -> bool:
    return len(row["prompt_ids"]) < max_length


def _model_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in _NOT_FOR_THE_MODEL} | {
        "use_cache": False
    }


def _labels(inputs: dict[str, Any]) -> Tensor:
    labels: Tensor = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return labels


def _pair(log_probs: Tensor, inputs: dict[str, Any], ld_alpha: float | None) -> PairLogps:
    completion_mask = inputs["completion_mask"][:, 1:]
    return pair_logps(log_probs[:, -completion_mask.shape[1] :], completion_mask, ld_alpha=ld_alpha)
