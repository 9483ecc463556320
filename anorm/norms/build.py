"""Laws by name: found by listing this folder, so that adding a law is adding a file."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from anorm.norms.base import Norm, RunningNorm
from anorm.words import nearest

__all__ = ["build", "build_base", "check_options", "norm_classes", "set_sync"]


@cache
def norm_classes() -> dict[str, type[Norm]]:
    """Name -> class, from the NORMS table of every file in this folder."""
    found: dict[str, type[Norm]] = {}
    for info in sorted(
        pkgutil.iter_modules(importlib.import_module("anorm.norms").__path__), key=lambda i: i.name
    ):
        found.update(getattr(importlib.import_module(f"anorm.norms.{info.name}"), "NORMS", {}))
    return found


def lookup_norm(name: str) -> type[Norm]:
    classes = norm_classes()
    if name not in classes:
        raise ValueError(f"unknown norm {name!r}{nearest(str(name), classes)}")
    return classes[name]


def check_options(name: str, options: dict) -> None:
    """ValueError for an option that the law does not have, with the nearest that it has."""
    parameters = inspect.signature(lookup_norm(name)).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [p for p in parameters if p not in ("channels", "act")]
    for option in options:
        if option not in known:
            raise ValueError(f"norm {name!r} has no option {option!r}{nearest(option, known, 'options')}")


def build(name: str, channels: int, act: str | None = None, sync: bool = False, **options) -> Norm:
    """A layer by name; see ``anorm.create_norm``."""
    check_options(name, options)
    norm = lookup_norm(name)(channels, act=act, **options)
    set_sync(norm, sync)
    return norm


def build_base(base: str | dict, channels: int, affine: bool) -> Norm:
    """The norm that another law stands on: a name, or {name: ..., options}; ``affine`` with or without its own."""
    options = {"name": base} if isinstance(base, str) else dict(base)
    name = options.pop("name", None)
    if name is None:
        raise ValueError(f"base={base!r} needs a name, as in base={{name: gn, groups: 16}}")
    if "affine" in options:
        raise ValueError(
            f"base={base!r}: whether a base norm has an affine of its own is up to the law above it"
        )
    if "affine" not in inspect.signature(lookup_norm(name)).parameters:
        raise ValueError(
            f"norm {name!r} cannot be the base of another law: it has no plain affine to replace"
        )
    norm = build(name, channels, affine=affine, **options)
    norm.part = True
    return norm


def set_sync(module: nn.Module, sync: bool) -> None:
    """Pool every statistic over N of every law below over all processes, or only over the own batch.

    Raises ValueError for another library's batch norm, which cannot be told to.
    """
    for layer in module.modules():
        if isinstance(layer, RunningNorm):
            layer.sync = sync
        elif sync and isinstance(layer, _BatchNorm) and not isinstance(layer, nn.SyncBatchNorm):
            raise ValueError(
                f"sync=True does not reach a {type(layer).__name__} of another library: take norm=bn, or "
                "norm.target=torch.nn.SyncBatchNorm without norm.sync"
            )
