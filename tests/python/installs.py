"""Throw-away copies of the package and of the project, and environments to install into."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

import fusedpo
import pytest

PACKAGE = pathlib.Path(fusedpo.__file__).parent
PROJECT = pathlib.Path(__file__).resolve().parents[2]
needs_native = pytest.mark.skipif(
    not fusedpo._load.native("cpu"), reason=f"no C++ operators: {fusedpo._load.why_not('cpu')}"
)


def copy_package(folder: pathlib.Path) -> pathlib.Path:
    """A copy of the installed package with its compiled files, which a test may damage."""
    copy = folder / "fusedpo"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    built = pathlib.Path(str(sys.modules["fusedpo._store"].__file__)).parent
    if built != PACKAGE:  # an editable install keeps them elsewhere
        for name in ("_store*", "lib*", "_build_info.json"):
            for path in built.glob(name):
                shutil.copy(path, copy)
    return copy


def copy_project(folder: pathlib.Path) -> pathlib.Path:
    """The project without anything that was built."""
    copy = folder / "project"
    names = ("build", "dist", "__pycache__", ".git", ".venv*", ".*_cache", "results")
    shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(*names))
    shutil.copytree(PROJECT / "build_backend", copy / "build_backend", dirs_exist_ok=True)
    return copy


class Target:
    """A folder that the running Python installs into; its own packages stay as they are."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.python = pathlib.Path(sys.executable)
        self.site = folder

    def run(
        self, *arguments: str, cwd: pathlib.Path | None = None, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs Python with what was installed; the caller's FUSEDPO_ variables do not count, and
        no build compiles CUDA sources unless it asks for them."""
        environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDPO_")}
        return subprocess.run(
            [str(self.python), *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or self.site.parent,
            env={**environment, "FUSEDPO_CUDA": "OFF", "PYTHONPATH": str(self.site), **env},
            timeout=600,
        )

    def install(
        self, *arguments: str, cwd: pathlib.Path, **env: str
    ) -> subprocess.CompletedProcess[str]:
        command = ("-m", "pip", "install", "--no-deps", "--target", str(self.site))
        return self.run(*command, *arguments, cwd=cwd, PYTHONPATH="", **env)


class Environment(Target):
    """A virtual environment; with `torch`, the packages of the running Python are visible in it."""

    def __init__(self, folder: pathlib.Path, *, torch: bool = True) -> None:
        venv.create(folder, with_pip=not torch, symlinks=True)
        self.python = folder / "bin" / "python"
        scheme = {"base": str(folder), "platbase": str(folder)}
        self.site = pathlib.Path(sysconfig.get_path("purelib", "venv", scheme))
        if torch:  # pip and the build tools, too
            folders = [path for path in sys.path if path.endswith("site-packages")]
            (self.site / "parent.pth").write_text("\n".join(folders) + "\n")

    def install(
        self, *arguments: str, cwd: pathlib.Path, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pip", "install", "--no-deps", *arguments, cwd=cwd, **env)


def without_compiler(folder: pathlib.Path) -> dict[str, str]:
    """Environment variables under which no C++ compiler can be found."""
    folder.mkdir()
    for name in ("sh", "uname", "env"):
        program = shutil.which(name)
        if program is not None:
            (folder / name).symlink_to(program)
    return {"PATH": str(folder), "CXX": "", "CMAKE_ARGS": ""}
