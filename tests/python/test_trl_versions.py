"""The supported TRL range: one module says it, with a remedy, and it needs no TRL. What is bound to
there is checked."""

from __future__ import annotations

import inspect
import subprocess
import sys
import warnings
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import fusedpo.trl
import pytest
from fusedpo.trl import UnsupportedTRLError, versions

pytestmark = pytest.mark.trl


@pytest.mark.parametrize(
    ("version", "trainer", "patch"),
    [
        ("1.9.2", True, False),
        ("1.9.10", True, False),
        ("1.14.2", True, False),
        ("1.15.0rc1", True, False),
        ("1.15.0", True, True),
        ("1.16.0", True, True),
        ("1.16.4", True, True),
        ("1.16.0.post1", True, True),
        ("1.17.0.dev0", True, True),
        ("2.0", True, True),
    ],
)
def test_each_part_takes_its_range_and_what_is_newer(
    version: str, trainer: bool, patch: bool
) -> None:
    assert (versions.TRAINER.problem(version) is None) is trainer
    assert (versions.PATCH.problem(version) is None) is patch
    newer = version.startswith(("1.17", "2"))
    assert (versions.untested(version) is not None) is newer


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("0.28.0", "older"),
        ("1.9.1", "older"),
        ("1.9.2.dev0", "older"),
        ("1.9.2rc1", "older"),
        ("unknown", "must look like"),
    ],
)
def test_other_versions_give_reason_range_and_remedy(version: str, reason: str) -> None:
    problem = versions.TRAINER.problem(version)
    assert problem is not None
    assert version in problem
    assert reason in problem
    assert 'pip install "trl>=1.9.2,<1.17"' in problem


def test_where_the_patch_is_too_new_the_trainer_is_named() -> None:
    assert "FusedDPOTrainer works there" in str(versions.PATCH.problem("1.14.2"))
    assert "FusedDPOTrainer works" not in str(versions.PATCH.problem("1.9.1"))


def test_a_newer_version_is_warned_of_once_in_a_process(monkeypatch: Any) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "1.91.0")
    with pytest.warns(UserWarning, match="fusedpo: TRL 1.91.0 is newer than .* 1.9.2 to 1.16.x"):
        assert versions.TRAINER.require() == "1.91.0"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.TRAINER.require()
        versions.PATCH.require()


def test_an_older_version_is_refused_when_the_trainer_is_imported(monkeypatch: Any) -> None:
    monkeypatch.setattr(versions, "installed", lambda: "1.9.1")
    with pytest.raises(UnsupportedTRLError, match=r"TRL 1\.9\.1 is older"):
        fusedpo.trl.FusedDPOTrainer  # noqa: B018  the access imports it


def test_installed_version_is_read_from_the_metadata(monkeypatch: Any) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"trl": "1.16.0"}[name])
    assert versions.installed() == "1.16.0"
    assert versions.TRAINER.require() == "1.16.0"


def test_missing_trl_is_an_import_error_with_the_remedy(monkeypatch: Any) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert versions.installed() is None
    with pytest.raises(ImportError, match="pip install"):
        versions.TRAINER.require()


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
        "from fusedpo.trl.versions import TRAINER\n"
        "from fusedpo.trl import patch_trl, status\n"
        "assert TRAINER.problem('1.16.0') is None\n"
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


# ---- what is bound to ---------------------------------------------------------------------------


def bindings() -> Any:
    pytest.importorskip("trl", reason="fusedpo.trl needs TRL")
    from fusedpo.trl import bindings

    return bindings


def test_the_installed_trl_has_what_fusedpo_binds_to() -> None:
    bindings().check_bindings("of this environment")


def changed_parameters(monkeypatch: Any, trl_dpo: Any, trl_utils: Any) -> str:
    monkeypatch.setattr(trl_dpo.DPOTrainer, "_compute_loss", lambda self, model, batch: None)
    monkeypatch.setattr(trl_utils, "use_adapter", lambda model, name, merge: None)
    return (
        r"DPOTrainer\._compute_loss must take \(self, model, inputs, return_outputs\), and takes "
        r"\(self, model, batch\); .*use_adapter must take"
    )


def missing_function(monkeypatch: Any, trl_dpo: Any, trl_utils: Any) -> str:
    monkeypatch.delattr(trl_utils, "hash_module")
    monkeypatch.delattr(trl_dpo.DPOTrainer, "compute_ref_log_probs")
    return r"compute_ref_log_probs is missing; trl\.trainer\.utils\.hash_module is missing"


def another_way_to_load(monkeypatch: Any, trl_dpo: Any, trl_utils: Any) -> str:
    # A signature as before, and a body that no longer looks up what construction replaces.
    parameters = ", ".join(inspect.signature(trl_dpo.DPOTrainer.__init__).parameters)
    made: dict[str, Any] = {}
    exec(f"def __init__({parameters}): load(model)", made)
    monkeypatch.setattr(trl_dpo.DPOTrainer, "__init__", made["__init__"])
    return r"DPOTrainer\.__init__ must call create_model_from_path, and does not"


@pytest.mark.parametrize("change", [changed_parameters, missing_function, another_way_to_load])
def test_a_newer_trl_that_differs_is_refused_naming_what(change: Any, monkeypatch: Any) -> None:
    module = bindings()
    import trl.trainer.dpo_trainer as trl_dpo
    import trl.trainer.utils as trl_utils

    message = change(monkeypatch, trl_dpo, trl_utils)
    with pytest.raises(UnsupportedTRLError, match=f"TRL 9.9.*{message}"):
        module.check_bindings("9.9")


def test_attributes_that_construction_did_not_set_are_named() -> None:
    trainer = SimpleNamespace(beta=0.1)
    with pytest.raises(UnsupportedTRLError, match=r"no attribute _metrics; .* aux_loss_enabled"):
        bindings().check_attributes(trainer, "9.9")
