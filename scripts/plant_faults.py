"""Plants one fault at a time into the CUDA sources and demands that a test fails.

    scripts/plant_faults.py BUILD [--every N] [--only REGEX] [--jobs N]

BUILD is a folder where fusedpo_cuda_check_test is built. The faults are the tables of
tests/cuda_host/faults/*.toml:

    [[fault]]
    why = "the second half of a warp is left out of every sum"
    file = "csrc/cuda/reduce.cuh"
    text = "kWarpSize / 2"              # must be there exactly `times` times (once if left out)
    replace = "kWarpSize / 4"
    build = ["csrc/cuda/loss_cuda.cu"]  # what to compile again; left out: the file itself
    tests = "Losses*"                   # which tests must notice

A fault whose text is gone, or that does not compile, is an error, so faults cannot rot. Each one
compiles one or two files and links and runs the tests of its filter until the first failure.
FUSEDPO_FAULTS_EVERY is the default of --every: 10 plants every tenth fault, beginning
with one that the commit decides, so that in time every fault gets its turn.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "fusedpo_cuda_check_test"
SECONDS = 300.0  # a fault that makes a test run forever is noticed, too


@dataclass(frozen=True)
class Fault:
    name: str
    why: str
    file: str
    text: str
    replace: str
    tests: str
    build: tuple[str, ...]
    times: int

    def problem(self) -> str | None:
        """Why it cannot be planted, or None."""
        found = (ROOT / self.file).read_text().count(self.text)
        if found != self.times:
            times = f"{found} times, not {self.times}"
            return f"{self.name}: {self.file} has the text {times}: {self.text!r}"
        if self.text == self.replace:
            return f"{self.name}: replaces a text by itself"
        return None


def read_faults() -> list[Fault]:
    faults = []
    for path in sorted((ROOT / "tests/cuda_host/faults").glob("*.toml")):
        for number, table in enumerate(tomllib.loads(path.read_text())["fault"], 1):
            faults.append(
                Fault(
                    name=f"{path.stem}:{number}",
                    why=table["why"],
                    file=table["file"],
                    text=table["text"],
                    replace=table["replace"],
                    tests=table["tests"],
                    build=tuple(table.get("build", [table["file"]])),
                    times=table.get("times", 1),
                )
            )
    return faults


class Builder:
    """Compiles and links as BUILD does, with one file replaced."""

    def __init__(self, build: Path, ninja: str) -> None:
        self.build = build
        self.compile: dict[str, list[str]] = {}
        for entry in json.loads((build / "compile_commands.json").read_text()):
            command = entry["command"]
            if "fusedpo_cuda_kernels_check" in command:
                self.compile[os.path.relpath(entry["file"], ROOT)] = shlex.split(command)
        ask = [ninja, "-C", str(build), "-t", "commands", PROGRAM]
        commands = subprocess.run(ask, check=True, capture_output=True, text=True).stdout
        link = commands.strip().splitlines()[-1]
        self.link = shlex.split(link.removeprefix(": && ").removesuffix(" && :"))

    def plant(self, fault: Fault, folder: Path) -> Path:
        """Returns the program with the fault in it."""
        changed = folder / fault.file
        changed.parent.mkdir(parents=True)
        changed.write_text((ROOT / fault.file).read_text().replace(fault.text, fault.replace))
        objects = []
        for number, source in enumerate(fault.build):
            target = folder / f"{number}.o"
            command = list(self.compile[source])
            command[command.index("-o") + 1] = str(target)
            if source == fault.file:
                command[command.index("-c") + 1] = str(changed)
            command.insert(
                1, f"-I{folder / 'csrc'}"
            )  # a changed header is found before the true one
            self.call([*command, "-g0", "-Wno-error"])
            objects.append(str(target))
        # Objects come before the library, whose members of the same name are then left out.
        program = folder / PROGRAM
        command = list(self.link)
        command[command.index("-o") + 1] = str(program)
        first = next(i for i, word in enumerate(command) if word.endswith(".a"))
        self.call(command[:first] + objects + command[first:])
        return program

    def call(self, command: list[str]) -> None:
        done = subprocess.run(command, cwd=self.build, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def run_tests(program: Path, filters: str) -> subprocess.CompletedProcess[str]:
    command = [str(program), "--gtest_brief=1", "--gtest_fail_fast", f"--gtest_filter={filters}"]
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
    )


def first_complaint(output: str) -> str:
    for line in output.splitlines():
        found = re.match(r"cuda_host: (.*)|\[  FAILED  \] (\S+)", line)
        if found:
            return (found[1] or found[2])[:100]
    return "no message"


def try_fault(builder: Builder, fault: Fault) -> tuple[Fault, str | None, float]:
    """Returns the fault, what noticed it (None: nothing did), and the seconds it took."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fusedpo-fault-") as folder:
        program = builder.plant(fault, Path(folder))
        try:
            done = run_tests(program, fault.tests)
        except subprocess.TimeoutExpired:
            return fault, f"ran for more than {SECONDS:.0f} s", time.monotonic() - start
    if "Running 0 tests" in done.stdout or "[==========] 0 tests" in done.stdout:
        raise RuntimeError(f"{fault.name}: no test is called {fault.tests}")
    noticed = None if done.returncode == 0 else first_complaint(done.stdout + done.stderr)
    return fault, noticed, time.monotonic() - start


def first_of(every: int) -> int:
    """Where the sample begins: a number below `every`, another one for another commit."""
    ask = ["git", "rev-parse", "HEAD"]
    found = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    return int(found[:8] or "0", 16) % every


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("build", type=Path)
    parser.add_argument(
        "--every", type=int, default=int(os.environ.get("FUSEDPO_FAULTS_EVERY", "1"))
    )
    parser.add_argument("--only", default="", help="plant those whose name, file or reason matches")
    parser.add_argument("--ninja", default="ninja")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()

    faults = read_faults()
    problems = [problem for fault in faults if (problem := fault.problem()) is not None]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        print("The sources have changed: change the faults with them.", file=sys.stderr)
        return 1
    chosen = [f for f in faults if re.search(args.only, f"{f.name} {f.file} {f.why}")]
    chosen = chosen[first_of(args.every) :: args.every]
    builder = Builder(args.build.resolve(), args.ninja)
    # A test that fails anyway would notice every fault.
    filters = ":".join(sorted({fault.tests for fault in chosen}))
    if run_tests(args.build.resolve() / "tests/cpp/cuda" / PROGRAM, filters).returncode != 0:
        print(f"the tests {filters} fail without any fault", file=sys.stderr)
        return 1
    missed = []
    with ThreadPoolExecutor(args.jobs) as pool:
        for fault, noticed, seconds in pool.map(lambda f: try_fault(builder, f), chosen):
            verdict = "caught" if noticed else "MISSED"
            print(f"{verdict} {seconds:5.1f} s  {fault.name}: {fault.why} [{noticed}]", flush=True)
            if noticed is None:
                missed.append(fault)
    caught = len(chosen) - len(missed)
    print(f"{caught} of {len(chosen)} planted faults were caught ({len(faults)} in all)")
    for fault in missed:
        print(f"missed: {fault.name} in {fault.file}: {fault.why}", file=sys.stderr)
    return 1 if missed or not chosen else 0


if __name__ == "__main__":
    sys.exit(main())
