"""FusedDPOTrainer against DPOTrainer on the same steps: loss, every gradient, every metric."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("trl", reason="fusedpo.trl needs TRL")

from shadow_cases import shadow
from trl_helpers import FAMILIES, one_thread  # noqa: F401  a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_as_under_trl(family: str, tmp_path: Any) -> None:
    shadow(tmp_path, family=family)
