"""Make preference pairs from prompts: sample, judge in both orders, keep what is decided."""

from fusedpo.tools.pairs.report import PairsReport
from fusedpo.tools.pairs.run import make_pairs

__all__ = ["PairsReport", "make_pairs"]
