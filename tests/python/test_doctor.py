"""`python -m fusedpo` tells what is there, and its exit code whether something is broken."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from importlib import metadata

import fusedpo
import pytest
import torch
from fusedpo import _doctor, _load
from installs import copy_package, needs_native


def doctor(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fusedpo", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=300,
    )


@needs_native
def test_healthy_install_exits_with_0_and_no_warning() -> None:
    result = doctor()
    assert (result.returncode, result.stderr) == (0, "")
    assert "nothing is broken" in result.stdout


@needs_native
def test_json_says_the_same_as_the_text() -> None:
    report = json.loads(doctor("--json").stdout)
    assert _doctor.render(report) == doctor().stdout.rstrip("\n")


@needs_native
def test_build_and_processor_are_reported() -> None:
    report = _doctor.examine()
    assert report["built"]["version"] == fusedpo.__version__
    assert report["built"]["compiler"].split()[0] in ("GNU", "Clang", "AppleClang")
    assert "generic" in report["built"]["isas"]
    assert report["cpu"]["isa"] in report["built"]["isas"]
    assert report["cpu"]["bf16_gemm"] in ("native", "widened")
    assert set(report["checks"].values()) == {"ok"}
    assert len(report["checks"]) == (9 if cuda_serves() else 5)


def test_every_device_and_dtype_has_a_path_for_every_function() -> None:
    rows = _doctor.examine()["paths"]
    cpu = [row for row in rows if row["device"] == "cpu"]
    assert [row["dtype"] for row in cpu] == ["fp32", "fp64", "bf16", "fp16"]
    for row in rows:
        for function in _doctor._FUNCTIONS:
            assert callable(getattr(fusedpo, function))
            assert row[function] in ("C++", "C++, widened tiles", "CUDA", "torch reference")


@needs_native
@pytest.mark.parametrize(("route", "path"), [("native", "C++"), ("widened", "C++, widened tiles")])
def test_gemm_route_shows_in_the_table(route: str, path: str) -> None:
    report = json.loads(doctor("--json", FUSEDPO_BF16_GEMM=route).stdout)
    row = next(r for r in report["paths"] if (r["device"], r["dtype"]) == ("cpu", "bf16"))
    assert row["linear_token_logps"] == path
    assert report["cpu"]["bf16_gemm"] == route


@needs_native
def test_lowered_instruction_set_is_reported() -> None:
    report = json.loads(doctor("--json", FUSEDPO_CPU_ISA="generic").stdout)
    assert report["cpu"]["isa"] == "generic"
    assert report["broken"] == []


def test_disabled_native_code_is_not_broken_and_has_a_remedy() -> None:
    report = json.loads((result := doctor("--json", FUSEDPO_DISABLE_NATIVE="1")).stdout)
    assert result.returncode == 0
    assert report["loaded"]["cpu"] is False
    assert {row["token_logps"] for row in report["paths"]} == {"torch reference"}
    assert any(remedy.startswith("cpu:") for remedy in report["remedies"])


@needs_native
def test_library_that_does_not_load_exits_with_1_and_the_reason(tmp_path: pathlib.Path) -> None:
    (copy_package(tmp_path) / "libfusedpo_ops_cpu.so").write_bytes(b"this is no library")
    result = doctor("--json", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    report = json.loads(result.stdout)
    assert any("libfusedpo_ops_cpu.so" in reason for reason in report["broken"])
    assert any("install fusedpo again" in remedy for remedy in report["remedies"])


@needs_native
def test_wrong_result_of_an_operator_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedpo import __main__, _store

    monkeypatch.setattr(_store, "crc32c", lambda data: 0)
    assert __main__.main(["--json"]) == 1
    assert "_store.crc32c: got 0x0" in _doctor.examine()["broken"][0]


def cuda_serves() -> bool:
    return torch.cuda.is_available() and _load.native("cuda")


def test_cuda_operators_are_reported_as_they_are() -> None:
    report = _doctor.examine()
    assert report["loaded"]["cuda"] is (report["why_not"]["cuda"] is None)
    if not report["loaded"]["cuda"]:
        (remedy,) = [line for line in report["remedies"] if line.startswith("cuda:")]
        assert "install" in remedy or "Update the driver" in remedy
    if torch.version.cuda is None:
        assert report["loaded"]["cuda"] is False
        assert report["cuda"] is None


@pytest.mark.parametrize(
    ("runtime", "driver", "text"),
    [
        (13020, 12080, "serves CUDA 12.8"),
        (13000, 0, "was not found"),
        (13020, 13000, None),  # one major version's drivers serve all its runtimes
        (12080, 13000, None),
    ],
)
def test_a_driver_older_than_the_runtime_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, runtime: int, driver: int, text: str | None
) -> None:
    # As if the library had been loaded.
    monkeypatch.setattr(_load, "_problems", {})
    monkeypatch.setattr(_load, "_driver_checked", False)
    monkeypatch.setattr(_load, "cuda_versions", lambda: {"runtime": runtime, "driver": driver})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = _doctor.examine()
    assert report["loaded"]["cuda"] is (text is None)
    rendered = _doctor.render(report)
    assert f"runtime {runtime // 1000}.{runtime % 1000 // 10} linked in" in rendered
    assert ("linked in, no driver" in rendered) is (driver == 0)
    if text is not None:
        assert text in report["why_not"]["cuda"]
        assert "Update the driver" in report["why_not"]["cuda"]
    assert not report["broken"]


def versions_with(monkeypatch: pytest.MonkeyPatch, found: dict[str, str]) -> dict[str, dict]:
    def version(package: str) -> str:
        if package not in found:
            raise metadata.PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(_doctor.metadata, "version", version)
    return {row["package"]: row for row in _doctor.examine()["versions"]}


@pytest.mark.parametrize("version", ["1.9.1", "1.17.0", "2.0.0"])
def test_untested_trl_is_named_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    row = versions_with(monkeypatch, {"trl": version})["trl"]
    assert row["version"] == version
    assert version in row["problem"]
    assert "pip install" in row["problem"]


@pytest.mark.parametrize(("version", "patch"), [("1.9.2", False), ("1.15.0", True)])
def test_supported_trl_has_no_problem(
    monkeypatch: pytest.MonkeyPatch, version: str, patch: bool
) -> None:
    rows = versions_with(monkeypatch, {"trl": version})
    assert rows["trl"]["problem"] is None
    assert (rows["trl, for patch_trl"]["problem"] is None) is patch


def test_missing_trl_has_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = versions_with(monkeypatch, {})
    assert "fusedpo[trl]" in rows["trl"]["problem"] or "Python 3.11" in rows["trl"]["problem"]
    assert rows["transformers"]["version"] is None


def test_old_torch_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    row = _doctor.examine()["versions"][0]
    assert "pip install 'torch>=2.10'" in row["problem"]
