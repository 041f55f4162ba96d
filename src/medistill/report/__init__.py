"""Pages made from result files: whoever writes one never runs anything again."""

from .officer import officer_report
from .page import report
from .paper import study_paper
from .prints import study_prints
from .study import study_report

__all__ = ["officer_report", "report", "study_paper", "study_prints", "study_report"]
