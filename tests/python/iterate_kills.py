"""Kills `iterate` with SIGKILL at every stage in turn and starts it again, for test_iterate_kills.

Argument: a folder. A child is forked after the imports, for each run; it counts in a file what it
begins and what it has kept. Prints one JSON object: where it was killed, and the counts with and
without kills.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import datasets
import judges
import torch
import transformers
from fusedpo.store import StoreWriter
from fusedpo.tools.iterate import iterate, training
from fusedpo.tools.iterate import run as iterate_run
from fusedpo.tools.judge import cache, comparison
from fusedpo.tools.pairs import run as pairs_run
from fusedpo.tools.pairs import samples
from fusedpo.tools.sampling import Sampling
from fusedpo.tools.train.report import TrainReport
from precompute_helpers import write_inputs

CONFIG = {
    "strategy": "dpo",
    "max_steps": 3,
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "max_length": 48,
    "report_to": "none",
    "disable_tqdm": True,
}
# In the order in which a round comes to them. "half": with the first half of the bytes written.
STAGES = (
    "generate begin",
    "generate end",
    "keep samples half",
    "keep samples end",
    "judge begin",
    "keep verdict half",
    "keep verdict end",
    "write pairs.jsonl begin",
    "write pairs.jsonl end",
    "write training.json begin",
    "write training.json end",
    "train begin",
    "store begin",
    "store end",
    "step begin",
    "checkpoint begin",
    "optimizer begin",
    "checkpoint end",
    "step end",
    "checkpoint begin",
    "train report begin",
    "train report end",
)
# A round is like another; of the second one what differs, and what follows the last one.
TARGETS = (
    "write settings.json begin",
    "write settings.json end",
    *STAGES,
    "judge begin",
    "store begin",
    "optimizer begin",
    "train report end",
    "generate end",
    "write report.json begin",
    "write report.json end",
)


class Log:
    """What the children did, in a file that outlives them, and where the present one dies."""

    def __init__(self, path: pathlib.Path, target: str | None) -> None:
        self.path = path
        self.target = target

    def at(self, event: str) -> None:
        with self.path.open("a") as file:
            file.write(event + "\n")
        if event == self.target:
            os.kill(os.getpid(), signal.SIGKILL)


def mark(owner: Any, name: str, event: str | Callable[..., str], log: Log) -> None:
    """Log when a function or method begins and ends."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def marked(*args: Any, **keywords: Any) -> Any:
        told = event if isinstance(event, str) else event(*args)
        log.at(f"{told} begin")
        result = original(*args, **keywords)
        log.at(f"{told} end")
        return result

    setattr(owner, name, marked)


def mark_append(owner: Any, event: str, log: Log) -> None:
    """Log what is appended to a file, and, where the kill is to fall there, append a half of it."""
    original = owner.append_rows

    def marked(file: Any, rows: Any) -> None:
        if log.target == f"{event} half":
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.write(lines.encode()[: len(lines) // 2])
            file.flush()
            log.at(f"{event} half")
        original(file, rows)
        log.at(f"{event} end")

    owner.append_rows = marked


def mark_all(log: Log) -> None:
    mark(samples, "generate", "generate", log)
    mark_append(samples, "keep samples", log)
    mark(comparison, "call", "judge", log)
    mark_append(cache, "keep verdict", log)
    for module in (pairs_run, training, iterate_run):
        mark(module, "write_whole", lambda path, text: f"write {pathlib.Path(path).name}", log)
    files = sys.modules["fusedpo.tools.files"]
    mark(files, "write_whole", lambda path, text: f"write {pathlib.Path(path).name}", log)
    mark(training, "train", "train", log)
    mark(StoreWriter, "append", "store", log)
    mark(transformers.Trainer, "training_step", "step", log)
    mark(transformers.Trainer, "_save_checkpoint", "checkpoint", log)
    mark(transformers.Trainer, "_save_optimizer_and_scheduler", "optimizer", log)
    mark(TrainReport, "write", "train report", log)


def run(model: str, output: pathlib.Path, log: pathlib.Path, target: str | None) -> bool:
    """One run in a child; returns whether it was killed."""
    pid = os.fork()
    if pid == 0:
        try:
            mark_all(Log(log, target))
            iterate(
                ["who sees a tree ?", "who likes the river ?", "who paints his red hat ?"],
                model=model,
                judge=judges.longer,
                config=CONFIG,
                output=output,
                rounds=2,
                beta=[0.1, 0.05],
                learning_rate=None,
                # One prompt in a chunk.
                sampling=Sampling(n=3, max_new_tokens=12, temperature=1.5, batch_size=1),
            )
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return True
    assert status == 0, f"a run that nothing killed failed with status {status}"
    return False


def counted(log: pathlib.Path) -> Counter[str]:
    return Counter(log.read_text().splitlines())


def contents(folder: pathlib.Path) -> dict[str, str]:
    """What a run leaves that another one must leave, too."""
    kept = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl" or path.name in ("settings.json", "model.safetensors"):
            kept[name] = path.read_bytes().hex().replace(str(folder).encode().hex(), "")
    return kept


def main(folder: pathlib.Path) -> dict[str, Any]:
    torch.set_num_threads(1)  # before the first fork: no other thread may be there
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    model = write_inputs(folder, rows=4).model
    assert not run(model, folder / "whole", folder / "whole.log", None)
    killed: list[str] = []
    for target in (*TARGETS, None):
        if run(model, folder / "killed", folder / "killed.log", target):
            killed.append(str(target))
    whole, resumed = contents(folder / "whole"), contents(folder / "killed")
    differing = [name for name in whole.keys() | resumed if whole.get(name) != resumed.get(name)]
    return {
        "killed": killed,
        "files": sorted(whole),
        "differing": sorted(differing),
        "whole": counted(folder / "whole.log"),
        "resumed": counted(folder / "killed.log"),
    }


if __name__ == "__main__":
    print(json.dumps(main(pathlib.Path(sys.argv[1]))))
