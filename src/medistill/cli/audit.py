"""medistill audit: what an attack learns from a run."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..places import cache_folder
from .common import (
    SOURCE_HELP,
    AsJson,
    DataRoot,
    LedgerFile,
    Offline,
    Precision,
    Seed,
    Spacing,
    Window,
    Workers,
    at_least_one,
    emit,
    guarded,
    optioned,
)

if TYPE_CHECKING:
    from ..records import Json


@guarded
def audit(
    run: Annotated[Path, typer.Argument(help="A run folder that distill wrote.")],
    data: Annotated[str, typer.Option(help=SOURCE_HELP)],
    budget: Annotated[float, typer.Option(help="Minutes; what they do not allow is named.")] = 20.0,
    models: Annotated[
        int | None,
        typer.Option(help="Distillations anew, on images drawn by coins; else as --budget allows."),
    ] = None,
    images: Annotated[
        int, typer.Option(help="Training images to attack; a round number where there are fewer.")
    ] = 400,
    student_steps: Annotated[int, typer.Option(help="Steps of each model's training.")] = 300,
    control_steps: Annotated[
        int,
        typer.Option(help="Steps of the positive control's students, who learn copies by heart."),
    ] = 2000,
    ledger: LedgerFile = None,
    precision: Precision = "float32",
    workers: Workers = 1,
    seed: Seed = 0,
    window: Window = None,
    spacing: Spacing = None,
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Attack a run: copies, membership over the whole way, and the private release if it had one.

    Each model distills anew from images drawn by coins, a student is trained on that, and attacks
    (LiRA and RMIA on the student, `set` on the images) say who was in. Some images carry a wrong
    label: the worst case. Controls stand beside every number. That an attack finds nothing proves
    nothing beyond that attack.

    Example: medistill audit runs/first --data phantom --models 4 --images 60
    """
    from ..audit import audit_run
    from ..compute import Compute
    from ..data import load
    from ..engine import local
    from ..ledger import Ledger, ledger_file

    _check_minutes(budget)
    counts = {"images": images, "student_steps": student_steps, "control_steps": control_steps}
    at_least_one(models=models, **counts)
    where = optioned(data, window=window, spacing=spacing)
    splits = load(where, root=data_root, offline=offline, seed=seed)
    record = audit_run(
        run,
        splits,
        minutes=budget,
        models=models,
        **counts,
        seed=seed,
        compute=Compute(precision),
        engine=local(workers),
        cache=cache_folder(),
        ledger=Ledger(ledger or ledger_file()),
    )
    emit(record, _text(record, run), as_json)


def _check_minutes(budget: float) -> None:
    from ..errors import UsageError

    if not 0 <= budget < math.inf:
        raise UsageError(f"found --budget {budget:g}; expected minutes")


def _text(record: "Json", run: Path) -> str:
    lines = [f"{fact['kind']}: {fact['text']}" for fact in record["facts"]]
    for one in record["copies"]:
        lines.append(
            f"copies ({one['view']}): {one['exact']} of {one['images']} exact, {one['suspects']} "
            f"nearer to one than {100 - 100 * one['share']:g}% of held-out images come "
            f"(p = {one['p_value']:.2g}){': FAILED' if one['failed'] else ''}"
        )
    if "reconstruction" in record:
        one = record["reconstruction"]
        lines.append(
            f"reconstruction: {one['recovered']} of {one['images']} images lead back to the real "
            f"one they started from (by chance {100 * one['chance']:.1f}%)"
        )
    for one in record["attributes"]:
        lines.append(
            f"attribute {one['name']}: guessed of {100 * one['guessed']:.1f}% of members, "
            f"{100 * one['others']:.1f}% of others (advantage {100 * one['low']:.1f} to "
            f"{100 * one['high']:.1f} points)"
        )
    if "mechanism" in record:
        held = record["mechanism"]
        lines.append(
            f"release: epsilon is at least {held['lower']:.2f} of {held['claimed']:g} claimed "
            f"({held['runs']:,} releases){': BROKEN' if held['broken'] else ''}"
        )
    if "membership" in record:
        lines += _attacks(record)
    lines += [f"left out: {text}" for text in record["left_out"]]
    found = record["verdict"]
    leaks = "; ".join(found["reasons"]) if found["leaks"] else "none found by these attacks"
    lines.append(f"leaks: {leaks}. Membership: {found['membership']}.")
    return "\n".join([*lines, f"look at {run / 'audit_copies.png'}"])


def _attacks(record: "Json") -> list[str]:
    from ..formats import rate_text

    who = f"{record['images']} images"
    if record["units"] < record["images"]:
        who += f" of {record['units']} {record['unit']}s"
    lines = [
        f"membership: {record['models']} models, {who}, {record['canaries']} of them with a wrong "
        "label"
    ]
    for title, key in (
        ("run", "membership"),
        ("positive control", "positive_control"),
        ("negative control", "negative_control"),
    ):
        for attack, sides in record[key].items():
            for side, curve in sides.items():
                shares = ", at ".join(
                    f"{100 * found['rate']:g}%: {rate_text(found)}"
                    for found in reversed(curve["found"])
                )
                lines.append(
                    f"  {title:<17}{attack:<5}{side:<9} AUC {curve['auc']:.3f} "
                    f"[{curve['auc_low']:.3f}, {curve['auc_high']:.3f}]; found at {shares}"
                )
    if blind := record["verdict"]["blind"]:
        lines.append(
            f"that these find nothing says nothing, for they did not find their own control: "
            f"{', '.join(blind)}"
        )
    if record["noise"] is not None:
        lines.append(_drowning(record))
    one = record["one_run"]
    controls = one["controls"]
    lines.append(
        f"one run: {one['right']} of {one['guesses']} guesses right: epsilon is at least "
        f"{one['lower']:.2f} at delta {one['delta']:g} ({one['provable']:.2f} could be shown; of "
        f"copies {controls['positive_control']['lower']:.2f}, of nothing "
        f"{controls['negative_control']['lower']:.2f} are)"
    )
    return lines


def _drowning(record: "Json") -> str:
    """Say how noisy attacked models are, and how many images would have to be asked about."""
    from ..private_sketch import HOPELESS

    noise, held = record["noise"], record["data"]["images"]
    told = f"noise of a release in an attacked model: {noise:.2f} of the longest mean there is"
    if noise <= HOPELESS:
        return told
    needed = math.ceil(record["images"] * noise / HOPELESS)
    if needed > held:
        return f"{told}; about {needed:,} images would bring it to {HOPELESS:g}, of {held:,} there"
    return f"{told}; --images {needed} would bring it to about {HOPELESS:g}"
