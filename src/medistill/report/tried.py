"""What an audit tried, for a data protection officer: each attack with its power and controls."""

from typing import Any

from ..formats import rate_text
from ..records import Json
from .blocks import Section, Table

RATE, RARE = 0.01, 0.001
VIEWS = {"features": "features of a random network"}


def tried(audit: Json, *, outside: bool) -> Section:
    """Return what was tried; for outside without what tells the sizes of classes and groups."""
    rows: list[tuple[str, ...]] = []
    for one in audit["copies"]:
        said = "FAILED" if one["failed"] else "no copy found, which proves nothing"
        what = f"{one['exact']} of {one['images']} equal a training image; {one['suspects']} come "
        what += f"nearer to one than {100 - 100 * one['share']:g}% of held-out images do"
        rows.append((f"copies ({VIEWS.get(one['view'], one['view'])})", what, said))
    if "reconstruction" in audit:
        one = audit["reconstruction"]
        what = (
            f"{one['recovered']} of {one['images']} lead back to the real image they started from"
        )
        by_chance = "" if outside else f"by chance {100 * one['chance']:.1f}%"
        rows.append(("reconstruction", what, by_chance))
    for one in audit["attributes"]:
        what = f"{one['name']}: guessed of {100 * one['guessed']:.1f}% of members, of others "
        what += f"{100 * one['others']:.1f}%"
        gain = f"advantage {100 * one['low']:.1f} to {100 * one['high']:.1f} points"
        if outside:
            gain = "better than by chance" if one["low"] > 0 else "no better than by chance"
        rows.append(("attribute inference", what, gain))
    if "mechanism" in audit:
        held = audit["mechanism"]
        what = f"{held['runs']:,} releases with and without the worst patient"
        said = f"epsilon is at least {held['lower']:.2f} of {held['claimed']:g} claimed (whatever "
        said += f"the mechanism, {held['free']:.2f})"
        rows.append(("the release", what, said + (": BROKEN" if held["broken"] else "")))
    if "membership" in audit:
        for title, key in (
            ("membership", "membership"),
            ("positive control: copies, must be found", "positive_control"),
            ("negative control: nothing to find", "negative_control"),
        ):
            rows += _attack_rows(title, audit[key], outside)
        rows += _one_run_rows(audit["one_run"], outside)
    text = (
        "The attacker is assumed to know the method, its settings and the training recipe, and to "
        "be able to distill from other patients' images. Canaries are images with a wrong label, "
        "the worst case. LiRA and RMIA ask a student of the set; the attack on the set looks at "
        f"how near its images come.{_asked(audit)}{_as_one(audit)} Shares are found members at one "
        "false alarm in a hundred strangers, then in a thousand; intervals are 95%, those of areas "
        "95% for all areas and shares together; so is the end of a share by which leaks are judged."
    )
    served: list[tuple[str, ...]] = [
        (one["name"], "" if outside else f"{one['images']:,}", f"{100 * one['accuracy']:.1f}")
        for one in audit["subgroups"]
    ]
    told = "Accuracy of one student of the set on validation images, group by group:"
    left = [f"Not tried: {_reason(one, outside)}." for one in audit["left_out"]]
    found, groups = Table(("attack", "what", "found"), rows), ("group", "images", "percent")
    return Section("What was tried", [text, found, *left, told, Table(groups, served)])


def _reason(left_out: str, outside: bool) -> str:
    """Return what was left out, and inside why, which may tell how many images there are."""
    return left_out.partition(":")[0] if outside else left_out


def _asked(audit: Json) -> str:
    """Say on which sets membership was tried: never on the one that would be released."""
    if "membership" not in audit:
        return ""
    return (
        f" They were tried on {audit['models']} sets that were made the same way, each from about "
        f"half of {audit['images']:,} of the training images; the set itself is not attacked so, "
        "and is made from more of them."
    )


def _as_one(audit: Json) -> str:
    if audit.get("unit") != "patient":
        return ""
    return " Members are patients: all images of one are in or out together and asked about as one."


def _attack_rows(title: str, sides: Json, outside: bool) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for attack, by in sides.items():
        for side, curve in by.items():
            at: dict[str, Any] = next(one for one in curve["found"] if one["rate"] == RATE)
            rare = next(one for one in curve["found"] if one["rate"] == RARE)
            what = f"{attack}, {side}"
            if not outside:
                what += f": {at['members']:,} members, {at['others']:,} others"
            area = f"{curve['auc']:.2f} [{curve['auc_low']:.2f}, {curve['auc_high']:.2f}]"
            rows.append((title, what, f"{rate_text(at)}; at 0.1%: {rate_text(rare)}; AUC {area}"))
    return rows


def _one_run_rows(own: Json, outside: bool) -> list[tuple[str, ...]]:
    """Return what one run proves; for outside of controls only whether, which tells no number."""
    rows: list[tuple[str, ...]] = []
    controls = own["controls"]
    for title, one in (
        ("one run", own),
        ("one run, positive control", controls["positive_control"]),
        ("one run, negative control", controls["negative_control"]),
    ):
        said, right = f"epsilon is at least {one['lower']:.2f}", ""
        if outside and one is not own:
            said = "found" if one["lower"] > 0 else "not found"
        if not outside:
            said += f"; {one['provable']:.2f} could be shown at most"
            right = f"{one['right']} of {one['guesses']} guesses right"
        rows.append((title, right, said))
    return rows
