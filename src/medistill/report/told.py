"""What a package that passed every check says of itself, in the words of all who show it."""

from ..audit.verdict import BROKEN
from ..records import Json


def told_of(manifest: Json, privacy: Json) -> dict[str, str]:
    """Return a checked package's terms and claims, line by line, without empty ones.

    Example:
        >>> told = {"site": "A", "made": {"real_pixels": True}, "least_patients": 5}
        >>> told_of(told, {})["each class"]
        '5 or more patients'
    """
    made, least = manifest["made"], manifest["least_patients"]
    lines = {
        "site": manifest.get("site", ""),
        "contact": manifest.get("contact", ""),
        "license": manifest.get("license", ""),
        "for": ", ".join(manifest.get("recipients", ())),
        "purpose": manifest.get("purpose", ""),
        "expires": manifest.get("expires", ""),
        "supersedes": manifest.get("supersedes", ""),
        "real pixels": "real images, or started from them" if made["real_pixels"] else "",
        "packed in spite of": ", ".join(manifest.get("allowed", ())),
        "each class": f"{least:,} or more patients" if least else "a number of patients not told",
        "guarantee": _guarantee(privacy.get("guarantee"), privacy.get("audit")),
        "attacks": _attacks(privacy.get("audit")),
    }
    return {title: text for title, text in lines.items() if text}


def _guarantee(held: Json | None, audit: Json | None) -> str:
    if not held:
        return "none"
    told = f"epsilon {held['epsilon']:g}, delta {held['delta']:g} for each {held['unit']}"
    if audit and BROKEN in audit["verdict"]["reasons"]:
        return f"none that holds: {told} was claimed, and its audit refuted it"
    return told


def _attacks(audit: Json | None) -> str:
    if not audit:
        return "none were made"
    verdict = audit["verdict"]
    found = "; ".join(verdict["reasons"]) if verdict["leaks"] else "found nothing"
    if verdict["membership"] == "not asked":
        found += "; nobody asked who was a member"
    elif verdict["membership"] != "valid":
        found += f"; on members {verdict['membership']}"
    if blind := verdict.get("blind"):
        found += f"; without power: {', '.join(blind)}"
    return f"{found} (audited {audit['date']})"
