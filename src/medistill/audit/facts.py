"""Leak facts: what a set holds or was made with that tells about patients, without any attack."""

from dataclasses import dataclass
from typing import Literal

from ..budget import Budget
from ..records import Json, from_record
from ..sets import GIVEN, SyntheticSet

Weight = Literal["high", "some", "none"]


@dataclass(frozen=True)
class Fact:
    """One property of a set, how much it says about patients, and why."""

    kind: str
    weight: Weight
    text: str


CHOSEN = Fact(
    "recipe", "some", "rate and stop of the recipe are what did best on real validation images"
)


def facts_of(made: SyntheticSet, run: Json, *, chosen: bool = False) -> list[Fact]:
    """Return what is known of a set's start, labels, shares, recipe and guarantee.

    `chosen` says that rate and stop of the recipe are those that evaluate chose.
    """
    held = (run.get("sketch") or {}).get("privacy")
    facts = [_start(made), _labels(made), _shares(made, run, bool(held))]
    facts.append(_rate(made, run, chosen))
    if made.card.normalization == GIVEN:
        facts.append(Fact("normalization", "none", "mean and std were given, not taken from data"))
    else:
        facts.append(
            Fact(
                "normalization",
                "some",
                f"mean and std are those of the {made.card.normalization or 'data'}: two numbers "
                "of all training images for each channel",
            )
        )
    if made.recipe.whitening:
        facts.append(
            Fact("whitening", "high", "the set carries a covariance of all training images")
        )
    if made.card.digest:
        facts.append(
            Fact("digest", "some", "a digest of the data lets whoever has them confirm it")
        )
    if held:
        facts.append(
            Fact(
                "guarantee",
                "none",
                f"made from one release with epsilon {held['epsilon']:g}, delta {held['delta']:g} "
                f"for each {held['unit']}: the set itself is covered",
            )
        )
    else:
        facts.append(Fact("guarantee", "some", "no mechanism bounds what the set tells"))
    return facts


def _start(made: SyntheticSet) -> Fact:
    if made.origin.real_pixels:
        return Fact("start", "high", "images are, or started from, real images of patients")
    if made.origin.start == "class-mean" and made.origin.settings.get("moments"):
        said = "images were drawn from mean and covariance of each class at low frequencies"
        return Fact("start", "some", said)
    if made.origin.start == "class-mean":
        return Fact("start", "some", "images started from the mean image of each class")
    return Fact("start", "none", "images started from noise")


def _labels(made: SyntheticSet) -> Fact:
    hard = bool(((made.labels == 0) | (made.labels == 1)).all())
    if hard:
        return Fact("labels", "none", "labels are the classes")
    return Fact(
        "labels", "some", "labels are soft: they carry what a model trained on patients thinks"
    )


def _shares(made: SyntheticSet, run: Json, noisy: bool) -> Fact:
    budget = from_record(Budget, run["budget"])
    kind, after = "class sizes", ", as a release with noise tells them" if noisy else ""
    if made.card.task == "multi-label":
        text = "labels are those of real images: which occur together, and how often"
        return Fact(kind, "some", text)
    if budget.small == "whole" and len(made) < budget.total(made.card):
        told = "a class with fewer real images than its share was taken whole: how many it has"
        return Fact(kind, "none" if noisy else "high", told + after)
    if budget.share != "equal":
        told = f"the numbers of images by class follow the sizes of the classes{after}"
        return Fact(kind, "none" if noisy else "some", told)
    return Fact(kind, "none", "there are equally many images of each class")


def _rate(made: SyntheticSet, run: Json, chosen: bool) -> Fact:
    if chosen:
        return CHOSEN
    if run["settings"].get("lr_rate"):
        told = f"the rate {made.recipe.lr:g} was learned from networks that patients' images taught"
        return Fact("recipe", "some", told)
    told = "rate and stop of the recipe are defaults, until evaluate has chosen them: then they "
    return Fact("recipe", "none", told + "tell what did best on validation images")
