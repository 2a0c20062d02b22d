"""Build backend: scikit-build-core, plus the decision what to do without a C++ compiler.

Only a *missing* C++ compiler falls back to a pure-Python wheel. A compile error, a missing torch
or a missing CUDA toolkit stays an error: a fallback there would hide a broken build. The
`if.failed` override of scikit-build-core cannot tell these apart, so it is decided here, up front.

    FUSEDPO_NATIVE=auto      (default) as above
    FUSEDPO_NATIVE=require   a missing compiler is an error, too
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from scikit_build_core import build as _skbuild
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_COMPILERS = ("c++", "g++", "clang++")  # the names CMake tries that can compile this project
_TOLD_TO_CMAKE = re.compile(r"CMAKE_CXX_COMPILER(?!_)|toolchain[-_]file", re.IGNORECASE)
# Both are read by the override in pyproject.toml; hooks run in the project's root.
_PURE_SWITCH = "FUSEDPO_PURE_PYTHON"
_PURE_INFO = pathlib.Path("build/pure-python/_build_info.json")

Settings = Mapping[str, Any] | None


def missing_compiler(env: Mapping[str, str], settings: Settings = None) -> str | None:
    """Why no C++ compiler can be used, or None when there is one (or when CMake was told which)."""
    told = f"{dict(settings or {})} {env.get('CMAKE_ARGS', '')}"
    if env.get("CMAKE_TOOLCHAIN_FILE") or _TOLD_TO_CMAKE.search(told):
        return None
    path = env.get("PATH", os.defpath)
    if env.get("CXX"):
        program = shlex.split(env["CXX"])[0]  # "ccache g++" names ccache, which CMake also accepts
        return None if shutil.which(program, path=path) else f"CXX={env['CXX']} was not found"
    if any(shutil.which(name, path=path) for name in _COMPILERS):
        return None
    return f"no C++ compiler ({', '.join(_COMPILERS)}) was found on PATH, and CXX is not set"


def choose_pure(env: Mapping[str, str], settings: Settings = None) -> str | None:
    """The reason for a pure-Python wheel, or None for a native one. Raises what forbids both."""
    native = env.get("FUSEDPO_NATIVE", "auto") or "auto"
    if native not in ("auto", "require"):
        raise SystemExit(f"fusedpo: FUSEDPO_NATIVE must be auto or require; got {native!r}")
    reason = missing_compiler(env, settings)
    if reason is None:
        return None
    remedy = "Install one (Debian, Ubuntu: apt install g++) or set CXX to yours, and install again"
    if native == "require":
        raise SystemExit(f"fusedpo: {reason}; FUSEDPO_NATIVE=require forbids to go on. {remedy}.")
    defined = [v for k, v in (settings or {}).items() if k.endswith("cmake.define.FUSEDPO_CUDA")]
    cuda = defined[0] if defined else env.get("FUSEDPO_CUDA", "")
    if str(cuda).upper() == "ON":
        raise SystemExit(f"fusedpo: {reason}, and FUSEDPO_CUDA=ON needs one. {remedy}.")
    return reason


def _prepare(settings: Settings) -> str | None:
    """Switches scikit-build-core to a pure-Python build where one is due; returns the reason."""
    os.environ.pop(_PURE_SWITCH, None)
    reason = choose_pure(os.environ, settings)
    if reason is not None:
        os.environ[_PURE_SWITCH] = reason
        # Becomes fusedpo/_build_info.json of the wheel. A $ would start a placeholder there.
        info = {"version": "VERSION", "native": False, "reason": reason, "cuda": False}
        text = json.dumps(info, indent=2).replace("$", "$$").replace("VERSION", "${version}")
        _PURE_INFO.parent.mkdir(parents=True, exist_ok=True)
        _PURE_INFO.write_text(text + "\n", encoding="ascii")
    return reason


def _announce(reason: str | None) -> None:
    if reason is not None:
        print(
            f"\n*** fusedpo: {reason}.\n*** Built WITHOUT the C++ operators: fusedpo works through "
            "plain torch, slower and with more memory.\n*** To get them, install a C++ compiler "
            "(Debian, Ubuntu: apt install g++) and install fusedpo again.\n",
            file=sys.stderr,
            flush=True,
        )


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    _prepare(config_settings)
    return _skbuild.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    _prepare(config_settings)
    return _skbuild.get_requires_for_build_editable(config_settings)


def prepare_metadata_for_build_wheel(directory: str, config_settings: Settings = None) -> str:
    _prepare(config_settings)
    return _skbuild.prepare_metadata_for_build_wheel(directory, config_settings)


def prepare_metadata_for_build_editable(directory: str, config_settings: Settings = None) -> str:
    _prepare(config_settings)
    return _skbuild.prepare_metadata_for_build_editable(directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    reason = _prepare(config_settings)
    name = _skbuild.build_wheel(wheel_directory, config_settings, metadata_directory)
    _announce(reason)
    return name


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    reason = _prepare(config_settings)
    name = _skbuild.build_editable(wheel_directory, config_settings, metadata_directory)
    _announce(reason)
    return name
