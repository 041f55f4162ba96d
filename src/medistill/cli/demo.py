"""medistill demo: the whole story, offline."""

from pathlib import Path
from typing import Annotated

import typer

from ..places import cache_folder
from .common import AsJson, Seed, emit, guarded, scores_text


@guarded
def demo(
    out: Annotated[
        Path | None, typer.Option(help="The run folder; otherwise demo, or demo-2 and so on.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Distill, evaluate and report on the built-in phantom set, in about two minutes.

    Example: medistill demo
    """
    from ..demo import demo as run_demo

    folder = out or next(
        path
        for path in (Path("demo"), *(Path(f"demo-{n}") for n in range(2, 10**6)))
        if not path.exists()
    )
    record = run_demo(folder, seed=seed, cache=cache_folder())
    text = f"{scores_text(record)}\nthe page: {Path(record['page']).resolve()}"
    shown = ("synthetic", "random", "full", "gap_closed", "page")
    emit({name: record[name] for name in shown}, text, as_json)
