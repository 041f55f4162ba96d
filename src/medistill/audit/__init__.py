"""Audits: what an attack learns from a distilled set, one file each; passing proves nothing.

Every measurement stands beside controls: one that must be found, one with nothing to find.
"""

from .battery import audit_run
from .copies import Copies, copies
from .curves import Curve, curve_of, exact_interval
from .mechanism import MechanismAudit, audit_mechanism, worst_patient
from .membership import FEWEST
from .one_run import OneRun, lower_bound, one_run

__all__ = [
    "FEWEST",
    "Copies",
    "Curve",
    "MechanismAudit",
    "OneRun",
    "audit_mechanism",
    "audit_run",
    "copies",
    "curve_of",
    "exact_interval",
    "lower_bound",
    "one_run",
    "worst_patient",
]
