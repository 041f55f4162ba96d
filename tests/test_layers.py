"""The shape of the source: who may import whom, how long things get, who may draw numbers."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "medistill"
FILES = sorted(SOURCE.rglob("*.py"))
# Each floor imports only from floors below; errors lie under all, the package's face stands on top.
FLOORS = (
    ("errors",),
    ("places", "rng", "records", "optim", "progress", "pixels", "cosine", "tracking"),
    ("sets", "engine", "privacy"),
    ("budget", "ledger"),
    ("data", "backbones", "augment", "metrics", "pictures", "compute"),
    ("train", "features"),
    ("probes", "moments"),
    ("sketch", "unroll"),
    ("experts", "private_sketch"),
    ("methods",),
    ("arms", "prepare", "variation"),
    ("distill", "evaluate", "model", "measure"),
    ("audit", "handover"),
    ("cell", "conformance"),
    ("plan",),
    ("study",),
    ("tabulate", "indicator"),
    ("formats",),
    ("predict", "judge"),
    ("report",),
    ("package",),
    ("opening",),
    ("demo",),
    ("cli",),
    ("__init__", "__main__"),
)
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
# Calls that draw from the global generator of torch unless they are given one of their own.
DRAWS = re.compile(
    r"(rand|randn|randint|rand_like|randn_like|randint_like|randperm|bernoulli|multinomial|normal)"
    r"|(normal|uniform|bernoulli|random|exponential|orthogonal)_|(trunc|kaiming|xavier)_\w+_"
)
# Calls that touch a global generator whatever they are given.
SEEDS = re.compile(
    r"torch\.(random\.|cuda\.)?(manual_seed\w*|seed\w*|initial_seed|[gs]et_rng_state|fork_rng)"
    r"|(np|numpy)\.random\.(?!default_rng)[a-z]\w*"
    r"|random\.(seed|random|randint|randrange|choices?|shuffle|sample|uniform|gauss)"
)

each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))


def modules_imported(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the full name of every module or name that a file imports, in functions as well."""
    package = ("medistill", *path.relative_to(SOURCE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            inside = tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, *inside, alias.name) for alias in node.names)


def upward_imports(path: Path) -> list[str]:
    """Name the rooms that a file imports though they do not stand on a floor below its own."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    rooms = {name[1] for name in modules_imported(path) if name[0] == "medistill" and name[1:]}
    rooms -= {parts[0], "__version__"}
    return sorted(room for room in rooms if LEVEL.get(room, len(FLOORS)) >= LEVEL[parts[0]])


@each_file
def test_imports_only_from_floors_below(path: Path) -> None:
    assert path.relative_to(SOURCE).with_suffix("").parts[0] in LEVEL, "give the module a floor"
    assert upward_imports(path) == []


@each_file
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} has more than 60 lines"


@each_file
def test_never_uses_a_global_generator(path: Path) -> None:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            call, given = ast.unparse(node.func), {word.arg for word in node.keywords}
            draws = DRAWS.fullmatch(node.func.attr) and "generator" not in given
            if draws or SEEDS.fullmatch(call):
                found.append(f"line {node.lineno}: {call}")
    assert found == []


def test_torchvision_is_imported_nowhere() -> None:
    # Beside a CPU build of torch it does not import, and takes others down with it.
    folders = [SOURCE, ROOT / "tests", ROOT / "benchmarks"]
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        tops = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
        }
        assert "torchvision" not in tops, path
