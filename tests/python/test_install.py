"""Installing: which build is chosen (always tested), and real installs (marker `install`)."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile

import fusedpo
import pytest
from installs import PROJECT, Environment, Target, copy_project, without_compiler

install = pytest.mark.install


@pytest.fixture(scope="module")
def backend() -> types.ModuleType:
    pytest.importorskip("scikit_build_core", reason="needs scikit-build-core, the build tool")
    path = PROJECT / "build_backend" / "fusedpo_build.py"
    spec = importlib.util.spec_from_file_location("fusedpo_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def no_path(tmp_path: pathlib.Path) -> dict[str, str]:
    return {"PATH": str(tmp_path)}


def program(folder: pathlib.Path, name: str) -> pathlib.Path:
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


# ---- the decision -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_compiler_on_path_gives_a_native_build(
    backend: types.ModuleType, tmp_path: pathlib.Path, no_path: dict[str, str], name: str
) -> None:
    program(tmp_path, name)
    assert backend.choose_pure(no_path) is None


def test_no_compiler_gives_a_pure_build_with_the_reason(
    backend: types.ModuleType, no_path: dict[str, str]
) -> None:
    assert "no C++ compiler" in backend.choose_pure(no_path)


def test_compiler_named_by_cxx_is_found_with_its_arguments(
    backend: types.ModuleType, tmp_path: pathlib.Path, no_path: dict[str, str]
) -> None:
    path = program(tmp_path, "my-compiler")
    assert backend.choose_pure({**no_path, "CXX": "my-compiler -m64"}) is None
    assert backend.choose_pure({"PATH": "", "CXX": str(path)}) is None


def test_cxx_that_does_not_exist_is_the_reason(
    backend: types.ModuleType, no_path: dict[str, str]
) -> None:
    assert "CXX=/no/such/c++" in backend.choose_pure({**no_path, "CXX": "/no/such/c++"})


@pytest.mark.parametrize(
    ("env", "settings"),
    [
        ({"CMAKE_ARGS": "-DCMAKE_CXX_COMPILER=/opt/c++"}, None),
        ({"CMAKE_TOOLCHAIN_FILE": "cross.cmake"}, None),
        ({}, {"cmake.define.CMAKE_CXX_COMPILER": "/opt/c++"}),
        ({}, {"cmake.args": ["-DCMAKE_CXX_COMPILER=/opt/c++"]}),
        ({}, {"cmake.toolchain-file": "cross.cmake"}),
    ],
)
def test_compiler_named_to_cmake_is_left_to_cmake(
    backend: types.ModuleType,
    no_path: dict[str, str],
    env: dict[str, str],
    settings: dict[str, str] | None,
) -> None:
    assert backend.choose_pure({**no_path, **env}, settings) is None


def test_required_native_build_refuses_to_go_on_without_compiler(
    backend: types.ModuleType, no_path: dict[str, str]
) -> None:
    with pytest.raises(SystemExit, match="FUSEDPO_NATIVE=require"):
        backend.choose_pure({**no_path, "FUSEDPO_NATIVE": "require"})


@pytest.mark.parametrize("settings", [None, {"cmake.define.FUSEDPO_CUDA": "ON"}])
def test_cuda_refuses_to_go_on_without_compiler(
    backend: types.ModuleType, no_path: dict[str, str], settings: dict[str, str] | None
) -> None:
    env = no_path if settings else {**no_path, "FUSEDPO_CUDA": "on"}
    with pytest.raises(SystemExit, match="FUSEDPO_CUDA=ON"):
        backend.choose_pure(env, settings)


def test_unknown_value_of_the_native_switch_names_the_valid_ones(
    backend: types.ModuleType, no_path: dict[str, str]
) -> None:
    with pytest.raises(SystemExit, match="must be auto or require; got 'never'"):
        backend.choose_pure({**no_path, "FUSEDPO_NATIVE": "never"})


# ---- real installs ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return copy_project(tmp_path_factory.mktemp("install"))


@pytest.fixture(scope="module")
def wheel(project: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Built without isolation, with warnings as errors and, where there is an nvcc, for CUDA."""
    folder = tmp_path_factory.mktemp("wheel")
    result = Target(folder / "site").run(
        *("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(folder), "."),
        cwd=project,
        FUSEDPO_WERROR="ON",
        FUSEDPO_CUDA="AUTO",
        FUSEDPO_CUDA_ARCHS="90-real",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl"))


def has_nvcc() -> bool:
    return shutil.which("nvcc") is not None or "CUDACXX" in os.environ


def doctor(environment: Target) -> dict[str, object]:
    result = environment.run("-m", "fusedpo", "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report: dict[str, object] = json.loads(result.stdout)
    return report


def installed_in(environment: Target) -> bool:
    code = "import fusedpo, pathlib; print(pathlib.Path(fusedpo.__file__).parents[1])"
    return environment.run("-c", code).stdout.strip() == str(environment.site)


@install
def test_wheel_installs_and_loads(wheel: pathlib.Path, tmp_path: pathlib.Path) -> None:
    environment = Target(tmp_path / "site")
    result = environment.install(str(wheel), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert installed_in(environment)
    assert doctor(environment)["loaded"] == {"cpu": True, "cuda": False}


@install
def test_wheel_holds_the_package_and_nothing_else(wheel: pathlib.Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "fusedpo",
        f"fusedpo-{fusedpo.__version__}.dist-info",
    }
    for wanted in ("libfusedpo_ops_cpu.so", "_build_info.json", "py.typed", "trl/versions.py"):
        assert f"fusedpo/{wanted}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@install
def test_libraries_need_libtorch_cpu_and_the_system_only(
    wheel: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    system = {"libstdc++", "libgcc_s", "libc", "libm", "libpthread", "ld-linux-x86-64"}
    for pattern, allowed in (
        ("libfusedpo_ops_cpu.so", system | {"libtorch_cpu"}),
        # No CUDA runtime: it is linked in, and a versioned library would tie the wheel to one.
        ("libfusedpo_ops_cuda.so", system | {"libtorch_cpu", "libtorch_cuda", "librt", "libdl"}),
        ("_store*.so", system),
    ):
        library = next((tmp_path / "fusedpo").glob(pattern), None)
        if library is None and "cuda" in pattern and not has_nvcc():
            print("there is no nvcc here, so no CUDA library is checked")
            continue
        assert library is not None, pattern
        dynamic = subprocess.run(
            ["readelf", "-d", str(library)], capture_output=True, text=True, check=True
        ).stdout
        needed = {name.split(".so")[0] for name in re.findall(r"NEEDED.*\[(.+?)\]", dynamic)}
        assert needed
        assert needed <= allowed
        assert not re.search(r"R(UN)?PATH", dynamic)


@install
@pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")
def test_what_was_compiled_for_cuda_is_recorded(wheel: pathlib.Path) -> None:
    info = json.loads(zipfile.ZipFile(wheel).read("fusedpo/_build_info.json"))
    assert info["cuda"] is True
    assert info["cuda_archs"] == ["90-real"]
    assert info["nvcc"] in info["cuda_reason"]


@install
def test_libraries_hold_no_path_of_the_machine_they_were_built_on(
    wheel: pathlib.Path, project: pathlib.Path
) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            assert str(project).encode() not in archive.read(name), name


@install
def test_sdist_installs_with_build_isolation(project: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code = "import fusedpo_build, sys; print(fusedpo_build.build_sdist(sys.argv[1]))"
    environment = Target(tmp_path / "site")
    built = environment.run(
        *("-c", code, str(tmp_path)), cwd=project, PYTHONPATH=str(project / "build_backend")
    )
    assert built.returncode == 0, built.stderr
    sdist = next(tmp_path.glob("fusedpo-*.tar.gz"))
    with tarfile.open(sdist) as archive:
        files = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {
        "CMakeLists.txt",
        "LICENSE",
        "csrc/store/crc32c.cpp",
        "python/fusedpo/_load.py",
    } <= files
    assert not any(name.startswith(("build/", ".venv", ".git/")) for name in files)
    result = environment.install(str(sdist), cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert installed_in(environment)
    assert doctor(environment)["loaded"] == {"cpu": True, "cuda": False}


@install
def test_project_installs_with_build_isolation(
    project: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    environment = Target(tmp_path / "site")
    result = environment.install(".", cwd=project)
    assert result.returncode == 0, result.stdout + result.stderr
    assert installed_in(environment)
    assert doctor(environment)["loaded"] == {"cpu": True, "cuda": False}


@install
def test_editable_install_rebuilds_when_a_source_changes(tmp_path: pathlib.Path) -> None:
    project = copy_project(tmp_path)
    environment = Environment(tmp_path / "venv")
    result = environment.install(
        *("--no-build-isolation", "-Ceditable.rebuild=true", "-e", "."), cwd=project
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert doctor(environment)["loaded"] == {"cpu": True, "cuda": False}

    source = project / "csrc" / "store" / "crc32c.cpp"
    source.write_text(source.read_text().replace("return ~crc;", "return ~crc + 1;"))
    ask = "from fusedpo import _store; print(hex(_store.crc32c(b'123456789')))"
    result = environment.run("-c", ask)
    assert (result.stdout, result.stderr) == ("0xe306928" + "4\n", "")

    python = project / "python" / "fusedpo" / "__init__.py"
    python.write_text(python.read_text() + "\nCHANGED = True\n")
    assert environment.run("-c", "import fusedpo; print(fusedpo.CHANGED)").stdout == "True\n"


@install
@pytest.mark.parametrize("isolation", [True, False])
def test_no_compiler_gives_a_working_pure_python_install(
    project: pathlib.Path, tmp_path: pathlib.Path, isolation: bool
) -> None:
    environment = Target(tmp_path / "site")
    flags = [] if isolation else ["--no-build-isolation"]
    hidden = without_compiler(tmp_path / "bin")
    result = environment.install("-v", *flags, ".", cwd=project, **hidden)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "WITHOUT the C++ operators" in result.stdout + result.stderr
    assert "fusedpo-0.1.0-py3-none-any.whl" in result.stdout
    assert installed_in(environment)

    report = doctor(environment)
    assert report["loaded"] == {"cpu": False, "cuda": False}
    assert report["built"] is None
    assert "no C++ compiler" in str(report["remedies"])
    assert "apt install g++" in str(report["remedies"])
    code = (
        "import torch, fusedpo, warnings\n"
        "warnings.simplefilter('always')\n"
        "for _ in range(2):\n"
        "    out = fusedpo.token_logps(torch.zeros(2, 4), torch.tensor([0, 3])).logps\n"
        "print(torch.allclose(out, torch.tensor(0.25).log()))"
    )
    result = environment.run("-c", code)
    assert result.stdout == "True\n"
    assert result.stderr.count("no C++ compiler") == 1


def failing_install(
    tmp_path: pathlib.Path, project: pathlib.Path, *arguments: str, **env: str
) -> str:
    """What pip says when the install fails; asserts that it does and that nothing is installed."""
    environment = Target(tmp_path / "site")
    result = environment.install("--no-build-isolation", *arguments, ".", cwd=project, **env)
    assert result.returncode != 0, result.stdout
    assert not (environment.site / "fusedpo").exists()
    return " ".join((result.stdout + result.stderr).split())


@install
def test_compile_error_is_an_error_and_not_a_fallback(tmp_path: pathlib.Path) -> None:
    project = copy_project(tmp_path)
    with (project / "csrc" / "store" / "crc32c.cpp").open("a") as source:
        source.write("#error this file is broken\n")
    assert "this file is broken" in failing_install(tmp_path, project)


@install
def test_compiler_that_does_not_work_is_an_error(tmp_path: pathlib.Path) -> None:
    text = failing_install(tmp_path, copy_project(tmp_path), CXX="/bin/false")
    assert "is not able to compile a simple test program" in text


@install
def test_cuda_without_nvcc_is_an_error_with_the_remedy(tmp_path: pathlib.Path) -> None:
    project = copy_project(tmp_path)
    text = failing_install(tmp_path, project, FUSEDPO_CUDA="ON", CUDACXX="/no/such/nvcc")
    assert "FUSEDPO_CUDA=ON needs a working nvcc" in text
    assert "Install the CUDA toolkit" in text


@install
@pytest.mark.parametrize("route", ["environment", "definition"])
def test_unknown_cuda_choice_names_the_valid_ones(tmp_path: pathlib.Path, route: str) -> None:
    arguments = ["-Ccmake.define.FUSEDPO_CUDA=maybe"] if route == "definition" else []
    env = {"FUSEDPO_CUDA": "maybe"} if route == "environment" else {}
    text = failing_install(tmp_path, copy_project(tmp_path), *arguments, **env)
    assert 'FUSEDPO_CUDA must be AUTO, ON or OFF; got "maybe"' in text


@install
def test_unknown_cuda_architecture_is_an_error(tmp_path: pathlib.Path) -> None:
    text = failing_install(tmp_path, copy_project(tmp_path), FUSEDPO_CUDA_ARCHS="80;hopper")
    assert 'got "hopper"' in text


@install
def test_required_native_build_without_compiler_is_an_error(tmp_path: pathlib.Path) -> None:
    hidden = without_compiler(tmp_path / "bin")
    text = failing_install(tmp_path, copy_project(tmp_path), FUSEDPO_NATIVE="require", **hidden)
    assert "FUSEDPO_NATIVE=require forbids" in text


@install
def test_no_torch_is_an_error_with_the_remedy(tmp_path: pathlib.Path) -> None:
    project = copy_project(tmp_path)
    environment = Environment(tmp_path / "venv", torch=False)
    result = environment.install(".", cwd=project)
    text = " ".join((result.stdout + result.stderr).split())
    assert result.returncode != 0
    assert "torch was not found beside" in text
    assert "pip install torch" in text


@install
def test_cuda_off_is_recorded(tmp_path: pathlib.Path) -> None:
    project = copy_project(tmp_path)
    folder = tmp_path / "cmake"
    subprocess.run(
        [
            *("cmake", "-S", str(project), "-B", str(folder), "-DFUSEDPO_CUDA=off"),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_dir()}",
        ],
        check=True,
        capture_output=True,
    )
    info = json.loads((folder / "_build_info.json").read_text())
    assert info["cuda"] is False
    assert "FUSEDPO_CUDA=OFF" in info["cuda_reason"]


def pybind11_dir() -> str:
    import pybind11

    return str(pybind11.get_cmake_dir())
