"""The command line: each file parses, calls one library function and prints."""

import os
from typing import Annotated

import typer

from .. import __version__
from . import (
    audit,
    data,
    demo,
    distill,
    evaluate,
    experts,
    keys,
    package,
    predict,
    report,
    sketch,
    study,
    train,
    travel,
)

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Flags that are not listed are settings of the method, so the parser lets them through.
_OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}


def _version(given: bool) -> None:
    if given:
        print(__version__)
        raise typer.Exit


@app.callback()
def _face(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Distill medical image datasets into a few synthetic images, and say how good they are.

    Exit codes: 0 done, 2 wrong usage, 3 bad input data, 4 package refused, 5 run refused,
    130 stopped by Ctrl-C, 1 anything else.
    """


app.command()(demo.demo)
app.command()(predict.predict)
app.add_typer(data.app, name="data")
app.command(context_settings=_OPEN)(distill.distill)
app.command(context_settings=_OPEN)(experts.experts)
app.command()(sketch.sketch)
app.command()(sketch.merge)
app.command()(evaluate.evaluate)
app.command()(audit.audit)
app.command()(keys.keygen)
app.command()(keys.rotate)
app.command()(keys.accept)
app.command()(package.pack)
app.command()(package.sign)
app.command()(package.verify)
app.command()(package.show)
app.command()(travel.push)
app.command()(travel.pull)
app.command()(travel.encrypt)
app.command()(travel.decrypt)
app.command()(travel.export)
app.command()(train.train)
app.add_typer(study.app, name="study")
app.command()(report.report)


def main() -> None:
    """Run the command line."""
    # Threads that spin while they wait slow each other down many times over on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app(prog_name="medistill")
