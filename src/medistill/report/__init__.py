"""Pages made from result files: whoever writes one never runs anything again."""

from .officer import officer_report
from .page import report
from .paper import study_paper
from .parcel import Parcel, package_report
from .prints import study_prints
from .study import study_report

__all__ = [
    "Parcel",
    "officer_report",
    "package_report",
    "report",
    "study_paper",
    "study_prints",
    "study_report",
]
