"""Pages made from result files: whoever writes one never runs anything again."""

from .page import report
from .study import study_report

__all__ = ["report", "study_report"]
