"""Every kernel says which equation of anorm/ops/README.md it computes."""

import ast
import re
from pathlib import Path

import pytest

OPS = Path(__file__).parents[2] / "anorm/ops"
EQUATIONS = {int(n) for n in re.findall(r"^ {4}\((\d+)\)", (OPS / "README.md").read_text(), re.MULTILINE)}
SOURCES = [p for p in sorted(OPS.rglob("*")) if p.suffix in (".py", ".h", ".cpp")]
# what works on a range of items, and what a reduction or an elementwise pass is made of
CPP_KERNEL = re.compile(
    r"((?:^//.*\n)*)(?:^template.*\n)?"
    r"^(?:void (\w+)\(const \w+(?:<A>)?& p, int64_t begin, int64_t end\)|struct (\w*(?:Terms|Block|Affine|InputGradient)) )",
    re.MULTILINE,
)


def cited(text: str) -> set[int]:
    return {int(n) for found in re.findall(r"\(Eq\. ([\d, ]+)\)", text) for n in found.split(",")}


def test_the_equations_are_numbered_without_a_gap():
    assert EQUATIONS == set(range(1, len(EQUATIONS) + 1)) and len(EQUATIONS) == 21


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(OPS)))
def test_what_is_cited_exists(path):
    assert cited(path.read_text()) <= EQUATIONS


def kernels():
    """(name, the words above it or in its docstring) of every kernel."""
    for path in (OPS / "cpu").glob("*.h"):
        for words, function, struct in CPP_KERNEL.findall(path.read_text()):
            yield function or struct, words
    for path in (OPS / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield node.name, ast.get_docstring(node) or ""
    for path in (OPS / "reference.py", OPS / "cpu/passes.py", OPS / "triton/passes.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and re.fullmatch("(moments|affine)(_backward)?", node.name):
                yield node.name, ast.get_docstring(node) or ""


def test_every_kernel_cites_its_equation():
    found = list(kernels())
    assert len(found) > 60
    assert [name for name, words in found if not cited(words)] == []
    assert cited(" ".join(words for _, words in found)) >= EQUATIONS - {12, 15}  # those two stand in laws.cpp
    assert cited((OPS / "cpu/laws.cpp").read_text()) == {12, 15}
