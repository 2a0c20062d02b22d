"""The CPU benchmarks on tiny sizes: every contestant is right, the verdicts follow from figures.

Nothing here says how fast anything is, but that the check notices the portable kernels.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from logps_cases import threads

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "benchmarks" / "head.py").exists(), reason="needs the project's own folder"
    ),
    pytest.mark.usefixtures("_project"),
]


@pytest.fixture(scope="module")
def _project():
    """`benchmarks` is importable from the project's folder only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield


@pytest.fixture(scope="module")
def folder(_project, tmp_path_factory) -> pathlib.Path:
    """head.json and logits.json of tiny cases, measured in this process without torch.compile."""
    pytest.importorskip("trl", reason="one of the contestants is TRL's")
    from benchmarks import head, logits_cpu

    path = tmp_path_factory.mktemp("results")
    with threads(1):
        cases = ["fp32-frozen-V640-H64-N8", "bf16-trained-V640-H64-N8", "amp-nograd-V640-H64-N1"]
        peers = "ours,trl,eager,torch_chunked,liger_dpo,floor,floor_fp32,cast_weight"
        arguments = ["--quick", "--peers", peers, "--out", str(path / "head.json")]
        assert head.main([*arguments, "--cases", ",".join(cases)]) == 0
        cases = ["forward-fp32-V640-N8-share50", "backward-fp32-V640-N8-share50"]
        cases += ["forward-bf16-V640-N3", "backward-bf16-V640-N3"]
        peers = "ours,ours_all,ours_inplace,ours_all_inplace,eager,trl,floor,floor_inplace"
        arguments = ["--quick", "--peers", peers, "--out", str(path / "logits.json")]
        assert logits_cpu.main([*arguments, "--cases", ",".join(cases)]) == 0
    return path


def test_every_width_of_a_tile_is_right_and_timed(tmp_path):
    from benchmarks import tiles

    path = tmp_path / "tiles.json"
    with threads(1):
        arguments = ["--cases", "fp32-trained-V1400-H64-N8", "--seconds", "0", "--out", str(path)]
        assert tiles.main(arguments) == 0
    (case,) = json.loads(path.read_text())["cases"]
    assert case["chosen_width"] == 4096
    for peer, result in case["peers"].items():
        assert "median_s" in result, (peer, result)
        assert peer == "floor" or result["verified"]["ok"]


def test_every_contestant_is_right_and_timed(folder):
    for name in ("head", "logits"):
        for case in json.loads((folder / f"{name}.json").read_text())["cases"]:
            for peer, result in case["peers"].items():
                assert "median_s" in result, (case["name"], peer, result)
                assert peer.startswith(("floor", "cast")) or result["verified"]["ok"]
            assert case["peers"]["floor"]["times_floor"] == 1


# ---- contests -----------------------------------------------------------------------------------


def contest_of(**peers):
    """Contestants over a problem that is its vocabulary; the right answer is twice that."""
    from benchmarks import contest

    def verify(peer, problem, answer, truth):
        return None if peer == "floor" else {"ok": answer == truth, "errors": {"it": answer}}

    one = contest.Contest(
        640, lambda size: size, peers, lambda size: 2 * size, verify, lambda size: None
    )
    return contest.run(one, contest.Limits(0.05, 0.0, (2, 2)))


def test_wrong_and_absent_contestants_are_recorded_and_not_timed():
    def no_package(size):
        raise ModuleNotFoundError("No module named 'gold'")

    results = contest_of(
        floor=lambda size: lambda: None,
        ours=lambda size: lambda: 2 * size,
        wrong=lambda size: lambda: 3 * size,
        absent=no_package,
    )
    assert results["ours"]["rounds"] == 2
    assert results["ours"]["times_floor"] > 0
    assert results["wrong"] == {
        "predicted_s": results["wrong"]["predicted_s"],
        "verified": {"ok": False, "errors": {"it": 1920}},
    }
    assert results["absent"] == {"not_run": "ModuleNotFoundError: No module named 'gold'"}


def test_ours_that_fails_is_no_absence():
    def broken(size):
        raise RuntimeError("it is broken")

    with pytest.raises(RuntimeError, match="it is broken"):
        contest_of(floor=lambda size: lambda: None, ours=broken)


def test_a_call_that_takes_too_long_is_scaled_up_from_a_slice():
    import time

    def slow(size):
        def call():
            time.sleep(size / 2000)  # 0.32 s for the whole vocabulary, 0.05 s are allowed
            return 2 * size

        return call

    results = contest_of(
        floor=lambda size: lambda: None, ours=lambda size: lambda: 2 * size, slow=slow
    )
    assert results["slow"]["extrapolated_from_V"] < 640
    assert results["slow"]["median_s"] > 0.3
    assert results["slow"]["verified"]["ok"]
    assert "extrapolated_from_V" not in results["ours"]


def test_a_case_has_the_name_that_it_is_parsed_from():
    from benchmarks.head import AXES, CENTRE, HeadCase
    from benchmarks.logits_cpu import LogitsCase

    for case in [*CENTRE, *AXES]:
        assert HeadCase.parse(case.name) == case
    assert LogitsCase.parse("backward-bf16-N3-T1") == LogitsCase("backward", "bf16", N=3, T=1)
    with pytest.raises(ValueError, match=r"V, N, share, T with a number.*got 'forward-fp32-H3'"):
        LogitsCase.parse("forward-fp32-H3")


# ---- targets ------------------------------------------------------------------------------------


def imaginary_runs(**changes):
    """Runs of a machine that meets every target, with some contestants' seconds changed."""
    from benchmarks import head, logits_cpu, memory

    seconds = {"ours": 1.0, "ours_all": 1.1, "ours_inplace": 1.0, "floor": 0.95}
    seconds |= {"floor_inplace": 0.95, "trl": 25.0, "eager": 13.0, "cast_weight": 0.1, **changes}
    peers = {name: {"median_s": value} for name, value in seconds.items()}

    def cases(found):
        return {"cases": [{**head.fields_of(case), "peers": peers} for case in found]}

    held = {"cases": [{**head.fields_of(m.case), "peers": {"ours": {"extra_bytes": 3e8}}}
                      for m in memory.MEASUREMENTS]}  # fmt: skip
    return {
        "head": cases([*head.CENTRE, *head.AXES]),
        "logits": cases([*logits_cpu.CENTRE, *logits_cpu.AXES]),
        "memory": held,
    }


def test_every_target_of_a_cpu_is_judged_by_the_default_cases():
    from benchmarks import judge
    from benchmarks.targets_cpu import TARGETS

    found = judge.rows(TARGETS, imaginary_runs())
    assert [row for row in found if not row["met"]] == []
    assert all(row["met"] is None for row in judge.rows(TARGETS, {}))


def test_a_missed_target_says_whether_the_floor_would_miss_it():
    from benchmarks import judge
    from benchmarks.targets_cpu import TARGETS

    def verdicts(**changes):
        rows = judge.rows(TARGETS, imaginary_runs(**changes))
        return {row["target"]: judge.verdict(row) for row in rows
                if "forward + backward in place" in row["case"]}  # fmt: skip

    assert verdicts(ours_inplace=1.2) == {">= 12x": "missed"}
    assert verdicts(eager=11.0) == {">= 12x": "missed: the floor itself misses it"}


# ---- what is made from the JSON -----------------------------------------------------------------


def test_plots_are_made_from_the_results_alone(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    for name, content in imaginary_runs().items():
        for case in content["cases"]:
            case |= {"level": "hidden", "threads": 1 + case["N"] % 2}
            for result in case["peers"].values():
                result |= {"times_floor": 1.0, "extra_bytes": 3e8}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert plot.main([str(tmp_path)]) == 0
    made = {path.stem for path in tmp_path.glob("*.png")}
    axes = {"head_axes", "logits_forward_axes", "logits_backward_axes"}
    assert made == {"head", "logits", "memory"} | axes
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in made)


def test_tables_are_those_of_the_results():
    from benchmarks import readme

    assert readme.main(["--check"]) == 0, "run `python -m benchmarks.readme`"


# ---- attention over packed rows -----------------------------------------------------------------


@pytest.fixture
def packed_attention(_project):
    pytest.importorskip("transformers", reason="packed attention is registered with transformers")
    from benchmarks import packed_attention

    return packed_attention


def measured(packed_attention, dtype=torch.float32):
    cpu = torch.device("cpu")
    return packed_attention.measure("anthropic-evals", 2, dtype, cpu, rounds=1)


def test_attention_is_verified_before_it_is_timed(packed_attention, monkeypatch):
    case = measured(packed_attention)
    assert set(case["times"]) == set(case["errors"]) == {"segments", "whole_row", "padded"}
    assert set(case["not_run"]) == {"varlen", "flex"}
    padded = packed_attention.padded

    def all_earlier(problem, at):  # also the other completion, and the other pairs
        mask = torch.ones_like(packed_attention.visible(problem, at)).tril_()
        return functools.partial(packed_attention.whole_row, mask)

    def not_a_number(problem):
        attend = packed_attention.packed(problem, "segments")
        return lambda *inputs: attend(*inputs) * float("nan")

    monkeypatch.setattr(
        packed_attention,
        "contestants",
        lambda problem, at: {
            "whole_row": lambda: all_earlier(problem, at),
            "segments": lambda: not_a_number(problem),
        },
    )
    monkeypatch.setattr(packed_attention, "padded", lambda *rows: 1.01 * padded(*rows))
    case = measured(packed_attention)
    assert case["not_run"] == {"whole_row": "wrong", "segments": "wrong", "padded": "wrong"}
    assert case["times"] == {}


def test_attention_is_timed_as_varlen_only_where_the_kernel_ran(packed_attention, monkeypatch):
    from fusedpo._packing import varlen
    from packing_helpers import plain_varlen

    monkeypatch.setattr(varlen, "has_flash", lambda device: True)
    monkeypatch.setattr(varlen, "_agrees", {})
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", plain_varlen)
    assert "varlen" in measured(packed_attention, torch.bfloat16)["times"]
    assert "did not run" in measured(packed_attention)["not_run"]["varlen"]  # fp32
    monkeypatch.setattr(varlen, "_agrees", {})
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn", lambda *x, **y: 1.1 * plain_varlen(*x, **y)
    )
    with pytest.warns(UserWarning, match="variable-length attention differs"):
        case = measured(packed_attention, torch.bfloat16)
    assert "did not run" in case["not_run"]["varlen"]
    assert "varlen" not in case["times"]
    assert "segments" in case["times"]


def test_attention_is_timed_without_what_serves_all_layers(packed_attention, monkeypatch):
    interleave = packed_attention.device.interleave

    def nothing_is_built(calls, rounds, at):
        def refused(*arguments, **keywords):
            raise AssertionError("a mask, a table or padded rows are built in the timed call")

        with monkeypatch.context() as while_timed:
            for name in ("SegmentTable", "visible", "padded_index", "padded_rows"):
                while_timed.setattr(packed_attention, name, refused)
            while_timed.setattr(torch, "arange", refused)  # every mask of a segment needs it
            return interleave(calls, rounds, at)

    monkeypatch.setattr(packed_attention.device, "interleave", nothing_is_built)
    assert set(measured(packed_attention)["times"]) == {"segments", "whole_row", "padded"}


# ---- the check ----------------------------------------------------------------------------------


def test_a_kernel_twice_as_slow_is_slow_in_every_cell():
    from benchmarks import check

    recorded = json.loads(check.RECORDED.read_text())
    assert {"AVX2", "AVX512"} <= set(recorded)
    for ratios in recorded.values():
        assert set(ratios) == set(check.CELLS)
        for ratio in ratios.values():
            assert check.is_slow(2 * ratio, ratio)
            assert not check.is_slow(1.3 * ratio, ratio)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="no ratios are recorded for this processor",
)
def test_the_check_fails_on_the_portable_kernels():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.check", "--cells", "logits fp32 forward"],
        env=os.environ | {"FUSEDPO_CPU_ISA": "generic"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "logits fp32 forward, all outputs" in done.stdout
    assert done.stdout.count("SLOW") == 2
