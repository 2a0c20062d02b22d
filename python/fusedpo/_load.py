"""Loads the operator libraries, once, after torch, and remembers why one is not there.

Importing this module never fails, prints, compiles (but for an editable install that is told to
rebuild) or touches CUDA. Without a library fusedpo.reference serves, after one warning.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import re
import sys
import warnings
from typing import Any

import torch

_OLDEST_TORCH = (2, 10)
_INSTALL_COMPILER = (
    "install a C++ compiler (Debian, Ubuntu: apt install g++) and install fusedpo again"
)
_BUILD_CUDA = "install the CUDA toolkit and install fusedpo again with FUSEDPO_CUDA=ON"
_REINSTALL = "install fusedpo again with FUSEDPO_NATIVE=require, which shows the build error"

BUILD: dict[str, Any] = {}  # what was built; {} when pure Python
_problems: dict[str, str] = {}  # device type -> reason and remedy; absent when loaded
_driver_checked = False
_warned: set[str] = set()


def native(device_type: str) -> bool:
    """Whether C++ operators are loaded for tensors on this device ("cpu", "cuda", ...)."""
    return why_not(device_type) is None


def why_not(device_type: str) -> str | None:
    """The reason and the remedy when `native(device_type)` is False, else None."""
    if device_type == "cpu":
        return _problems.get("cpu")
    if device_type == "cuda":
        if not torch.compiler.is_compiling() and not _driver_checked:
            _check_driver()
        return _problems.get("cuda")
    return f"fusedpo has no C++ operators for {device_type} tensors; move them to cpu to use them"


def broken() -> str | None:
    """The reason when something that was built does not load; None also when nothing was built."""
    return _problems.get("broken")


def warn_fallback(device_type: str, stacklevel: int = 3) -> None:
    """Warns, once per device type and process, that `fusedpo.reference` serves, and why."""
    if device_type in _warned or torch.compiler.is_compiling():
        return
    _warned.add(device_type)
    warnings.warn(
        f"fusedpo: the slower fusedpo.reference serves {device_type} tensors: "
        f"{why_not(device_type)}. `python -m fusedpo` tells more.",
        UserWarning,
        stacklevel=stacklevel,
    )


def _read_build_info(folder: pathlib.Path) -> dict[str, Any]:
    try:
        info = json.loads((folder / "_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return info if isinstance(info, dict) else {}


def _disabled() -> bool:
    return os.environ.get("FUSEDPO_DISABLE_NATIVE", "") not in ("", "0")


def torch_too_old() -> bool:
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    return found is not None and (int(found[1]), int(found[2])) < _OLDEST_TORCH


def _load_cpu() -> None:
    """Loads the CPU operators; on failure fills in `_problems`."""
    # An editable install spreads the package over two folders, which __path__ knows.
    folders = [pathlib.Path(folder) for folder in sys.modules["fusedpo"].__path__]
    pure = next(filter(None, map(_read_build_info, folders)), {})
    if pure.get("native") is False:
        _problems["cpu"] = (
            f"fusedpo was installed as pure Python ({pure['reason']}); {_INSTALL_COMPILER}"
        )
        return
    if _disabled():
        _problems["cpu"] = "FUSEDPO_DISABLE_NATIVE is set; unset it"
        return
    # First of the compiled files: importing it is what triggers the rebuild of an editable install,
    # and its directory is where the operator libraries are (not the source directory then).
    try:
        store = importlib.import_module("fusedpo._store")
    except ModuleNotFoundError as e:
        if e.name != "fusedpo._store":
            raise
        _problems["cpu"] = (
            "fusedpo's compiled files are not beside it, as in a source tree that was never "
            "installed, or one built for another Python; run `pip install .` in the project"
        )
        return
    folder = pathlib.Path(str(store.__file__)).parent
    BUILD.update(_read_build_info(folder))
    library = folder / "libfusedpo_ops_cpu.so"
    if not library.exists():
        raise FileNotFoundError(f"{library.name} is missing from the install")
    if torch_too_old():
        oldest = ".".join(map(str, _OLDEST_TORCH))
        raise RuntimeError(f"torch >= {oldest} is needed, {torch.__version__} is installed")
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]


def _load_cuda() -> None:
    """Loads the CUDA operators, without starting CUDA; where it cannot, fills in `_problems`."""
    if "cpu" in _problems:  # they share the schemas
        _problems["cuda"] = _problems["cpu"]
        return
    if not BUILD.get("cuda"):
        reason = BUILD.get("cuda_reason", "no build information")
        _problems["cuda"] = f"fusedpo was built without CUDA operators ({reason}); {_BUILD_CUDA}"
        return
    if torch.version.cuda is None:
        _problems["cuda"] = (
            f"torch {torch.__version__} was built without CUDA; install a CUDA build of torch "
            "(https://pytorch.org/get-started/locally)"
        )
        return
    store = sys.modules["fusedpo._store"]
    library = pathlib.Path(str(store.__file__)).parent / "libfusedpo_ops_cuda.so"
    if not library.exists():
        raise FileNotFoundError(f"{library.name} is missing from the install")
    torch.ops.load_library(library)  # type: ignore[no-untyped-call]


def cuda_versions() -> dict[str, int] | None:
    """CUDA_VERSION of the `runtime` linked in and of the newest one the `driver` serves (0 without
    a driver), as 1000 major + 10 minor; None where the CUDA operators are not loaded."""
    try:
        versions: dict[str, int] = json.loads(torch.ops.fusedpo.cuda_info())
    except (AttributeError, RuntimeError):  # no schema; no kernel
        return None
    return versions


def _check_driver() -> None:
    # Not at import: asking the driver opens its library.
    global _driver_checked
    _driver_checked = True
    versions = cuda_versions()
    if versions is None:
        return
    runtime, driver = versions["runtime"], versions["driver"]
    if driver // 1000 < runtime // 1000:  # one major version's drivers serve all its runtimes
        found = f"serves CUDA {cuda_text(driver)}" if driver else "was not found"
        _problems["cuda"] = (
            f"the NVIDIA driver {found}, and fusedpo's CUDA operators need a driver for CUDA "
            f"{runtime // 1000}: they were built with {cuda_text(runtime)}. Update the driver, or "
            f"install fusedpo again with a CUDA toolkit that the driver serves"
        )


def cuda_text(version: int) -> str:
    """ "13.0" for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _load() -> None:
    # Whatever goes wrong here must not take away the import: the reference still works.
    try:
        _load_cpu()
    except Exception as e:
        # load_library hides the reason of the dynamic loader in the cause.
        _problems["broken"] = f"{type(e).__name__}: {e.__cause__ or e}"
        _problems["cpu"] = f"the compiled files do not load ({_problems['broken']}); {_REINSTALL}"
    try:
        _load_cuda()
    except Exception as e:
        _problems["broken"] = f"{type(e).__name__}: {e.__cause__ or e}"
        _problems["cuda"] = f"the CUDA operators do not load ({_problems['broken']}); {_REINSTALL}"


_load()
