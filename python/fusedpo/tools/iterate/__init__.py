"""Iterative preference optimisation: rounds of sampling, judging and training."""

from fusedpo.tools.iterate.report import IterateReport, Round
from fusedpo.tools.iterate.run import iterate

__all__ = ["IterateReport", "Round", "iterate"]
