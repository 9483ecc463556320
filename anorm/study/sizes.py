"""Sizes of networks from shapes alone, on torch's meta device: parameters and multiply-adds, by every convention."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from anorm.algebra import Moments
from anorm.config.complete import accepted
from anorm.config.compose import compose
from anorm.norms.base import Norm, Site
from anorm.norms.placement import Placement
from anorm.registry import create_model
from anorm.study.printed import CONFIGS


@dataclass(frozen=True)
class Size:
    """A network's size by every convention: all and leaf parameters; macs and thop for one image."""

    all: int
    leaf: int
    macs: int
    thop: int


def size_of(arguments: Iterable[str], classes: int = 1000, pixels: int = 224) -> Size:
    """The size of the network that train.py builds for these arguments, on images of pixels x pixels."""
    return _size(*_composed(tuple(arguments)), classes, pixels)


@cache
def _composed(arguments: tuple[str, ...]) -> tuple[str, str]:
    config = compose(CONFIGS, list(arguments), accepted).config
    return json.dumps(config["arch"], sort_keys=True), json.dumps(config["norm"], sort_keys=True)


@cache
def _size(arch_config: str, norm_config: str, classes: int, pixels: int) -> Size:
    arch, place = json.loads(arch_config), Placement(**json.loads(norm_config))
    laws: list[LawOnly] = []

    def norm(site: Site) -> LawOnly:
        laws.append(LawOnly(place(site)))
        return laws[-1]

    with torch.device("meta"), torch.no_grad():
        model = create_model(arch.pop("name"), norm, num_classes=classes, **arch).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, pixels, pixels))
    macs = counter.get_total_flops() // 2
    leaves = (m for m in model.modules() if not list(m.children()))
    return Size(
        all=sum(p.numel() for p in model.parameters()),
        leaf=sum(p.numel() for m in leaves for p in m.parameters()),
        macs=macs,
        thop=macs + sum((5 if layer.norm.act else 4) * layer.outputs for layer in laws),
    )


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
