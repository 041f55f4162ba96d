"""medistill predict: is distillation worth it on this dataset?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import (
    AsJson,
    DataRoot,
    Offline,
    Seed,
    Source,
    Spacing,
    Window,
    Workers,
    emit,
    guarded,
    interval_text,
    optioned,
    whole_numbers,
)

if TYPE_CHECKING:
    from ..records import Json


@guarded
def predict(
    source: Source,
    ipc: Annotated[str, typer.Option(help="Images per class; several with commas.")] = "1,10,50",
    method: Annotated[
        list[str] | None, typer.Option(help="Methods, repeatable; all that are known otherwise.")
    ] = None,
    indicator: Annotated[
        Path | None,
        typer.Option(help="What study fit-indicator wrote; the shipped one unless given."),
    ] = None,
    workers: Workers = 0,
    seed: Seed = 0,
    window: Window = None,
    spacing: Spacing = None,
    data_root: DataRoot = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Predict what distillation would reach, from small random samples, in about a minute.

    Students train on 1 to 20 random images per class and are scored on the validation split; with
    numbers of the data's variation they are held against a study of other datasets. The test split
    is not read; what is predicted, of random images too, are test scores. Intervals hold 80% of the
    time on datasets that resemble the study's.

    Example: medistill predict pneumoniamnist --ipc 1,10
    """
    from ..data import load
    from ..engine import local
    from ..indicator import load_indicator
    from ..predict import predict as predict_set

    budgets = whole_numbers("ipc", ipc)
    known = load_indicator(indicator)
    where = optioned(source, window=window, spacing=spacing)
    splits = load(where, root=data_root, offline=offline, seed=seed)
    made = predict_set(
        splits.train,
        splits.val,
        ipc=budgets,
        indicator=known,
        methods=method or (),
        seed=seed,
        engine=local(workers),
    )
    record = made.record(where)
    emit(record, _text(record), as_json)


def _text(record: "Json") -> str:
    lines = [f"{'method':<12}{'ipc':>5}{'accuracy':>22}{'AUC':>22}{'gap closed':>24}{'worth':>8}"]
    for one in record["predictions"]:
        gap = "-" if one["gap_closed"] is None else interval_text(one["gap_closed"])
        value = "more" if one["worth"] is None else f"{one['worth']:.0f}"
        lines.append(
            f"{one['method']:<12}{one['ipc']:>5}{interval_text(one['accuracy']):>22}"
            f"{interval_text(one['auc']):>22}{gap:>24}{value:>8}"
        )
    for ipc, scores in record["random"].items():
        shown = (f"{interval_text(scores[name]):>22}" for name in ("accuracy", "auc"))
        lines.append(f"{'random':<12}{ipc:>5}{''.join(shown)}")
    full = record["full"]
    lines.append(
        f"{'full':<17}{interval_text(full['accuracy']):>22}{interval_text(full['auc']):>22}"
    )
    return "\n".join([*lines, "", record["recommendation"]])
