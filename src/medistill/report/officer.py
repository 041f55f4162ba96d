"""A page for the data protection officer: what was made, is proved, was tried, and remains.

It is evidence for the controller's decision and makes none: it never calls a set anonymous.
"""

from dataclasses import asdict
from datetime import date, timedelta
from pathlib import Path

from ..audit.facts import CHOSEN
from ..audit.verdict import DROWNED
from ..audit.verdict import FORMAT as AUDIT
from ..errors import DataError
from ..formats import markdown
from ..ledger import Ledger, ledger_file
from ..privacy import attacker
from ..records import Json, read_json, write_atomic
from .blocks import Block, Listed, Section, Table
from .folder import record_of
from .tried import tried
from .words import listed

REASSESS_DAYS = 365
CLAIM = "That images are synthetic does not make them anonymous: they are made of patients' images."
EMPTY = "(to be filled in by the controller)"


def officer_report(path: Path, out: Path, ledger: Ledger | None = None) -> None:
    """Write the page of an audited run folder as Markdown, with what the ledger adds up.

    Raises: DataError when the folder holds no audited run or the ledger is damaged; RunRefused when
    `out` cannot be written.
    """
    write_atomic(out, officer(path, ledger=ledger or Ledger(ledger_file())).encode())


def officer(path: Path, least: int | None = None, ledger: Ledger | None = None) -> str:
    """Return the page as text; with `least`, as it may leave the house, without sizes of the data.

    `least` is the number of patients below which no class is; 0: nothing is said of it. `ledger`
    is where the releases of the same data stand.
    Raises: DataError when the folder holds no audited run or the ledger is damaged.
    """
    if not (path / "audit.json").is_file():
        raise DataError(
            f"found no audit.json in {path}; expected an audited run: `medistill audit {path} "
            "--data SOURCE` first"
        )
    run, audit = read_json(path / "run.json"), record_of(path / "audit.json", AUDIT)
    size = (path / "synthetic.safetensors").stat().st_size
    parts = [
        f"# Distilled images of {run['data']['name']}: for the data protection officer",
        f"Evidence for the controller's decision. {CLAIM}",
    ]
    chosen = _is_chosen(path / "evaluation.json", audit)
    for section in sections(run, audit, size, chosen=chosen, least=least, ledger=ledger):
        parts += [f"## {section.title}", *(_as_markdown(block) for block in section.blocks)]
    return "\n\n".join(parts).replace("<", "&lt;") + "\n"


def _is_chosen(path: Path, audit: Json) -> bool:
    """Say whether there is an evaluation of the set that was audited."""
    return path.is_file() and read_json(path).get("set") == audit["set"]


def sections(
    run: Json,
    audit: Json,
    size: int,
    *,
    chosen: bool,
    least: int | None = None,
    ledger: Ledger | None = None,
) -> list[Section]:
    """Return what is told of a run whose set takes `size` bytes, for a page of any form.

    `chosen` says that evaluate chose the recipe that goes along.
    """
    written = date.fromisoformat(audit["date"])
    again = written + timedelta(days=REASSESS_DAYS)
    end = (
        f"Audited {written}. To be assessed anew by {again}, or earlier if a new attack on "
        "distilled sets is published or the set is made anew."
    )
    return [
        _what(run, audit, size, least, chosen),
        _guarantee(run, audit, ledger),
        tried(audit, outside=least is not None),
        _grid(run, audit),
        Section("What remains", [_remains(audit), end]),
    ]


def _as_markdown(block: Block) -> str:
    if isinstance(block, Table):
        return markdown(block.head, block.rows)
    if isinstance(block, Listed):
        return "\n".join(f"- {point}" for point in block.points)
    return block


def _what(run: Json, audit: Json, size: int, least: int | None, chosen: bool) -> Section:
    rows: list[tuple[str, ...]] = [
        ("What would be released", f"{run['images']} synthetic images, {size:,} bytes"),
        *_sizes(audit["data"], least),
        ("Method", f"{run['method']}, {run['steps_done']:,} steps, from {run['start']}"),
        ("License of the data", run["data"].get("license", "unknown")),
        ("Recipients, purpose, legal basis, contract, expiry, contact", EMPTY),
        ("Done against names in pixels and headers", EMPTY),
    ]
    facts = [
        f"{one['kind']} ({one['weight']}): {one['text']}"
        for one in (_as_known(fact, audit, chosen) for fact in audit["facts"])
    ]
    inside = (
        "The run folder holds audit.json and audit_copies.png beside the set: true class sizes and "
        "real images, which no guarantee covers. They stay where the data are."
    )
    blocks: list[Block] = [
        Table(("", ""), rows),
        *([inside] if least is None else []),
        "What it holds of patients by its making:",
        Listed(facts),
    ]
    return Section("What it is", blocks)


def _as_known(fact: Json, audit: Json, chosen: bool) -> Json:
    """Return a fact of the audit as it stands now: a recipe may be chosen, a promise be broken."""
    if fact["kind"] == "recipe" and chosen:
        return asdict(CHOSEN)
    if fact["kind"] == "guarantee" and _broken(audit):
        return {**fact, "weight": "some", "text": "what was claimed was refuted: none holds"}
    return fact


def _sizes(data: Json, least: int | None) -> list[tuple[str, ...]]:
    """Return rows about the data: their sizes in the house, and outside what may be known."""
    if least is not None:
        told = f"{least:,} or more patients" if least else "their number is not told"
        return [("Each class was made from", told)]
    patients = data["patients"]
    people = f"{patients:,} patients" if patients else "patients whose number is not known"
    unit = "patients" if patients else "images"
    return [
        ("Made from", f"{data['images']:,} training images of {people}"),
        ("Smallest class", f"{data['smallest_class']}: {data['smallest']:,} {unit}"),
    ]


def _broken(audit: Json) -> bool:
    """Say whether releases were told apart better than their promise allows."""
    return bool(audit.get("mechanism", {}).get("broken"))


def _promise(run: Json) -> Json | None:
    found: Json | None = (run.get("sketch") or {}).get("privacy")
    return found


def _against(audit: Json) -> list[str]:
    """Return what one run of attacks says against the promise, at 95%: enough to look again."""
    if not any(" proves " in text for text in audit["verdict"]["reasons"]):
        return []
    return [
        f"Against it: one run of attacks shows an epsilon of {audit['one_run']['lower']:.2f} or "
        "more, as it "
        "would by chance in one audit of twenty. Audit again before anything is released."
    ]


def _guarantee(run: Json, audit: Json, ledger: Ledger | None) -> Section:
    held = _promise(run)
    if held is None:
        none = "None. No mechanism bounds what the set tells of a patient; only attacks were tried."
        return Section("Guarantee", [none])
    if _broken(audit):
        false = (
            f"None that holds. Epsilon {held['epsilon']:g} is claimed, and was refuted: releases "
            f"show an epsilon of {audit['mechanism']['certain']:.2f} or more. Something between "
            "the data and the release is not as the proof takes it to be."
        )
        return Section("Guarantee", [false])
    gain = attacker(held["epsilon"], held["delta"])
    blocks: list[Block] = [
        f"Differential privacy, epsilon {held['epsilon']:g}, delta {held['delta']:g}, for each "
        f"{held['unit']} ({held['adjacency']}), by {_releases(held)}. In plain words: somebody who "
        f"knows the images of all others, and is ready to take 1 in 100 strangers for a member, "
        f"finds a member {100 * gain['tpr_at_0.01']:.1f} times in 100 at most (with 1 in 1,000: "
        f"{100 * gain['tpr_at_0.001']:.2f}). This holds against every attack, known or not, and "
        "for all that is made from the same release.",
        "Not covered: scores and settings that were chosen on real images, the sizes of classes in "
        "this page and what the attacks below found (they were made without noise), facts about "
        "groups (that is what the set is for), a compromised machine, and further releases of the "
        f"same data, which the ledger adds up.{_by_image(held)}",
        *_against(audit),
        *([_together(held, ledger)] if ledger else []),
    ]
    return Section("Guarantee", blocks)


def _together(held: Json, ledger: Ledger) -> str:
    """Say what all releases of the same data come to, by the ledger at hand."""
    names = set(held.get("receipts") or ())
    noted = {one.receipt: one for one in ledger.releases() if one.receipt in names}
    told, delta = [], held["delta"]
    for one in noted.values():
        number = len(ledger.of(one.data, one.digest))
        total = ledger.together(one.data, one.digest, delta)
        told.append(
            f"All {number} releases of {one.data} in the ledger together: epsilon {total:.2f} at "
            f"delta {delta:g}. Who has all of them finds a member "
            f"{100 * attacker(total, delta)['tpr_at_0.01']:.1f} times in 100 at most, not as above."
            if number > 1
            else f"It is the only release in the ledger under the name {one.data} or of these very "
            "data. Releases of other names may hold the same patients."
        )
    if missing := sorted(names - set(noted)):
        told.append(
            f"The ledger at hand does not hold {listed(missing)}: ask whoever released that what "
            "all releases of those data come to, or give --ledger FILE."
        )
    return " ".join(dict.fromkeys(told))


def _releases(held: Json) -> str:
    number = len(held.get("receipts") or ())
    if number < 2:
        return "one noisy release"
    return (
        f"{number} noisy releases of different sites, if no patient is in two of them (whoever is "
        "loses the sum)"
    )


def _by_image(held: Json) -> str:
    if held["unit"] == "patient":
        return ""
    return " The unit is an image: a patient with several images is protected less."


def _grid(run: Json, audit: Json) -> Section:
    """Return the three criteria of WP216 (05/2014), each with its evidence and what remains."""
    held, found = _promise(run), audit["verdict"]
    bound = f"bounded by epsilon {held['epsilon']:g}" if held else "not bounded by a proof"
    if held and _broken(audit):
        bound = "not bounded: what was claimed was refuted"
    copied = any(one["failed"] for one in audit["copies"])
    asked = "membership" in audit
    members = [text for text in found["reasons"] if " finds " in text or " proves " in text]
    told = found["membership"]
    if told == "valid":
        told = listed(members) if members else f"nothing found; {_could(audit)}"
    back = audit.get("reconstruction", {}).get("failed", False)
    better = [one["name"] for one in audit["attributes"] if one["low"] > 0]
    inferred = "not tried: the source has no attribute beside the class"
    if any(one.startswith("reconstruction, subgroups") for one in audit["left_out"]):
        inferred = "not tried: there was no time for it"
    if audit["attributes"]:
        inferred = "no attribute is guessed better of members"
    if better:
        inferred = f"guessed better of members: {listed(better)}"
    rows: list[tuple[str, ...]] = [
        (
            "singling out: can a patient's record be isolated?",
            "copies or starts were found again"
            if copied or back
            else "copy check found none; look at the gallery",
            f"{bound}; images that started from real ones are records of patients"
            if run["real_pixels"]
            else bound,
        ),
        (
            "linkability: can records of one patient be linked?",
            "membership inference: " + (told if asked else "not tried"),
            f"{bound}; knowing that a patient is in tells where the patient was treated",
        ),
        (
            "inference: can something be deduced about a patient?",
            inferred,
            f"{bound} for what depends on the patient; group facts remain by purpose",
        ),
    ]
    grid = Table(("question", "evidence", "risk"), rows)
    return Section("The three questions of WP216", [grid])


def _remains(audit: Json) -> str:
    found = audit["verdict"]
    if found["leaks"]:
        return (
            f"Leaks were found: {listed(found['reasons'])}. Treat the set as data of patients; do "
            "not release it beyond those who may see them."
        )
    if found["membership"] == DROWNED:
        return f"No conclusion on membership ({DROWNED}). The guarantee alone bounds it."
    if found["membership"] != "valid":
        return f"No conclusion on membership ({found['membership']}). Treat it as data of patients."
    return (
        f"These attacks found nothing and {_could(audit)}. Other attacks may find more: keep "
        "recipients bound by contract not to try."
    )


def _could(audit: Json) -> str:
    """Say which attacks the controls vouch for."""
    could = "the controls show that they could have"
    if audit.get("noise"):
        could += " of a set without noise"
    if blind := audit["verdict"]["blind"]:
        could += f", but for {listed(blind)}, which did not find their own control either"
    return could
