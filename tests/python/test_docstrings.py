"""Every example in a docstring runs and prints what it shows."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import fusedpo


def test_examples_in_docstrings_print_what_they_show() -> None:
    names = [m.name for m in pkgutil.walk_packages(fusedpo.__path__, "fusedpo.")]
    modules = [
        importlib.import_module(name)
        for name in ["fusedpo", *names]
        if not name.endswith(("__main__", "_store")) and ".libfusedpo_ops_" not in name
    ]
    results = [doctest.testmod(module, verbose=False) for module in modules]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 0
