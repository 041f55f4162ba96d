"""The public face: every name documented, types shipped, a start that needs no extra."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "medistill"
FILES = sorted(SOURCE.rglob("*.py"))
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def run_python(code: str) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_every_public_name_has_a_docstring(path: Path) -> None:
    module = ast.parse(path.read_text())
    assert ast.get_docstring(module), "the module itself"
    public = [n for n in module.body if isinstance(n, Definition) and not n.name.startswith("_")]
    told = [n for n in public if "overload" not in map(ast.unparse, n.decorator_list)]
    assert [n.name for n in told if not ast.get_docstring(n)] == []


def test_types_are_shipped() -> None:
    assert (SOURCE / "py.typed").is_file()


def test_import_loads_no_heavy_library() -> None:
    code = (
        "import medistill, sys; print(*sorted({'plotly', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    assert run_python(code) == ""


def test_every_module_imports_without_the_extras() -> None:
    code = """
import importlib, pkgutil, sys
for extra in ("plotly", "playwright", "pytest", "hypothesis"):
    sys.modules[extra] = None  # what makes an import of it fail
import medistill
names = [m.name for m in pkgutil.walk_packages(medistill.__path__, "medistill.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
print(len(names))
"""
    assert int(run_python(code)) >= 6


def test_the_face_names_what_its_modules_define() -> None:
    # Twice, and after the submodules are bound: `medistill.distill` must stay the function.
    code = """
import importlib, types
import medistill
for _ in range(2):
    for name in medistill.__all__:
        if isinstance(getattr(medistill, name), types.ModuleType):
            print(name, "is a module")
    for room in ("distill", "evaluate", "report"):
        importlib.import_module(f"medistill.{room}")
"""
    assert run_python(code) == ""
