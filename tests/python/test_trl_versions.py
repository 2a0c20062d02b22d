"""The supported TRL range: one module says it, with a remedy, and it needs no TRL."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from typing import Any

import pytest
from fusedpo.trl import versions


@pytest.mark.parametrize(
    "version", ["1.15.0", "1.15.3", "1.16.0", "1.16.4", "1.16.0.post1", "1.16.0rc1"]
)
def test_supported_versions(version: str) -> None:
    assert versions.check(version) is None


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.28.0", "older"),
        ("1.9.2", "older"),
        ("1.14.2", "older"),
        ("1.15.0.dev0", "older"),
        ("1.15.0rc1", "older"),
        ("1.17.0", "newer"),
        ("1.17.0.dev0", "newer"),
        ("2.0", "newer"),
        ("unknown", "must look like"),
    ],
)
def test_other_versions_give_reason_range_and_remedy(version: str, reason: str) -> None:
    problem = versions.check(version)
    assert problem is not None
    assert version in problem
    assert reason in problem
    assert 'pip install "trl>=1.15,<1.17"' in problem


def test_installed_version_is_read_from_the_metadata(monkeypatch: Any) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"trl": "1.16.0"}[name])
    assert versions.installed() == "1.16.0"
    assert versions.require_supported() == "1.16.0"


def test_missing_trl_is_an_import_error_with_the_remedy(monkeypatch: Any) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert versions.installed() is None
    with pytest.raises(ImportError, match="pip install"):
        versions.require_supported()


def run_without_trl(code: str) -> subprocess.CompletedProcess[str]:
    hide = (
        "import sys\n"
        "for name in ('trl', 'transformers', 'accelerate', 'packaging'):\n"
        "    sys.modules[name] = None\n"
    )
    return subprocess.run(
        [sys.executable, "-c", hide + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_versions_and_status_work_without_trl() -> None:
    result = run_without_trl(
        "import importlib.metadata as m\n"
        "def missing(name): raise m.PackageNotFoundError(name)\n"
        "m.version = missing\n"
        "from fusedpo.trl.versions import check\n"
        "from fusedpo.trl import patch_trl, status\n"
        "assert check('1.16.0') is None\n"
        "assert status().problem == 'TRL is not installed.' and not status().supported\n"
        "try:\n"
        "    patch_trl()\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    assert result.returncode == 0, result.stderr
    assert "pip install" in result.stdout


def test_importing_fusedpo_trl_does_not_import_trl() -> None:
    pytest.importorskip("trl", reason="fusedpo.trl needs TRL")
    code = (
        "import sys, fusedpo.trl; print([m for m in ('trl', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert result.stdout.strip() == "[]"
