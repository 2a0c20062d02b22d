"""Reference log-probs of a training from a store, instead of from a model in memory.

Records are looked up by the token ids in the batch, whatever brought them there, so shuffled,
filtered and streamed data sets work. What the store lacks is scored by the reference and appended:
for data sets with a length before the first step, in the batches of `fusedpo.precompute`; for
streams as they come.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pathlib
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from trl.trainer.utils import create_model_from_path, disable_dropout_in_model, use_adapter

from fusedpo import pair_logps
from fusedpo._head import add_fused_head
from fusedpo._packing.attention import packed_attention, use_packed_attention
from fusedpo._packing.names import former_implementation
from fusedpo._precompute.filling import Scorer, fill, open_store
from fusedpo._precompute.identity import model_identity, refuse_sharded
from fusedpo._precompute.records import RecordIndex, index_records, keys_of
from fusedpo._precompute.scoring import scoring_mode, sums
from fusedpo._store_columns import wrong_count
from fusedpo._store_identity import compared, differences
from fusedpo.store import RefStore, StoreError
from fusedpo.trl.ref_batches import CollatedRows, records_of_batch
from fusedpo.trl.ref_images import DigestingCollator, has_images, image_settings

_AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_MISS = ("compute", "error")
_IDENTITY = ("check", "ignore")


@dataclass(frozen=True)
class RefStoreOptions:
    """The store of a training, and what to do about misses and about another reference."""

    path: pathlib.Path
    miss: str
    identity: str
    own: bool  # made by the trainer below output_dir, one folder for each reference
    images: bool  # the data set has pictures

    @staticmethod
    def of(
        ref_store: Any, ref_miss: str, ref_identity: str, args: Any, train_dataset: Any
    ) -> RefStoreOptions | None:
        """Return the options, or None for a training without a store.

        Raises:
            ValueError: an unknown value, or a configuration that a store cannot serve.
        """
        if ref_miss not in _MISS:
            raise ValueError(f"ref_miss must be 'compute' or 'error'; got {ref_miss!r}.")
        if ref_identity not in _IDENTITY:
            raise ValueError(f"ref_identity must be 'check' or 'ignore'; got {ref_identity!r}.")
        own = ref_store is None
        if own and not args.precompute_ref_log_probs:
            if (ref_miss, ref_identity) != ("compute", "check"):
                raise ValueError(
                    f"ref_miss={ref_miss!r} and ref_identity={ref_identity!r} need a store. Pass "
                    "ref_store=..., or DPOConfig(precompute_ref_log_probs=True)."
                )
            return None
        name = "precompute_ref_log_probs=True" if own else "ref_store"
        images = has_images(train_dataset)
        if own and images:
            raise ValueError(
                f"{name} needs a data set of text, which is prepared before the training; this one "
                "has images. Pass ref_store=..., which looks records up as they come."
            )
        if args.sync_ref_model:
            raise ValueError(
                f"{name} needs a reference that stays as it is; sync_ref_model=True replaces it "
                "during training. Use one of the two."
            )
        path = pathlib.Path(args.output_dir) / "ref_store" if own else pathlib.Path(ref_store)
        return RefStoreOptions(path, ref_miss, ref_identity, own, images)


class StoredReference:
    """The reference of a trainer that was just built; see the module."""

    def __init__(self, trainer: Any, options: RefStoreOptions) -> None:
        # A cycle would keep the trainer, and DDP's threads in it, until Python ends.
        self._trainer = weakref.proxy(trainer)
        self._options = options
        mixed = trainer.accelerator.mixed_precision
        if mixed not in _AUTOCAST:
            raise ValueError(f"ref_store supports mixed precision no, bf16, fp16; got {mixed!r}.")
        self._autocast = _AUTOCAST[mixed]
        model, adapter = self._reference()
        refuse_sharded(model, trainer.accelerator.num_processes)
        with adapter:
            self._identity = self._identify(model)
        if options.images:
            trainer.data_collator = DigestingCollator(trainer.data_collator)
        self._append = options.miss == "compute"
        self.path, self._store = self._open()
        self._writer: Any = None
        self._loaded: Any = None

    # The store and its identity -----------------------------------------------------------------

    def _identify(self, model: Any) -> dict[str, Any]:
        autocast = None if self._autocast is None else str(self._autocast).removeprefix("torch.")
        identity = model_identity(model, autocast=autocast)
        if self._options.images:
            identity["images"] = image_settings(self._trainer.processing_class)
        return identity

    def _open(self) -> tuple[str, RefStore]:
        options = self._options
        path = options.path
        if options.own:
            path = self._own_folder()
        try:
            if self._append:
                return str(path), open_store(str(path), self._identity)
            return str(path), RefStore(str(path), mode="r", identity=self._identity)
        except StoreError as error:
            if options.identity != "ignore" or error.code != "identity":
                raise
        store = RefStore(str(path), mode="r")
        differing = differences(self._identity, store.identity)
        self._append = False
        warnings.warn(
            f"fusedpo: ref_identity='ignore': {path} belongs to another reference than this "
            f"training's ({'; '.join(differing)}). Its values are used as they are, nothing is "
            "added to it, and a missing record is an error.",
            stacklevel=4,
        )
        return str(path), store

    def _own_folder(self) -> pathlib.Path:
        text = json.dumps(compared(self._identity), sort_keys=True)
        parent = self._options.path
        folder = parent / hashlib.sha256(text.encode()).hexdigest()[:16]
        if parent.is_dir() and not folder.exists() and any(parent.iterdir()):
            warnings.warn(
                f"fusedpo: {parent} has stores of other references only. To resume a "
                "training, build the trainer with the model it began with, not with a checkpoint: "
                "the model that is passed is the reference.",
                stacklevel=5,
            )
        return folder

    # Before the first step ----------------------------------------------------------------------

    def cover(self, splits: Mapping[str, Any]) -> None:
        """Tell how much of each data set the store has; score the rest, or refuse.

        Every rank has to call: each scores its share, and all wait for each other.

        Raises:
            LookupError: records are missing, and they may not be computed.
        """
        accelerator = self._trainer.accelerator
        lacking: list[tuple[str, CollatedRows, RecordIndex]] = []
        for name, dataset in splits.items():
            if self._options.images or not isinstance(dataset, Dataset):
                what = "has images" if self._options.images else "is a stream"
                accelerator.print(f"fusedpo: {self.path}: {name} {what}, looked up as it comes")
                continue
            source = CollatedRows(dataset, self._trainer.data_collator)
            index = index_records(source)
            missing = self._store.missing(index.keys, tokens=self._per_token)
            count = int(missing.sum())
            accelerator.print(
                f"fusedpo: {self.path}: {name} has {len(index)} records in {index.rows} rows; "
                f"{len(index) - count} found, {count} missing"
            )
            if count and not self._append:
                raise LookupError(self._lack(f"{count} of {len(index)} records of {name}"))
            if count:
                lacking.append((name, source, index))
        if not _any_rank(accelerator, bool(lacking)):
            return
        try:
            for name, source, index in lacking:
                self._fill(name, source, index)
            error = None
        except Exception as failure:
            error = failure
        # A rank that failed must not leave the others waiting for it.
        if _any_rank(accelerator, error is not None):
            raise error or RuntimeError("another process failed to score its share; see its error.")
        self._store.refresh()

    def _fill(self, name: str, source: CollatedRows, index: RecordIndex) -> None:
        trainer = self._trainer
        args = trainer.args
        pairs = args.precompute_ref_batch_size or args.per_device_train_batch_size
        # As much as a batch of TRL's precomputing may hold.
        max_tokens = 2 * pairs * (args.max_length or int(index.length.max(initial=1)))
        model, adapter = self._reference()
        tokenizer = trainer._tokenizer
        scorer = Scorer(model, self._autocast, tokenizer.pad_token_id or 0, inference_mode=False)
        # The model may take packed rows for another trainer that had it before.
        with adapter, packed_attention(model, trainer._shared_prompts.active):
            report = fill(
                self._store,
                self.path,
                source,
                index,
                scorer,
                max_tokens=max_tokens,
                per_token=self._per_token,
                rank=trainer.accelerator.process_index,
                world_size=trainer.accelerator.num_processes,
            )
        trainer.accelerator.print(
            f"fusedpo: {self.path}: {name}: scored {report.scored} records, {report.tokens} tokens "
            f"in {report.seconds:.1f} s; {report.computed} computed, padded batches would have "
            f"{report.padded}"
        )

    @property
    def _per_token(self) -> bool:
        # LD-DPO weights a completion by its partner's length: one sum per completion is not enough.
        return self._trainer.ld_alpha is not None

    def _lack(self, what: str) -> str:
        values = "per-token values (DPOConfig.ld_alpha needs them) of " if self._per_token else ""
        option = " --per-token" if self._per_token else ""
        remedy = (
            "or pass ref_miss='compute'"
            if self._options.identity != "ignore"
            else "with this reference into a store of its own"
        )
        return (
            f"{values}{what} are not in {self.path}. Run fusedpo precompute{option} with the "
            f"settings of this training (max_length, truncation_mode, chat template), {remedy}."
        )

    # During training ----------------------------------------------------------------------------

    def pair(self, inputs: Mapping[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the reference log-probs [B] of the chosen and rejected completions of a batch, in
        nats, on the batch's device; score and append what is missing.

        Raises:
            LookupError: a record is missing, and it may not be computed.
        """
        records = records_of_batch(inputs)
        # What has no token to score has log-prob 0 and is in no store.
        scored = [i for i, record in enumerate(records) if record.num_tokens]
        keys = keys_of([records[i] for i in scored])
        counts = np.array([records[i].num_tokens for i in scored], np.int64)
        found, values, tokens = self._lookup(keys, counts)
        if not found.all():
            self._store.refresh()  # another process may have scored it meanwhile
            found, values, tokens = self._lookup(keys, counts)
        if not found.all():
            missing = np.flatnonzero(~found)
            if not self._append:
                raise LookupError(self._lack(f"{len(missing)} of {len(found)} records of a batch"))
            new = self._score_and_append(inputs, [scored[i] for i in missing], keys[missing])
            values[missing] = sums(new)
            for place, each in zip(missing, new, strict=True):
                tokens[place] = each
        device = inputs["input_ids"].device
        if not self._per_token:
            logps = torch.zeros(len(records), dtype=torch.float64)
            logps[scored] = torch.from_numpy(values)
            chosen, rejected = logps.to(dtype).to(device).chunk(2)
            return chosen, rejected
        mask = inputs["completion_mask"][:, 1:]
        token_logps = torch.zeros(mask.shape)
        places = (mask != 0).cpu()
        for i, each in zip(scored, tokens, strict=True):
            token_logps[i, places[i]] = torch.from_numpy(np.array(each))
        pair = pair_logps(token_logps.to(device), mask, ld_alpha=self._trainer.ld_alpha)
        return pair.chosen.to(dtype), pair.rejected.to(dtype)

    def _lookup(
        self, keys: NDArray[np.uint8], counts: NDArray[np.int64]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float64], list[Any]]:
        tokens: list[Any]
        stored: NDArray[Any]
        if self._per_token:
            found, tokens = self._store.lookup_tokens(keys)
            values, stored = sums(tokens), np.array([len(each) for each in tokens], np.int64)
        else:
            found, logps, stored = self._store.lookup(keys)
            values, tokens = logps.copy(), [None] * len(keys)
        wrong = np.flatnonzero(found & (stored != counts))
        if len(wrong):
            raise wrong_count(
                self._store, "a completion of a batch", stored[wrong[0]], counts[wrong[0]]
            )
        return found, values, list(tokens)

    def _score_and_append(
        self, inputs: Mapping[str, Any], rows: Sequence[int], keys: NDArray[np.uint8]
    ) -> list[NDArray[np.float32]]:
        """Score the batch with the reference; return the token log-probs of `rows` of it."""
        model = self._reference_in_training()
        adapter = self._reference()[1]
        with adapter, scoring_mode(model, self._autocast, inference_mode=False):
            token_logps = self._trainer.token_logps(model, inputs).float().cpu().numpy()
        mask = (inputs["completion_mask"][:, 1:] != 0).cpu().numpy()
        values = [token_logps[row][mask[row]] for row in rows]
        _, first = np.unique(keys, axis=0, return_index=True)
        if self._writer is None:
            self._writer = self._store.writer()
        self._writer.append(
            keys[first],
            sums([values[i] for i in first]),
            np.array([len(values[i]) for i in first], np.uint32),
            token_logps=[values[i] for i in first] if self._per_token else None,
        )
        self._writer.sync()
        return values

    def __enter__(self) -> StoredReference:
        return self

    def __exit__(self, *error: Any) -> None:
        """Close this process's log, so that a merge may remove it; the next miss opens another."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.__exit__(*error)

    def _reference(self) -> tuple[Any, contextlib.AbstractContextManager[Any]]:
        """The reference before the first step, and the state of adapters in which it is one."""
        trainer = self._trainer
        if trainer.ref_model is not None:
            return trainer.ref_model, contextlib.nullcontext()
        if is_peft_model(trainer.model):
            policy = trainer.accelerator.unwrap_model(trainer.model)
            return policy, use_adapter(policy, "ref" if "ref" in policy.peft_config else None)
        return trainer.model, contextlib.nullcontext()

    def _reference_in_training(self) -> Any:
        trainer = self._trainer
        model, _ = self._reference()
        if trainer.ref_model is not None or is_peft_model(trainer.model):
            return model
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _load(self) -> Any:
        """Load the reference again: a policy that is trained as a whole is no longer it."""
        trainer = self._trainer
        name = getattr(trainer.model.config, "_name_or_path", "")
        options = dict(trainer.args.model_init_kwargs or {})
        if trainer.accelerator.num_processes > 1:
            options["device_map"] = None
        options.setdefault("trust_remote_code", trainer.args.trust_remote_code)
        options.setdefault("dtype", trainer.model.dtype)
        attention = former_implementation(trainer.model.config._attn_implementation)
        options.setdefault("attn_implementation", attention)
        remedy = (
            "Pass ref_model=..., or score the data before: fusedpo precompute, or a data set with "
            "a length."
        )
        try:
            model = create_model_from_path(name, **options)
        except (OSError, ValueError) as error:
            raise LookupError(
                f"a record is not in {self.path}, the policy has been trained, and the reference "
                f"cannot be loaded from {name!r} ({error}). {remedy}"
            ) from error
        model.config.get_text_config().pad_token_id = trainer._tokenizer.pad_token_id
        differing = differences(self._identify(model), self._identity)
        if differing:
            raise LookupError(
                f"a record is not in {self.path}, the policy has been trained, and {name!r} is not "
                f"the model that the training began with ({'; '.join(differing)}). {remedy}"
            )
        disable_dropout_in_model(model)
        add_fused_head(model)
        if trainer._shared_prompts.active:
            use_packed_attention(model)
        trainer.accelerator.print(f"fusedpo: {self.path}: loaded {name} to score what is missing")
        return trainer.accelerator.prepare_model(model, evaluation_mode=True)


def _any_rank(accelerator: Any, here: bool) -> bool:
    if accelerator.num_processes == 1:
        return here
    flag = torch.tensor([int(here)], device=accelerator.device)
    return bool(accelerator.reduce(flag, "sum").item())
