"""Every condition of the paper, trained on scenes of emoji and measured on held-out ones."""

from mezzotint.studies.conditions.report import write_report
from mezzotint.studies.conditions.results import ConditionResult, MeasuredGap
from mezzotint.studies.conditions.runs import CONDITIONS, run_conditions_study

__all__ = [
    "CONDITIONS",
    "ConditionResult",
    "MeasuredGap",
    "run_conditions_study",
    "write_report",
]
