"""The loss family once more, on a GPU: derivatives, definitions in many digits, torch's checks."""

from __future__ import annotations

import pytest
import test_losses
import test_losses_exact
from cuda_cases import borrowed, need_device, on_device  # noqa: F401  a fixture

need_device()
pytestmark = pytest.mark.usefixtures("on_device")

BUT = {
    "test_empty_completions_warn_once_and_count_as_zero": "a warning would wait for the device",
    "test_empty_completions_are_found_in_either_side": "only the CPU looks for them",
}
globals().update(borrowed(test_losses, BUT))
globals().update(borrowed(test_losses_exact))
