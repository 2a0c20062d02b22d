"""Importing fusedpo never fails, prints, warns, compiles or touches CUDA; a fallback warns once.

Every test runs a fresh interpreter: what an import does can be seen only once per process.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import fusedpo
import pytest
from installs import copy_package, needs_native


def run(
    code: str, folder: pathlib.Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python code; `folder` comes first on its import path."""
    environment = {**os.environ, **env}
    environment.pop("PYTHONWARNINGS", None)
    if folder is not None:
        environment["PYTHONPATH"] = str(folder)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=300
    )


SCORE = """
import warnings, torch, fusedpo
logits, labels = torch.zeros(2, 5), torch.tensor([1, 2])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        value = fusedpo.token_logps(logits, labels).logps
        other = fusedpo.linear_token_logps(torch.zeros(2, 3), torch.zeros(5, 3), labels).logps
texts = [str(w.message) for w in caught if "fusedpo" in str(w.message)]
right = bool((value + torch.tensor(5.0).log()).abs().max() < 1e-6 and torch.equal(value, other))
import json; print(json.dumps([texts, right, fusedpo._load.native("cpu")]))
"""


def score(folder: pathlib.Path | None = None, **env: str) -> tuple[list[str], bool, bool]:
    """(our warnings over six calls, results right, native) in a fresh process."""
    result = run(SCORE, folder, **env)
    assert result.returncode == 0, result.stderr
    texts, right, native = json.loads(result.stdout)
    return texts, right, native


def test_import_prints_and_warns_nothing() -> None:
    result = run("import warnings; warnings.simplefilter('error'); import torch; import fusedpo")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_import_without_native_code_prints_and_warns_nothing() -> None:
    result = run("import fusedpo", FUSEDPO_DISABLE_NATIVE="1")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_import_needs_torch_and_numpy_only() -> None:
    result = run(
        "import sys, fusedpo\n"
        "print([m for m in ('trl', 'transformers', 'accelerate', 'peft', 'datasets', 'matplotlib')"
        " if m in sys.modules])"
    )
    assert result.stdout == "[]\n", result.stderr


def test_import_starts_no_process_and_does_not_touch_cuda() -> None:
    result = run(
        "import torch, sys\n"
        "started = []\n"
        "sys.addaudithook(lambda event, args: started.append((event, args[:1])) if event in"
        " ('subprocess.Popen', 'os.system', 'os.posix_spawn', 'os.fork') else None)\n"
        "import fusedpo\n"
        "print(started, torch.cuda.is_initialized())"
    )
    assert result.stdout == "[] False\n", result.stderr


@needs_native
def test_native_operators_serve_without_any_warning() -> None:
    assert score() == ([], True, True)


def test_disabled_native_code_warns_once_with_reason_and_remedy() -> None:
    texts, right, native = score(FUSEDPO_DISABLE_NATIVE="1")
    assert right
    assert not native
    assert len(texts) == 1
    assert "fusedpo.reference" in texts[0]
    if fusedpo._load.BUILD:
        assert "FUSEDPO_DISABLE_NATIVE is set; unset it" in texts[0]


@pytest.mark.parametrize("value", ["", "0"])
def test_disable_variable_that_is_empty_or_zero_disables_nothing(value: str) -> None:
    result = run(
        "import fusedpo; print(fusedpo._load.why_not('cpu'))", FUSEDPO_DISABLE_NATIVE=value
    )
    assert "FUSEDPO_DISABLE_NATIVE" not in result.stdout, result.stderr


@needs_native
def test_unloadable_library_falls_back_with_one_warning(tmp_path: pathlib.Path) -> None:
    library = copy_package(tmp_path) / "libfusedpo_ops_cpu.so"
    library.write_bytes(b"this is no library")
    texts, right, native = score(tmp_path)
    assert right
    assert not native
    assert len(texts) == 1
    assert "libfusedpo_ops_cpu.so" in texts[0]
    assert "install fusedpo again" in texts[0]


@needs_native
def test_missing_library_falls_back_with_one_warning(tmp_path: pathlib.Path) -> None:
    (copy_package(tmp_path) / "libfusedpo_ops_cpu.so").unlink()
    texts, right, native = score(tmp_path)
    assert right
    assert not native
    assert len(texts) == 1
    assert "libfusedpo_ops_cpu.so is missing" in texts[0]


@needs_native
def test_unloadable_store_module_falls_back_with_one_warning(tmp_path: pathlib.Path) -> None:
    for module in copy_package(tmp_path).glob("_store*.so"):
        module.write_bytes(b"this is no library")
    texts, right, native = score(tmp_path)
    assert right
    assert not native
    assert len(texts) == 1
    assert "_store" in texts[0]


@needs_native
def test_source_tree_without_compiled_files_says_to_install(tmp_path: pathlib.Path) -> None:
    copy = copy_package(tmp_path)
    for path in [*copy.glob("_store*.so"), *copy.glob("lib*.so"), copy / "_build_info.json"]:
        path.unlink()
    texts, right, native = score(tmp_path)
    assert right
    assert not native
    assert len(texts) == 1
    assert "pip install ." in texts[0]


@needs_native
def test_torch_older_than_promised_is_refused_with_the_remedy(tmp_path: pathlib.Path) -> None:
    copy_package(tmp_path)
    result = run(
        "import torch\n"
        "torch.__version__ = '2.9.1+cpu'\n"
        "import fusedpo\n"
        "print(fusedpo._load.why_not('cpu'))",
        tmp_path,
    )
    assert "torch >= 2.10" in result.stdout, result.stderr
    assert "2.9.1" in result.stdout


@pytest.mark.skipif(
    os.environ.get("FUSEDPO_NATIVE") != "require", reason="FUSEDPO_NATIVE=require is not set"
)
def test_native_operators_are_loaded_where_they_are_required() -> None:
    assert fusedpo._load.why_not("cpu") is None


def test_unknown_devices_have_a_reason() -> None:
    for kind in ("mps", "xpu"):
        assert not fusedpo._load.native(kind)
        assert fusedpo._load.why_not(kind)
