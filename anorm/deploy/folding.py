"""A network for inference: what is constant in evaluation moves into the convolution before it.

A batch norm directly behind a convolution becomes part of it: w' = s w, b' = b + s (b_conv - c). A law that is
affine per instance but stands on running statistics (AN or SE over BN) gives its constant centre to the
convolution, b' = b_conv - c, and is then one multiplication and one addition with coefficients from the
instance's moments. The rest stays as it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from anorm.algebra import Moments
from anorm.norms.base import Norm, outermost_norms
from anorm.ops.activations import lookup

__all__ = ["FoldReport", "Folded", "PerInstance", "fold"]


@dataclass
class FoldReport:
    """Names of the norms by what became of them: all of it in a convolution, its centre alone, nothing."""

    folded: list[str] = field(default_factory=list)
    centred: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.folded)} norms folded, {len(self.centred)} centred there, {len(self.kept)} kept"


class Folded(nn.Module):
    """What remains of a folded norm: y = act(x [+ residual])."""

    def __init__(self, act: str | None) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return lookup(self.act).function(x if residual is None else x + residual)


class PerInstance(nn.Module):
    """y = act(scale_nc x + shift_nc [+ residual]), for an x that the convolution has centred already.

    ``centre`` (C) is what the convolution took off: the law's mean is that of x + centre.
    """

    def __init__(self, norm: Norm, centre: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("centre", centre)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        mean, var = x.mean((2, 3), keepdim=True), None
        if self.norm.needs() == "mean_var":
            d = x - mean
            var = (d * d).mean((2, 3))
        _, scale, shift = self.norm.law(Moments(mean.flatten(1) + self.centre, var, x.shape[2] * x.shape[3]))
        y = scale[..., None, None] * x + shift[..., None, None]
        return lookup(self.norm.act).function(y if residual is None else y + residual)


def fold(model: nn.Module) -> tuple[nn.Module, FoldReport]:
    """A copy of ``model`` in evaluation mode, folded, that computes the same function; and what was done.

    A norm is folded only into a convolution that runs once, whose output goes to the norm alone. A network
    whose control flow depends on the images cannot be followed and is returned whole, every norm kept.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    report = FoldReport()
    before = _convolutions_before(model)
    for name, norm in outermost_norms(model):
        conv = before.get(name)
        if conv is None:
            report.kept.append(name)
        elif norm.needs() == "none":
            _scale_into(conv, *norm.law(None))
            model.set_submodule(name, Folded(norm.act))
            report.folded.append(name)
        elif (centre := _constant_centre(norm)) is not None:
            _scale_into(conv, centre, None, None)
            model.set_submodule(name, PerInstance(norm, centre))
            report.centred.append(name)
        else:
            report.kept.append(name)
    return model, report


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, Norm) or super().is_leaf_module(module, name)


def _convolutions_before(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Norm's name -> the convolution that feeds it and nothing else, for modules that run exactly once."""
    try:
        graph = _Tracer().trace(model)
    except fx.proxy.TraceError:
        return {}
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(model.get_submodule(node.target), Norm):
            continue
        source = node.args[0]
        if (
            source.op == "call_module"
            and len(source.users) == 1
            and calls[source.target] == calls[node.target] == 1
        ):
            module = model.get_submodule(source.target)
            if isinstance(module, nn.Conv2d):
                found[node.target] = module
    return found


def _constant_centre(norm: Norm) -> Tensor | None:
    """The law's centre (C) where it does not depend on the moments, which is what autograd says of it."""
    mean = torch.zeros(2, norm.channels, requires_grad=True)
    var = torch.ones(2, norm.channels, requires_grad=True) if norm.needs() == "mean_var" else None
    centre = norm.law(Moments(mean, var, 4)).centre
    return None if centre.requires_grad or centre.dim() != 1 else centre.clone()


def _scale_into(conv: nn.Conv2d, centre: Tensor, scale: Tensor | None, shift: Tensor | None) -> None:
    """conv <- scale * (conv - centre) + shift, computed in float64."""
    weight, bias = conv.weight.double(), -centre.double()
    if conv.bias is not None:
        bias = bias + conv.bias.double()
    if scale is not None:
        weight, bias = weight * scale.double()[:, None, None, None], bias * scale.double() + shift.double()
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)
