"""The import rule: inside the package a module imports only from what stands above it, and torch alone is needed."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "anorm"
ORDER = [
    "openmp",
    "words",
    "files",
    "algebra",
    "native",
    "ops",
    "norms",
    "archs",
    "convert",
    "registry",
    "weights",
    "data",
    "detection",
    "tasks",
    "config",
    "processes",
    "engine",
    "build",
    "prepare",
    "study",
    "deploy",
    "inside",
    "__main__",
]
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [
                f"{node.module}.{alias.name}" if node.module == "anorm" else node.module
                for alias in node.names
            ]
        rooms |= {name.split(".")[1] for name in names if name.startswith("anorm.")}
    return rooms


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_upwards(path):
    own = room(path)
    if own == "__init__":
        return
    assert own in ORDER, f"{own} has no place in the order of the house"
    for other in imported_rooms(path):
        assert ORDER.index(other) <= ORDER.index(own), f"{path} imports {other}, which stands below {own}"


def test_no_circles_in_ops():
    """Imports inside functions included; ``from package import module`` is an import of the module."""
    modules = {".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    graph = {}
    for name, path in modules.items():
        if not name.startswith("anorm.ops"):
            continue
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                of = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {full if full in modules else node.module for full in of} & modules.keys()
        graph[name] = found - {name}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_ops_know_no_law():
    for path in (PACKAGE / "ops").rglob("*.py"):
        assert "norms" not in imported_rooms(path), path


def test_architectures_know_no_law():
    for path in (PACKAGE / "archs").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("anorm.norms"):
                assert node.module == "anorm.norms.base", path


def test_importing_anorm_needs_torch_alone():
    code = "import sys, anorm; print([m for m in ('torchvision', 'timm', 'hydra', 'sklearn', 'torch._dynamo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_drawers():
    assert not [p for p in FILES if p.stem in ("utils", "common", "helpers", "misc")]


def test_files_outside_the_package_share_no_name():
    """tools/ and the folders of tests/ meet on one sys.path, where the first of a name hides all others."""
    found = [p for part in ("tools", "tests", "scripts") for p in (PACKAGE.parent / part).rglob("*.py")]
    names = Counter(path.stem for path in found if path.stem != "conftest")  # pytest loads these by path
    assert [name for name, times in names.items() if times > 1] == []
    installed = sys.stdlib_module_names | set(packages_distributions())
    assert [name for name in names if name in installed] == []
