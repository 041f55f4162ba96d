"""The whole story on the built-in phantom set: distill, evaluate, report."""

from pathlib import Path

from .backbones import ConvNet
from .budget import Budget
from .data import load
from .distill import Run, distill_to
from .errors import extra
from .evaluate import evaluate_run
from .methods import Task
from .methods.dm import DM
from .records import Json
from .report import report

SOURCE = "phantom:classes=3,variation=0.3,n=600"
IPC = 2
STEPS = 300
STUDENT_STEPS = 100
STUDENTS = 5


def demo(folder: Path, *, seed: int = 0, cache: Path | None = None) -> Json:
    """Distill the phantom set to 2 images per class, score it, and write report.html.

    Returns the evaluation's record, with the page's path under `page`.
    Raises: RunRefused when the folder is there already; UsageError without the report extra.
    """
    extra("plotly", "report")  # before the work, not after it
    splits = load(SOURCE, offline=True, seed=seed)
    backbone = ConvNet(width=16)
    method = DM()
    command = (
        f"medistill distill '{SOURCE}' --method dm --steps {STEPS} --ipc {IPC} "
        f"--backbone {backbone.name} --seed {seed} --out {folder}"
    )
    task = Task(splits.train, Budget(ipc=IPC), backbone)
    run = Run(method, task, seed, SOURCE, command, STEPS)
    distill_to(folder, run, resume=False, cache=cache)
    command = (
        f"medistill evaluate {folder} --data '{SOURCE}' --student-steps {STUDENT_STEPS} "
        f"--seeds {STUDENTS} --seed {seed}"
    )
    record = evaluate_run(
        folder,
        splits,
        students=[backbone],
        seeds=range(STUDENTS),
        steps=STUDENT_STEPS,
        command=command,
        cache=cache,
    )
    page = folder / "report.html"
    report(folder, page)
    return {**record, "page": str(page)}
