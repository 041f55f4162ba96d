"""What medistill sketch says and refuses where --epsilon asks for a proof."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ..compute import Compute
    from ..engine import Engine
    from ..privacy import Guarantee, Unit
    from ..private_sketch import Plan
    from ..probes import SketchSpec
    from ..records import Json
    from ..sets import Card, RealSet
    from ..sketch import Sketch

# Noise grows with the root of their number, so a private sketch looks at less.
PRIVATE: dict[str, Any] = {"networks": 10, "frequencies": 128, "scale": 1.0, "layers": "last"}


def classes_of(text: str | None, source: str, card: "Card") -> Sequence[str]:
    """Return the public list of classes: as it is given, or medistill's own of a known set.

    Raises: UsageError when none is given and the names were read from the data.
    """
    from ..data import public_classes
    from ..errors import UsageError

    if text is not None:
        return [name.strip() for name in text.split(",")]
    if public_classes(source):
        return card.classes
    raise UsageError(
        f"found the classes of {card.name} in the data, so that their names tell who is in it; "
        f"expected a public list: if it may be known, --classes '{','.join(card.classes)}'"
    )


class Asked(NamedTuple):
    """What --epsilon and the flags beside it ask for."""

    epsilon: float
    delta: float
    unit: "Unit"
    classes: Sequence[str]
    ledger: Path | None
    limit: float | None
    accept_noise: bool

    @property
    def budget(self) -> dict[str, Any]:
        """What a release is asked for."""
        names = ("epsilon", "delta", "unit", "classes")
        return {name: getattr(self, name) for name in names}


def plan_of(real: "RealSet", spec: "SketchSpec", asked: Asked) -> "Plan":
    """Return what a release would be; nothing is released."""
    from ..private_sketch import plan

    return plan(real, spec, **asked.budget)


def released(
    real: "RealSet",
    spec: "SketchSpec",
    asked: Asked,
    compute: "Compute",
    engine: "Engine",
) -> "tuple[Sketch, str, Json]":
    """Release a sketch, and say what it and all releases of these data guarantee.

    Raises: RunRefused when the noise would drown a class, unless that is accepted.
    """
    from ..errors import RunRefused
    from ..ledger import Ledger, ledger_file
    from ..private_sketch import CLEAR, HOPELESS, private_sketch
    from ..progress import say

    about = plan_of(real, spec, asked)
    worst = about.worst
    noise = f"{worst.noise:.1f} times the longest mean of class {worst.name} that there could be"
    if about.hopeless and not asked.accept_noise:
        raise RunRefused(
            f"found noise of {noise}, at epsilon {asked.epsilon:g}; expected {HOPELESS:g} at most: "
            f"{about.advice}; or --accept-noise"
        )
    ledger = Ledger(asked.ledger or ledger_file(), asked.limit)
    made = private_sketch(real, spec, ledger, **asked.budget, compute=compute, engine=engine)
    delta = asked.delta
    together = ledger.together(real.card.name, real.digest, delta)
    assert made.privacy is not None
    record = {"together": together, **promise_record(made.privacy)}
    text = (
        f"{guarantee_text(record)}\nall releases of this name or of these very data: epsilon "
        f"{together:.2f} at delta {delta:g}, noted in {ledger.path}"
    )
    if worst.noise > CLEAR:
        say(
            f"warning: the noise is {noise}, and students may never name it: {about.advice} "
            "(computed from true class sizes: do not publish this line)"
        )
    return made, text, record


def needs_epsilon(**given: object) -> None:
    """Refuse flags of a private sketch where there is no --epsilon.

    Raises: UsageError that names the flag.
    """
    from ..errors import UsageError

    for name, value in given.items():
        if value is not None and value is not False:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"found {flag} without --epsilon; expected both, or neither")


def promise_record(held: "Guarantee") -> "Json":
    """Return the JSON form of what is promised; none of it comes from the data."""
    from ..privacy import attacker
    from ..records import to_record

    return {"guarantee": to_record(held), "attacker": attacker(held.epsilon, held.delta)}


def plan_record(plan: "Plan") -> "Json":
    """Return the JSON form of a plan."""
    return {
        **promise_record(plan.guarantee),
        "private": True,
        "classes": {one.name: {"units": one.units, "noise": one.noise} for one in plan.signals},
        "hopeless": plan.hopeless,
        "advice": plan.advice,
    }


def plan_text(plan: "Plan") -> str:
    """Return a plan in words: what an attacker gains at most, and the noise of each class."""
    held = plan.guarantee
    lines = [guarantee_text(plan_record(plan))]
    wide = max(len(one.name) for one in plan.signals)
    for one in plan.signals:
        share = f"noise {100 * one.noise:.0f}% of the mean, or more"
        lines.append(f"{one.name:<{wide}}  {one.units:>8.0f} {held.unit}s  {share}")
    if plan.advice:
        lines.append(plan.advice)
    if plan.hopeless:
        lines.append(
            "A release would be refused (but for --accept-noise): the noise drowns a class."
        )
    lines.append("Nothing was released; these numbers are not private: keep them.")
    return "\n".join(lines)


def guarantee_text(record: "Json") -> str:
    """Say what a guarantee means for one patient."""
    held, gain = record["guarantee"], record["attacker"]
    return (
        f"epsilon {held['epsilon']:g}, delta {held['delta']:g} for each {held['unit']}: whoever "
        f"knows all the others, and says of 1 in 100 strangers that they are in, finds a member "
        f"{100 * gain['tpr_at_0.01']:.1f} times in 100 at most"
    )
