"""What a network should predict, at which times and weights: one recipe, trained each way."""

from mezzotint.studies.objectives.report import write_report
from mezzotint.studies.objectives.results import ObjectiveResult, Point
from mezzotint.studies.objectives.runs import OBJECTIVES, run_objectives_study

__all__ = [
    "OBJECTIVES",
    "ObjectiveResult",
    "Point",
    "run_objectives_study",
    "write_report",
]
