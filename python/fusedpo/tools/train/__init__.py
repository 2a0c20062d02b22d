"""`fusedpo train`: a training from one file, on TRL underneath. See docs/tools/train.md."""

from fusedpo.tools.train.plan import Plan, plan_stages
from fusedpo.tools.train.report import TrainReport
from fusedpo.tools.train.resolving import Resolved, resolve
from fusedpo.tools.train.run import train, train_stages

__all__ = ["Plan", "Resolved", "TrainReport", "plan_stages", "resolve", "train", "train_stages"]
