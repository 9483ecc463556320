"""Sizes of networks from shapes alone, on torch's meta device: parameters and multiply-adds, by every convention.

``sizes.json`` beside this file keeps the sizes of the papers' rows, since counting 26 networks takes half a minute.
An entry counts only as long as the code that it was counted with is unchanged but for comments and docstrings;
``python scripts/sizes.py`` writes the file anew.
"""

from __future__ import annotations

import ast
import hashlib
import json
from dataclasses import astuple, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from anorm.algebra import Moments
from anorm.config.frozen import Config
from anorm.norms.base import Norm, Site
from anorm.norms.placement import Placement
from anorm.registry import create_model

PACKAGE = Path(__file__).resolve().parents[1]
KEPT = Path(__file__).with_suffix(".json")
COUNTED_WITH = ("anorm.algebra", "anorm.archs", "anorm.norms", "anorm.study.sizes")


@dataclass(frozen=True)
class Size:
    """A network's size by every convention: all and leaf parameters; macs and thop for one image."""

    all: int
    leaf: int
    macs: int
    thop: int


def size_of(config: Config, classes: int = 1000, pixels: int = 224) -> Size:
    """Return the size of the network of ``config``'s architecture and norm, on images of
    pixels x pixels: as kept, or counted.
    """
    signed = signature(config, classes, pixels)
    held = kept()["sizes"].get(signed)
    if held and all(_digest(path) == kept()["code"][path] for path in held["code"]):
        return Size(*held["size"])
    return _counted(_network(config), classes, pixels)[0]


def signature(config: Config, classes: int = 1000, pixels: int = 224) -> str:
    """Return a digest of all that a size depends on besides the code."""
    asked = json.dumps([config.arch.tree(), config.norm.tree(), classes, pixels], sort_keys=True)
    return hashlib.blake2b(asked.encode(), digest_size=8).hexdigest()


@cache
def kept() -> dict:
    """Return what ``sizes.json`` holds: sizes by signature, each with the files it was counted with, and their digests."""
    return json.loads(KEPT.read_text()) if KEPT.is_file() else {"code": {}, "sizes": {}}


def to_keep(configs: list[Config]) -> dict:
    """Return the content of ``sizes.json`` for the networks of ``configs``, all counted now."""
    sizes = {}
    for config in configs:
        size, code = _counted(_network(config), 1000, 224)
        sizes[signature(config)] = {"size": astuple(size), "code": code}
    files = sorted({path for entry in sizes.values() for path in entry["code"]})
    return {"code": {path: _digest(path) for path in files}, "sizes": dict(sorted(sizes.items()))}


def _network(config: Config) -> str:
    return json.dumps([config.arch.tree(), config.norm.tree()], sort_keys=True)


@cache
def _counted(network: str, classes: int, pixels: int) -> tuple[Size, tuple[str, ...]]:
    """Return a network's size and the files of the package that decided it."""
    arch, norm_config = json.loads(network)
    place, laws = Placement(**norm_config), []

    def norm(site: Site) -> LawOnly:
        laws.append(LawOnly(place(site)))
        return laws[-1]

    with torch.device("meta"), torch.no_grad():
        model = create_model(arch.pop("name"), norm, num_classes=classes, **arch).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, pixels, pixels))
    macs = counter.get_total_flops() // 2
    leaves = (m for m in model.modules() if not list(m.children()))
    size = Size(
        all=sum(p.numel() for p in model.parameters()),
        leaf=sum(p.numel() for m in leaves for p in m.parameters()),
        macs=macs,
        thop=macs + sum((5 if layer.norm.act else 4) * layer.outputs for layer in laws),
    )
    return size, _code_of(model)


class LawOnly(nn.Module):
    """A norm of which only the law runs: the rest is elementwise, no multiply-add by this counting."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.outputs = 0

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, mask: object = None
    ) -> torch.Tensor:
        self.outputs += x.numel()
        moment = x.new_empty(x.shape[:2])
        self.norm.law(Moments(moment, moment, x.shape[2] * x.shape[3]))
        return x

    def zero_init(self) -> None:
        self.norm.zero_init()


def _code_of(model: nn.Module) -> tuple[str, ...]:
    """Return the files, relative to the package, of the classes in ``model`` and of what those files import, as their text
    says it: what a process has imported besides does not count.
    """
    found: set[str] = set()
    wanted = {cls.__module__ for module in model.modules() for cls in type(module).__mro__} | {Placement.__module__}
    while wanted:
        name = wanted.pop()
        path = name.removeprefix("anorm.").replace(".", "/") + ".py"
        if name.startswith(COUNTED_WITH) and path not in found and (PACKAGE / path).is_file():
            found.add(path)
            wanted |= _imported_by(path)
    return tuple(sorted(found))


@cache
def _imported_by(path: str) -> frozenset[str]:
    """Return the modules that a file of the package imports from."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_bytes())):
        if isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return frozenset(found)


@cache
def _digest(path: str) -> str:
    """Return a digest of a file's statements: comments, docstrings and layout leave it as it is, and so does the version
    of Python that reads the file.
    """
    file, said = PACKAGE / path, hashlib.blake2b(digest_size=8)
    tree = ast.parse(file.read_bytes()) if file.is_file() else ast.Module([], [])
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            node.body.pop(0)
    for node in ast.walk(tree):
        plain = {k: v for k, v in ast.iter_fields(node) if not isinstance(v, (ast.AST, list)) and v is not None}
        plain.pop("kind", None)
        said.update(f"{type(node).__name__}{sorted(plain.items())}".encode())
    return said.hexdigest()
