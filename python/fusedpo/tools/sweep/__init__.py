"""`fusedpo sweep`: trainings over beta and loss on one reference store. See docs/tools/sweep.md."""

from fusedpo.tools.sweep.report import SweepReport, SweepRun
from fusedpo.tools.sweep.run import sweep

__all__ = ["SweepReport", "SweepRun", "sweep"]
