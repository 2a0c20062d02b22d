"""The error bounds of test_accuracy.py (docs/design.md, section 5, rule 2) once more, on a GPU.

Exact values are those of float64 there, of long double on the host for float64 inputs; "plain
torch" runs on the GPU, too.
"""

from __future__ import annotations

import pytest
import test_accuracy
from cuda_cases import borrowed, need_device, on_device  # noqa: F401  a fixture

need_device()
pytestmark = pytest.mark.usefixtures("on_device")

globals().update(borrowed(test_accuracy))
