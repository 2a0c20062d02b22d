"""Fixtures and skips shared by all tests. Torch's thread count is left as the machine has it."""

from __future__ import annotations

import os
import pathlib
import random

import cuda_host_ops
import fusedpo
import numpy as np
import pytest
import torch

cuda_host_ops.load()


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  what TRL and transformers draw from
    torch.manual_seed(0)


def _why_skip(item: pytest.Item) -> str | None:
    if item.get_closest_marker("real_data") and not os.environ.get("FUSEDPO_REAL_DATA"):
        return "real data: set FUSEDPO_REAL_DATA to the folder with models/ and preferences/"
    if item.get_closest_marker("install") and os.environ.get("FUSEDPO_INSTALL_TESTS") != "1":
        return "installs into fresh environments, minutes: set FUSEDPO_INSTALL_TESTS=1"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        reason = _why_skip(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Before transformers 5 a trainer leaves its precision and torch.compile to all that follow in
    its process, by the environment. Forgotten here, before the fixtures of a test and its module.
    """
    for name in [each for each in os.environ if each.startswith("ACCELERATE_")]:
        del os.environ[name]


def pytest_report_header() -> list[str]:
    why = fusedpo._load.why_not("cpu")
    return [
        f"fusedpo {fusedpo.__version__} from {pathlib.Path(fusedpo.__file__).parent}",
        f"C++ operators: {'loaded' if why is None else 'not loaded: ' + why}",
        *([f"CUDA operators emulated by {cuda_host_ops.LIBRARY}"] if cuda_host_ops.LIBRARY else []),
    ]


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder named by FUSEDPO_REAL_DATA; tests that use it carry the marker `real_data`."""
    folder = pathlib.Path(os.environ["FUSEDPO_REAL_DATA"]).resolve()
    assert folder.is_dir(), f"FUSEDPO_REAL_DATA must name a folder; got {folder}"
    return folder
