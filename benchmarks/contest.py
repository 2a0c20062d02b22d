"""One case of a CPU benchmark: verifies every contestant, then times the correct ones, interleaved.

A contestant that is wrong is recorded as wrong and not timed, one that cannot run here with its
reason. One that would take too long is verified and timed on a slice of the vocabulary; its time is
scaled up and marked `extrapolated_from_V`.
"""

from __future__ import annotations

import gc
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar
from unittest import mock

from benchmarks import common
from benchmarks.common import Call

HALVINGS = 6  # of the vocabulary, down to the slice on which a contestant's time is predicted
NEVER_ABSENT = ("ours", "floor")  # their failure is ours, not a finding
# What takes as long as another contestant and would be compiled for every slice that is tried.
PREDICTED_BY = {"compile": "eager", "compile_all": "trl"}

P = TypeVar("P")


class Contest(NamedTuple, Generic[P]):
    """What is compared, for problems `P` that differ in their vocabulary alone."""

    vocabulary: int
    problem: Callable[[int], P]  # of a vocabulary
    peers: Mapping[str, Callable[[P], Callable[[], Any]]]
    truth: Callable[[P], Any]
    verify: Callable[[str, P, Any, Any], dict[str, Any] | None]  # peer, .., answer, truth
    before: Callable[[P], Callable[[], Any] | None]  # untimed, before every call


class Limits(NamedTuple):
    """How much time a case may take."""

    call: float  # seconds; a longer call is extrapolated
    case: float  # seconds for the timed rounds of a case, within the bounds of `rounds`
    rounds: tuple[int, int]


def run(contest: Contest[P], limits: Limits) -> dict[str, dict[str, Any]]:
    """{peer: result}: median_s and times_floor, or `verified` without times, or `not_run`."""
    results: dict[str, dict[str, Any]] = {}
    slices: dict[str, int] = {}
    for peer in sorted(contest.peers, key=lambda name: name in PREDICTED_BY):
        try:
            slices[peer], predicted = affordable(contest, peer, results, limits)
            results[peer] = {"predicted_s": predicted}
        except Exception as error:
            results[peer] = absent(peer, error)
    for size in sorted(set(slices.values())):
        time_slice(contest, size, [p for p in slices if slices[p] == size], results, limits)
    floor = results.get("floor", {}).get("median_s")
    for result in results.values():
        if timed(result) and floor:
            result["times_floor"] = result["median_s"] / floor
    return {peer: results[peer] for peer in contest.peers}


def absent(peer: str, error: Exception) -> dict[str, Any]:
    if peer in NEVER_ABSENT:
        raise error
    return {"not_run": common.why(error)}


def affordable(
    contest: Contest[P], peer: str, results: Mapping[str, Any], limits: Limits
) -> tuple[int, float]:
    """The vocabulary to time, all or a slice of it, and the seconds that a call on it will take."""
    vocabulary = contest.vocabulary
    like = results.get(PREDICTED_BY.get(peer, ""), {})
    if "predicted_s" in like:
        return like.get("extrapolated_from_V", vocabulary), like["predicted_s"]
    # Halves of halves, so that contestants share their slices: each is a problem and a truth.
    slices = [max(64, vocabulary // 2**k // 64 * 64) for k in range(1, HALVINGS + 1)]
    size = slices[-1]
    seconds = seconds_on(contest, peer, size)
    if seconds * vocabulary / size > limits.call:
        # A small slice predicts too much: it does not amortise what a call costs.
        allowed = size * limits.call / seconds
        size = next((part for part in slices if part <= allowed), size)
        seconds = seconds_on(contest, peer, size)
    whole = seconds * vocabulary / size
    return (vocabulary, whole) if whole <= limits.call else (size, seconds)


def seconds_on(contest: Contest[P], peer: str, size: int) -> float:
    """Seconds of one call on `size` entries of the vocabulary, after an untimed one."""
    problem = contest.problem(size)
    call = Call(contest.peers[peer](problem), contest.before(problem))
    common.seconds_of(call)
    return min(common.seconds_of(call) for _ in range(2))


def time_slice(
    contest: Contest[P],
    size: int,
    peers: Iterable[str],
    results: dict[str, dict[str, Any]],
    limits: Limits,
) -> None:
    """Adds to `results` what the peers' calls on `size` entries of the vocabulary took."""
    problem = contest.problem(size)
    truth = contest.truth(problem)
    calls: dict[str, Call] = {}
    for peer in peers:
        result = results[peer]
        if size != contest.vocabulary:
            result["extrapolated_from_V"] = size
        try:
            call = Call(contest.peers[peer](problem), contest.before(problem))
            if call.before is not None:
                call.before()
            check = contest.verify(peer, problem, call.run(), truth)
        except Exception as error:
            result |= absent(peer, error)
            continue
        if check is not None:
            result["verified"] = check
        if check is None or check["ok"]:
            calls[peer] = call
    del truth
    gc.collect()
    once = sum(results[peer]["predicted_s"] for peer in calls)
    fewest, most = limits.rounds
    rounds = max(fewest, min(most, int(limits.case / max(once, 1e-9))))
    for peer, times in common.interleave(calls, rounds).items():
        scale = contest.vocabulary / size
        results[peer] |= common.summary([scale * seconds for seconds in times])


def timed(result: Mapping[str, Any]) -> bool:
    return "median_s" in result


def show(title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints a case as a table."""
    print(f"\n{title}")
    print(f"{'':16}{'median ms':>11}{'min':>10}{'max':>10}{'x floor':>9}  remarks")
    for peer, result in results.items():
        if not timed(result):
            print(f"{peer:16}{'-':>11}{'':29}  {common.excuse(result)}")
            continue
        fields = (("median_s", 11), ("min_s", 10), ("max_s", 10))
        times = "".join(f"{1e3 * result[field]:{width}.3f}" for field, width in fields)
        remarks = [common.errors_of(result)] if "verified" in result else []
        if "extrapolated_from_V" in result:
            remarks.append(f"EXTRAPOLATED from V = {result['extrapolated_from_V']}")
        ratio = f"{result['times_floor']:9.2f}" if "times_floor" in result else f"{'-':>9}"
        print(f"{peer:16}{times}{ratio}  {'; '.join(remarks)}", flush=True)


# ---- a benchmark of many cases ------------------------------------------------------------------


def report(
    benchmark: str,
    cases: Iterable[dict[str, Any]],
    path: pathlib.Path | None,
) -> int:
    """Shows every case when it is measured and writes all so far; 1 if ours was wrong in one."""
    environment = common.environment()
    path = path or common.RESULTS / common.device_name(environment) / f"{benchmark}.json"
    print(
        f"{environment['cpu']}, {environment['threads']} threads, "
        f"{' '.join(environment['flags'])}, torch {environment['versions']['torch']}"
    )
    content: dict[str, Any] = {
        "benchmark": benchmark,
        "environment": environment,
        "cases": [],
    }
    started = time.monotonic()
    correct = True
    # A run that was killed can leave torch.compile's usual cache with half a file in it.
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        for case in cases:
            content["cases"].append(case)
            content["seconds"] = round(time.monotonic() - started)
            show(case["name"], case["peers"])
            common.write(path, content)
            ours = [r for p, r in case["peers"].items() if p.startswith("ours")]
            correct = correct and all(result["verified"]["ok"] for result in ours)
    return 0 if correct else 1
