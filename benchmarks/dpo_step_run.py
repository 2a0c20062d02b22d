"""One contestant of benchmarks.dpo_step in a process of its own: trains, times, prints JSON.

python -m benchmarks.dpo_step_run CONTESTANT FOLDER CASE, where FOLDER is shared by the contestants
of a case. "store" instead of a contestant makes the reference store there, for those that use it.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import statistics
import sys
import time
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from benchmarks import common

LAYERS = 24  # Qwen2.5-0.5B's
MAX_LENGTH = 1024


class Case(NamedTuple):
    data: str  # a file of pairs, JSON lines
    tokenizer: str
    pairs: int  # per step
    train: str  # lora or full
    dtype: str  # fp32, or amp: fp32 weights under bf16 autocast, TRL's default
    layers: int
    steps: int
    device: str


class Contestant(NamedTuple):
    fused: bool
    keywords: dict[str, Any]
    patch: bool = False
    store: bool = False


CONTESTANTS = {
    "trl": Contestant(False, {}),
    "patch": Contestant(False, {}, patch=True),
    "fused": Contestant(True, {"share_prompts": False}),
    "fused+store": Contestant(True, {"share_prompts": False}, store=True),
    "shared": Contestant(True, {"share_prompts": True}),
    "shared+store": Contestant(True, {"share_prompts": True}, store=True),
}


def make_model(case: Case, vocabulary: int) -> Any:
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=case.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return Qwen2ForCausalLM(config)


def make_rows(case: Case) -> list[dict[str, str]]:
    """As many pairs as are trained on, drawn from the whole file."""
    with open(case.data, encoding="utf-8") as lines:
        rows = [json.loads(each) for each in lines]
    random.Random(0).shuffle(rows)
    count = case.pairs * (case.steps + 1)
    # Prompts beyond max_length would be dropped, and another pair would come in their place.
    short = [row for row in rows if len(row["prompt"]) < 2 * MAX_LENGTH][:count]
    if len(short) < count:
        raise ValueError(f"{case.data} has {len(short)} usable pairs; {count} are needed.")
    return [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in short]


class Clock(TrainerCallback):  # type: ignore[misc]
    """Seconds of every step, those of them in the decoder layers, and the tokens of the policy.

    The layers of the policy and of a reference model count alike, forward and backward.
    """

    def __init__(self, layers: int) -> None:
        self.steps: list[float] = []
        self.backbone: list[float] = []
        self.tokens: list[int] = []
        self._layers = layers
        self._began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.backbone.append(0.0)
        self.tokens.append(0)
        self._start = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(now() - self._start)

    def watch(self, backbone: Any) -> None:
        backbone.layers[0].register_forward_pre_hook(self._forward_begins)
        backbone.layers[0].register_forward_hook(self._first_layer_is_done)
        backbone.layers[-1].register_forward_hook(self._forward_ends)

    def _forward_begins(self, _module: Any, inputs: Any) -> None:
        if torch.is_grad_enabled() and self.tokens:
            self.tokens[-1] += inputs[0].shape[0] * inputs[0].shape[1]
        self._began = now()

    def _forward_ends(self, _module: Any, _inputs: Any, output: Any) -> None:
        if self.backbone:
            self.backbone[-1] += now() - self._began
        if output.requires_grad:
            output.register_hook(self._backward_begins)

    def _first_layer_is_done(self, _module: Any, _inputs: Any, output: Any) -> None:
        if output.requires_grad:
            output.register_hook(self._backward_of_the_others_ends)

    def _backward_begins(self, _gradient: Any) -> None:
        self._began = now()

    def _backward_of_the_others_ends(self, _gradient: Any) -> None:
        # The gradient of the first layer's output is there when all layers but this one are done.
        self.backbone[-1] += (now() - self._began) * self._layers / (self._layers - 1)


def watch_products(model: Any) -> set[str]:
    """The types that the first layer's query projection returns, filled in as it runs: a contestant
    that falls back to fp32 under autocast would log what is right, and be timed for other work."""
    seen: set[str] = set()
    name = next(name for name, _ in model.named_modules() if name.endswith("q_proj"))
    model.get_submodule(name).register_forward_hook(
        lambda _module, _inputs, output: seen.add(str(output.dtype).removeprefix("torch."))
    )
    return seen


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Peak:
    """Bytes in use at the start, and at most until the end: of the GPU, or of the process."""

    def __init__(self, device: str) -> None:
        self._gpu = device == "cuda"
        self._process = common.PeakMemory()

    def __enter__(self) -> Peak:
        if self._gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            self._process.__enter__()
            self.before = self._process.before
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu:
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self._process.__exit__()
            self.peak = self.before + self._process.extra_bytes


def make_trainer(case: Case, contestant: Contestant, folder: pathlib.Path, clock: Clock) -> Any:
    from datasets import Dataset
    from fusedpo.trl import FusedDPOTrainer
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(case.tokenizer)
    config = DPOConfig(
        output_dir=str(folder / "run"),
        bf16=case.dtype == "amp",
        learning_rate=1e-4,
        max_length=MAX_LENGTH,
        max_steps=case.steps + 1,
        per_device_train_batch_size=case.pairs,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=case.device == "cpu",
    )
    keywords = dict(contestant.keywords)
    if contestant.store:
        keywords["ref_store"] = folder / "refs"
    if case.train == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        keywords["peft_config"] = LoraConfig(r=16, target_modules=names, task_type="CAUSAL_LM")
    elif not contestant.store:
        keywords["ref_model"] = make_model(case, len(tokenizer))
        clock.watch(keywords["ref_model"].model)
    model = make_model(case, len(tokenizer))
    clock.watch(model.model)
    return (FusedDPOTrainer if contestant.fused else DPOTrainer)(
        model,
        args=config,
        train_dataset=Dataset.from_list(make_rows(case)),
        processing_class=tokenizer,
        callbacks=[clock],
        **keywords,
    )


def run(case: Case, name: str, folder: pathlib.Path) -> dict[str, Any]:
    from fusedpo.trl import patch_trl

    contestant = CONTESTANTS[name]
    clock = Clock(case.layers)
    with patch_trl() if contestant.patch else contextlib.nullcontext():
        with contextlib.redirect_stdout(sys.stderr):
            trainer = make_trainer(case, contestant, folder, clock)
        products = watch_products(trainer.model)
        with Peak(case.device) as peak, contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    tokens = clock.tokens[1:]
    return {
        "logs": logs,
        "products": sorted(products),
        "step": common.summary(clock.steps[1:]),
        "backbone_s": statistics.mean(clock.backbone[1:]),
        "tokens": {
            "computed": statistics.mean(tokens),
            "per_s": sum(tokens) / sum(clock.steps[1:]),
        },
        "peak_bytes": peak.peak,
        "extra_bytes": peak.peak - peak.before,
    }


def make_store(case: Case, folder: pathlib.Path) -> dict[str, Any]:
    start = now()
    with contextlib.redirect_stdout(sys.stderr):
        make_trainer(case, CONTESTANTS["shared+store"], folder, Clock(case.layers))
    return {"construction_and_scoring_s": now() - start}


def main() -> None:
    what, where, text = sys.argv[1:]
    case, folder = Case(**json.loads(text)), pathlib.Path(where)
    print(json.dumps(make_store(case, folder) if what == "store" else run(case, what, folder)))


if __name__ == "__main__":
    main()
