"""What exists, by name: found by listing norms/ and archs/, so that a new file registers itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from anorm.archs import foreign
from anorm.archs.base import MakeNorm
from anorm.archs.trace import find_sites
from anorm.convert import create
from anorm.norms.build import build, norm_classes
from anorm.norms.placement import Placement
from anorm.words import nearest

__all__ = ["arch_builders", "create_model", "create_norm", "has_basic_blocks", "list_archs", "list_norms"]


@cache
def arch_builders() -> dict[str, Callable[..., nn.Module]]:
    """Name -> builder(norm, num_classes, in_channels, **options), from the ARCHS table of every file in archs/."""
    return _tables("ARCHS", {})


def _tables(name: str, found: dict | set) -> dict | set:
    """``found``, with the table of that name of every file in archs/ that has one."""
    for info in sorted(
        pkgutil.iter_modules(importlib.import_module("anorm.archs").__path__), key=lambda i: i.name
    ):
        found.update(getattr(importlib.import_module(f"anorm.archs.{info.name}"), name, ()))
    return found


def list_archs() -> list[str]:
    """Names that ``create_model`` knows."""
    return list(arch_builders())


@cache
def has_basic_blocks(arch: str) -> bool:
    """Whether the network has blocks where AN's published place and that of the paper's text differ (``Site.text``).

    Architectures here say so in the ``BASIC`` of their files; other libraries' networks are built and read.
    """
    if ":" not in arch:
        return arch in _tables("BASIC", set())
    with torch.device("meta"):
        network = foreign.load(arch, 1).network
        names = [name for name, layer in network.named_modules() if isinstance(layer, nn.BatchNorm2d)]
        return bool(names) and any(site.text is not None for site in find_sites(network, names).values())


def list_norms() -> list[str]:
    """Names that ``create_norm`` knows."""
    return list(norm_classes())


def create_norm(name: str, channels: int, act: str | None = None, **options) -> nn.Module:
    """A normalization layer by name: (N, C, H, W) in and out, called as layer(x) or layer(x, residual).

    Args:
        name: one of ``list_norms()``.
        channels: C.
        act: activation fused behind the norm (and behind the residual): "relu", "relu6", ...; None for none.
        options: of the law (its class documents them); ``sync=True`` pools statistics over all processes.

    Raises ValueError for an unknown name or option, naming the nearest.
    """
    return build(name, channels, act, **options)


def create_model(
    arch: str,
    norm: str | dict | MakeNorm = "bn",
    num_classes: int = 1000,
    in_channels: int = 3,
    **arch_options,
) -> nn.Module:
    """A network by name: images (N, in_channels, H, W) -> logits (N, num_classes).

    Args:
        arch: one of ``list_archs()``, or ``timm:NAME``, ``torchvision:NAME`` for any network of those libraries (see
            ``anorm.convert.create``).
        norm: a law's name; or {name: ..., place: ..., elsewhere: ..., and the law's options} (see
            ``anorm.norms.placement.Placement``); or any callable from ``Site`` to a module.
        num_classes, in_channels: of the classifier and the images.
        arch_options: of the architecture (its class documents them).

    The result has ``forward_stages(x)``, ``feature_info`` and ``norm_summary``. Raises ValueError for an unknown
    name or option, naming the nearest.
    """
    for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive number")
    if ":" in arch:
        return create(arch, norm, num_classes, in_channels, **arch_options)
    builders = arch_builders()
    if arch not in builders:
        raise ValueError(f"unknown architecture {arch!r}{nearest(str(arch), builders)}")
    known = [
        p
        for p in inspect.signature(builders[arch]).parameters
        if p not in ("norm", "num_classes", "in_channels")
    ]
    for option in arch_options:
        if option not in known:
            raise ValueError(f"architecture {arch!r} has no option {option!r}{nearest(option, known, 'options')}")
    if not callable(norm):
        norm = Placement(**({"name": norm} if isinstance(norm, str) else norm))
    model = builders[arch](norm=norm, num_classes=num_classes, in_channels=in_channels, **arch_options)
    model.norm_summary = norm.summary() if isinstance(norm, Placement) else ""
    return model
