"""The loss family once more, on a GPU: derivatives, definitions in many digits, torch's checks."""

from __future__ import annotations

import pytest
import test_losses
import test_losses_exact
from cuda_cases import borrowed, need_device, on_device  # noqa: F401  a fixture

need_device()
pytestmark = pytest.mark.usefixtures("on_device")

globals().update(borrowed(test_losses))
globals().update(borrowed(test_losses_exact))
