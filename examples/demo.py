"""Train a small model by DPO twice, with plain TRL and with fusedpo, and compare: numbers, seconds,
memory.

Everything is made here: words, preferences, tokenizer, model. Each run has a process of its own, so
that the peak memory that the system reports belongs to it alone. Writes demo.png and demo.json into
the folder --output.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

VOCABULARY = 32_000
RUNS = {"trl": "plain TRL", "fusedpo": "fusedpo"}
TABLE = ("loss", "rewards/margins", "rewards/accuracies")
NEAR_ZERO = {"rewards/chosen", "rewards/rejected", "rewards/margins"}
NEAR_ZERO |= {"logits/chosen", "logits/rejected"}
TOLERANCE = 1e-4  # relative; absolute for what starts at 0 or is a mean of both signs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("demo_output"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)  # the child processes
    options = parser.parse_args()
    if options.run:
        train(options.run, options.output, options.steps)
        return 0

    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        make_data(pathlib.Path(work))
        results = {
            name: run_in_own_process(name, pathlib.Path(work), options.steps) for name in RUNS
        }
    differences = largest_differences(results)
    print_report(results, differences)
    write_json(results, differences, options.output / "demo.json")
    draw(results, options.output / "demo.png")
    print(f"\nwritten: {options.output / 'demo.png'}, {options.output / 'demo.json'}")

    if max(differences.values()) > TOLERANCE:
        print(f"FAILED: the two runs differ by more than {TOLERANCE}")
        return 1
    held_out = results["fusedpo"]["held_out_after"]
    if held_out["rewards/accuracies"] <= 0.5 or held_out["rewards/margins"] <= 0:
        print("FAILED: the model did not learn the preference (held-out accuracy or margin)")
        return 1
    return 0


def make_data(work: pathlib.Path) -> None:
    from demo_data import make_preferences, make_words, train_tokenizer

    start = time.perf_counter()
    words = make_words(40_000)
    tokenizer = train_tokenizer(words, VOCABULARY)
    tokenizer.save_pretrained(work / "tokenizer")
    rows = {
        "train": make_preferences(words, 160, seed=1),
        "held_out": make_preferences(words, 48, seed=2),
    }
    (work / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    seconds = time.perf_counter() - start
    print(
        f"made {len(rows['train'])} preferences to train on and {len(rows['held_out'])} held out; "
        f"trained a tokenizer with {len(tokenizer):,} entries; {seconds:.1f} s"
    )


def run_in_own_process(name: str, work: pathlib.Path, steps: int) -> dict[str, Any]:
    print(f"training with {RUNS[name]} ...", end=" ", flush=True)
    start = time.perf_counter()
    command = [sys.executable, "-W", "ignore", __file__, "--run", name]
    command += ["--output", str(work), "--steps", str(steps)]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, check=True, env=os.environ | offline)
    print(f"{time.perf_counter() - start:.0f} s")
    result: dict[str, Any] = json.loads((work / f"{name}.json").read_text(encoding="utf-8"))
    return result


def train(name: str, work: pathlib.Path, steps: int) -> None:
    """Train in this process and write what happened to work/<name>.json."""
    import copy

    import datasets
    import fusedpo
    import torch
    import transformers
    import trl
    from fusedpo.trl import FusedDPOTrainer

    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    rows = json.loads((work / "data.json").read_text(encoding="utf-8"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(work / "tokenizer")
    shape = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model = transformers.AutoModelForCausalLM.from_config(shape)
    config = trl.DPOConfig(
        output_dir=str(work / name),
        # TRL's default is bf16 autocast. In fp32 the two runs can be compared to the last digits,
        # and many CPUs have no bf16 arithmetic and emulate it at a fraction of the speed.
        bf16=False,
        max_steps=steps,
        learning_rate=2e-3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )
    step_seconds: list[float] = []

    class StepTimer(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **keywords: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **keywords: Any) -> None:
            step_seconds.append(time.perf_counter() - self.start)

    trainer_class = {"trl": trl.DPOTrainer, "fusedpo": FusedDPOTrainer}[name]
    trainer = trainer_class(
        model,
        ref_model=copy.deepcopy(model),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows["train"]),
        eval_dataset=datasets.Dataset.from_list(rows["held_out"]),
        processing_class=tokenizer,
        callbacks=[StepTimer()],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    memory_at_start = peak_memory_mib()
    trainer.train()
    memory_peak = peak_memory_mib()
    after = trainer.evaluate()
    result = {
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "held_out_after": {key.removeprefix("eval_"): value for key, value in after.items()},
        "step_seconds": step_seconds,
        "memory_peak_mib": memory_peak,
        "memory_before_training_mib": memory_at_start,
        "parameters": sum(p.numel() for p in model.parameters()),
        "operators": fusedpo._load.why_not("cpu") or "C++",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, trl, fusedpo)},
        "threads": torch.get_num_threads(),
    }
    (work / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")


def peak_memory_mib() -> float:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB on Linux


def largest_differences(results: dict[str, Any]) -> dict[str, float]:
    """Return for each logged value the largest difference of any step; see TOLERANCE."""
    worst: dict[str, float] = {}
    for theirs, ours in zip(results["trl"]["steps"], results["fusedpo"]["steps"], strict=True):
        for name, value in theirs.items():
            near_zero = name in NEAR_ZERO
            scale = 1.0 if near_zero else max(abs(value), 1e-12)
            worst[name] = max(worst.get(name, 0.0), abs(ours[name] - value) / scale)
    return worst


def median_seconds(result: dict[str, Any]) -> float:
    return statistics.median(result["step_seconds"][1:])  # the first step allocates


def print_report(results: dict[str, Any], differences: dict[str, float]) -> None:
    header = "".join(f"{name.removeprefix('rewards/'):>24}" for name in TABLE)
    print(f"\n{'step':>4}{header}\n{'':4}" + f"{'TRL':>12}{'fusedpo':>12}" * len(TABLE))
    for theirs, ours in zip(results["trl"]["steps"], results["fusedpo"]["steps"], strict=True):
        cells = "".join(f"{theirs[name]:12.6f}{ours[name]:12.6f}" for name in TABLE)
        print(f"{theirs['step']:4d}{cells}")
    name = max(differences, key=lambda key: differences[key])
    print(f"\nlargest difference of any logged value in any step: {differences[name]:.1e} ({name})")
    print(f"\n{'':34}{'plain TRL':>12}{'fusedpo':>12}{'ratio':>8}")

    def line(label: str, values: list[float], form: str, ratio: bool = True) -> None:
        theirs, ours = values
        tail = f"{theirs / ours:7.1f}x" if ratio and ours > 0 else ""
        print(f"{label:34}{theirs:12{form}}{ours:12{form}}{tail}")

    runs = [results[name] for name in RUNS]
    line("seconds per step (median)", [median_seconds(r) for r in runs], ".3f")
    line("peak memory, MiB", [r["memory_peak_mib"] for r in runs], ".0f")
    added = [r["memory_peak_mib"] - r["memory_before_training_mib"] for r in runs]
    line("  of which training added, MiB", added, ".0f")
    for key in ("loss", *TABLE[1:]):
        line(f"held-out {key}", [r["held_out_after"][key] for r in runs], ".4f", ratio=False)
    run = results["fusedpo"]
    print(
        f"\n{run['parameters'] / 1e6:.1f} M parameters, vocabulary {VOCABULARY:,}, fp32, "
        f"{run['threads']} threads; fusedpo ran on: {run['operators']}"
    )


def write_json(results: dict[str, Any], differences: dict[str, float], path: pathlib.Path) -> None:
    report = {
        "machine": {"platform": platform.platform(), "cpu": cpu_name(), "cores": os.cpu_count()},
        "largest_differences": differences,
        "seconds_per_step": {name: median_seconds(result) for name, result in results.items()},
        "runs": results,
    }
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")


def cpu_name() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    names = [
        line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")
    ]
    return names[0] if names else platform.processor()


def draw(results: dict[str, Any], path: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 4, figsize=(15, 3.6), width_ratios=[3, 3, 1.3, 1.3], layout="constrained"
    )
    styles = {"trl": {"lw": 4, "color": "0.75"}, "fusedpo": {"lw": 1.5, "color": "C3"}}
    for panel, name in zip(axes, ("loss", "rewards/margins"), strict=False):
        for run, result in results.items():
            steps = [entry["step"] for entry in result["steps"]]
            panel.plot(
                steps, [entry[name] for entry in result["steps"]], label=RUNS[run], **styles[run]
            )
        panel.set(
            xlabel="step", title={"loss": "training loss", "rewards/margins": "reward margin"}[name]
        )
        panel.legend()
    bars = (
        ("seconds per step", [median_seconds(result) for result in results.values()], "{:.2f}"),
        ("peak memory, MiB", [result["memory_peak_mib"] for result in results.values()], "{:.0f}"),
    )
    for panel, (title, values, form) in zip(axes[2:], bars, strict=True):
        drawn = panel.bar(
            list(RUNS.values()), values, color=[styles[run]["color"] for run in results]
        )
        panel.bar_label(drawn, [form.format(value) for value in values])
        panel.set(title=title)
        panel.margins(y=0.15)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main())
