"""Pages made from result files: whoever writes one never runs anything again."""

from .officer import officer_report
from .page import report
from .paper import study_paper
from .parcel import Parcel, package_report
from .prints import study_prints
from .study import study_report
from .study_opened import opened

__all__ = [
    "Parcel",
    "officer_report",
    "opened",
    "package_report",
    "report",
    "study_paper",
    "study_prints",
    "study_report",
]
