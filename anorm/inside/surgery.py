"""Norm surgery: what a network loses when a layer's affine map is the same for all images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anorm.algebra import Affine, Moments, then
from anorm.engine.evaluate import Result
from anorm.inside.probes import LayerProbe, layers
from anorm.norms.base import Norm

__all__ = ["Averaged", "SurgeryCost", "operate"]


class Averaged(Norm):
    """A law whose gamma and beta are replaced by constants (C); it standardizes as before."""

    def __init__(self, norm: Norm, gamma: Tensor, beta: Tensor) -> None:
        super().__init__(norm.channels, norm.act)
        self.norm, self.site = norm, norm.site
        self.register_buffer("gamma", gamma)
        self.register_buffer("beta", beta)

    def needs(self) -> str:
        return self.norm.needs()

    def law(self, moments: Moments | None) -> Affine:
        return then(self.norm.parts(moments).standardized, self.gamma, self.beta)


@dataclass(frozen=True)
class SurgeryCost:
    """top1: points of accuracy lost (negative: gained); loss: increase of the loss an image; changed: share
    of images whose first class became right or wrong.
    """

    name: str
    top1: float
    loss: float
    changed: float


def operate(
    model: nn.Module, seen: dict[str, LayerProbe], evaluate: Callable[[], Result]
) -> tuple[Result, list[SurgeryCost], SurgeryCost | None]:
    """(accuracy as it is, what each layer's averaging costs, what that of all costs).

    seen: of the images that gamma and beta are averaged over. Only layers whose gamma or beta depend on the
    instance are operated on, one at a time; the network is left as it was.
    """
    norms = layers(model)
    whole = evaluate()

    def lost(name: str, names: list[str]) -> SurgeryCost:
        try:
            for each in names:
                model.set_submodule(each, _averaged(norms[each], seen[each]).to(_device(model)))
            now = evaluate()
        finally:
            for each in names:
                model.set_submodule(each, norms[each])
        changed = float((now.rows["top1"] != whole.rows["top1"]).mean())
        return SurgeryCost(name, whole["top1"] - now["top1"], now["loss"] - whole["loss"], changed)

    names = [name for name, one in seen.items() if one.by_instance]
    each = [lost(name, [name]) for name in names]
    return whole, each, lost("all of them", names) if names else None


def _averaged(norm: Norm, seen: LayerProbe) -> Averaged:
    dtype = next((p.dtype for p in norm.parameters()), torch.float32)
    return Averaged(norm, seen.gamma.mean.to(dtype), seen.beta.mean.to(dtype))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
