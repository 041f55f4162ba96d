"""What an audit comes to: which leaks were found, and whether its controls allow to say so."""

from ..private_sketch import HOPELESS
from ..records import Json
from .curves import RATES

FORMAT = "medistill audit 5"
POSITIVE = 0.9  # of the area that the positive control must be above, with its interval
COPIED = 0.99  # of copied images that the positive control's set must give away, at RATE
RATE = RATES[-1]
BROKEN = "the release breaks its promise"
DROWNED = (
    "no verdict: each attacked model has half of the images that were asked about and all the "
    "noise of a release, which drowns a class there, so finding nothing means nothing"
)


def verdict(record: Json) -> Json:
    """Say what was found, and whether the controls allow to say it.

    A leak is an attack whose area lies above one half, or what it finds at a small rate of false
    alarms above that rate, with an interval for all of these together; a failed copy check; or a
    release that breaks its promise. Its absence is said only of these attacks, and only where the
    positive control was found, by an attack on the student and in the set itself, and the negative
    one was not; nor where the noise of a private release drowns a class of the attacked models.
    `blind` names the attacks that did not find their own control: that these find nothing says
    nothing, whatever the others found.
    """
    reasons = [f"copies in {one['view']}" for one in record["copies"] if one["failed"]]
    if record.get("reconstruction", {}).get("failed"):
        reasons.append("images lead back to the real ones they started from")
    for one in record.get("attributes", []):
        if one["low"] > 0:
            reasons.append(f"{one['name']} is guessed better of members")
    if record.get("mechanism", {}).get("broken"):
        reasons.append(BROKEN)
    if "membership" not in record:
        told = {"leaks": bool(reasons), "reasons": reasons}
        return {**told, "blind": [], "membership": "not asked"}
    nothing = [curve for one in record["negative_control"].values() for curve in one.values()]
    one = record["one_run"]
    negative = not any(map(tells, nothing))
    negative &= not _refutes(one["controls"]["negative_control"]["lower"], one["claimed"])
    members = _members(record) if negative else []
    valid = "valid"
    if not negative:
        valid = "no verdict: the negative control was found"
    elif not _seen(record["positive_control"]) and not members:
        valid = (
            "no verdict: the positive control was not found, so finding nothing means nothing: "
            "longer students know copies better (--control-steps), and more models say more"
        )
    elif not members and (record["noise"] or 0.0) > HOPELESS:
        valid = DROWNED
    reasons += members
    return {
        "leaks": bool(reasons),
        "reasons": reasons,
        "blind": _blind(record),
        "membership": valid,
    }


def _members(record: Json) -> list[str]:
    """Return which attacks on membership found something, and what."""
    found = [
        f"{name} finds {side} ({by})"
        for name, sides in record["membership"].items()
        for side, curve in sides.items()
        if (by := tells(curve))
    ]
    one = record["one_run"]
    if _refutes(one["lower"], one["claimed"]):
        found.append(f"one run proves epsilon {one['lower']:.2f} of {one['claimed']:g}")
    return found


def _seen(control: Json) -> bool:
    """Say whether copies were found by an attack on the student, and in the set itself."""
    of_students = [curve for name in ("lira", "rmia") for curve in control[name].values()]
    copied = all(_sees("set", curve) for curve in control["set"].values())
    return copied and max(curve["auc_low"] for curve in of_students) > POSITIVE


def _blind(record: Json) -> list[str]:
    """Return the attacks that did not find their own positive control.

    One run can only refute a claim: of copies it must prove more than is claimed, or than 0.
    """
    blind = [
        f"{name} of {side}"
        for name, by in record["positive_control"].items()
        for side, curve in by.items()
        if not _sees(name, curve)
    ]
    one = record["one_run"]
    if not _refutes(one["controls"]["positive_control"]["lower"], one["claimed"] or 0.0):
        blind.append("one run of canaries")
    return blind


def _refutes(lower: float, claimed: float | None) -> bool:
    """Say whether a bound lies above the epsilon that was promised, if one was."""
    return claimed is not None and lower > claimed


def tells(curve: Json) -> str:
    """Return by what an attack tells members from others, beyond chance; empty where it does not.

    A few members that are given away wholly hardly move the area; rates that too few others
    measure are left out.
    """
    if curve["auc_low"] > 0.5:
        return f"AUC {curve['auc']:.2f}"
    for one in curve["found"]:
        if one["resolved"] and one["sure"] > one["rate"]:
            return f"{100 * one['tpr']:.1f}% at {100 * one['rate']:g}% false alarms"
    return ""


def _sees(name: str, curve: Json) -> bool:
    """Say whether an attack found its own positive control."""
    if name != "set":
        return bool(curve["auc_low"] > POSITIVE)
    return all(one["tpr"] >= COPIED for one in curve["found"] if one["rate"] == RATE)
