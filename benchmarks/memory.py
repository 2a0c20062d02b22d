"""python -m benchmarks.memory: peak extra memory of one call on 4096 completion rows, on a CPU.

Each contestant runs in a process of its own: the peak of its resident memory above what the inputs
occupy, results included. Heads are 896 x 151,936, all positions are completion; logits that exist
are 4096 x 32,000 in fp32. Whether the results are right is for benchmarks.head and logits_cpu.
"""

from __future__ import annotations

import argparse
import gc
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import common, head, logits_cpu
from benchmarks.cases import fields_of
from benchmarks.head import HeadCase
from benchmarks.head_problem import Answer
from benchmarks.logits_cpu import LogitsCase

ROWS = 4096
WARM_UP = 1024  # vocabulary of the call that loads libraries and starts threads


class Measurement(NamedTuple):
    level: str  # hidden or logits
    case: HeadCase | LogitsCase
    peers: tuple[str, ...]


def _hidden(dtype: str, *peers: str) -> list[Measurement]:
    cases = (HeadCase(dtype, which, N=ROWS, share=100) for which in ("frozen", "trained"))
    return [Measurement("hidden", case, peers) for case in cases]


# The others' calls take most of a minute each; what they hold in fp32 says what they hold in bf16.
MEASUREMENTS = [
    *_hidden("fp32", "ours", "trl", "eager"),
    *_hidden("bf16", "ours"),
    *_hidden("amp", "ours"),
    Measurement("logits", LogitsCase("forward", "fp32", V=32_000, N=ROWS),
                ("ours_all", "trl", "eager", "compile_all")),
    Measurement("logits", LogitsCase("backward", "fp32", V=32_000, N=ROWS),
                ("ours", "ours_all_inplace", "trl", "eager", "compile")),
]  # fmt: skip


def measure(level: str, name: str, peer: str) -> dict[str, int]:
    """{"extra_bytes", "of_which_gradients"} of one call, in this process."""
    case: Any
    if level == "hidden":
        case = HeadCase.parse(name)
        maker: Callable[[Any], Callable[[], Any]] = head.PEERS[peer]
    else:
        case = LogitsCase.parse(name)
        maker = logits_cpu.peers_of(case)[peer]
    maker(case.problem(WARM_UP))()
    call = maker(case.problem(case.V))
    if peer.startswith("compile"):
        call()  # compiling takes memory, too, but once
    gc.collect()
    with common.PeakMemory() as peak:
        answer = call()
    if isinstance(answer, Answer):
        gradients = (answer.grad_hidden, answer.grad_weight)
    else:
        gradients = () if "inplace" in peer else (answer[1],)
    kept = sum(t.numel() * t.element_size() for t in gradients if t is not None)
    return {"extra_bytes": peak.extra_bytes, "of_which_gradients": kept}


def measured_apart(level: str, name: str, peer: str) -> dict[str, Any]:
    """The same in a new process; {"not_measured": reason} where it failed."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", level, name, peer]
    done = subprocess.run(command, capture_output=True, text=True, cwd=common.ROOT)
    if done.returncode != 0:
        return {"not_measured": done.stderr.strip()[-300:] or f"exit status {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, help="JSON; default in results/<machine>/")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(*options.one)))
        return 0
    if not sys.platform.startswith("linux"):
        parser.error("the high-water mark of a process can be reset on Linux only")
    environment = common.environment()
    path = options.out or common.RESULTS / common.device_name(environment) / "memory.json"
    content: dict[str, Any] = {"benchmark": "memory", "environment": environment, "cases": []}
    for level, case, peers in MEASUREMENTS:
        results: dict[str, Any] = {}
        content["cases"].append({"level": level, **fields_of(case), "peers": results})
        for peer in peers:
            results[peer] = measured_apart(level, case.name, peer)
            extra = results[peer].get("extra_bytes")
            text = results[peer]["not_measured"] if extra is None else f"{extra / 1e6:8.0f} MB"
            print(f"{level:7} {case.name:32} {peer:18} {text}", flush=True)
        common.write(path, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
