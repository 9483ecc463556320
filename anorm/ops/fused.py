"""One autograd node for a layer whose law a compiled backend computes by itself, forward and backward.

Such a layer is six calls (moments, coefficients, affine; affine_backward, coefficients_backward, moments_backward)
instead of three nodes with the law's own small graph between them, which on small maps costs more than the passes. A
law that can be computed so says it by a ``FusedLaw``, which stands beside the law in ``norms/``; every other law goes
through ``autograd.py`` and needs nothing from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import Function

from anorm.algebra import Affine, Moments
from anorm.ops import reference
from anorm.ops.activations import masked

__all__ = ["FusedLaw", "RunningLaw", "Tensors", "forward", "normalize_fused", "shift_or_zeros"]

Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class FusedLaw:
    """A law as a backend's module of laws (``cpu/laws.py``, ``triton/laws.py``) helps to compute it.

    name: of the function of that module which forward calls; a backend that has none runs the law as it is written.
    parameters: the law's.
    forward: (laws, mean, var, count, parameters) -> saved, whatever backward and the three below need.
    affine: (saved, parameters) -> coefficients.
    backward: (laws, dscale, dshift, mean, saved, parameters, count) -> (centre, dvar2, dmean1, *parameter gradients),
        with the centre that dvar2 multiplies x's distance from: the coefficients' own for BN and GN, the instance's
        mean for AN and SN.
    law: (moments, parameters) -> coefficients: the same in PyTorch without side effects, for gradients of gradients.
    track: takes saved; running statistics.
    torchs: torch's own function for the same, x -> y before the activation, where there is one; a backend may prefer it.
    """

    name: str
    parameters: Tensors
    forward: Callable[[ModuleType, Tensor, Tensor, int, Tensors], Tensors]
    affine: Callable[[Tensors, Tensors], Affine]
    backward: Callable[[ModuleType, Tensor, Tensor, Tensor, Tensors, Tensors, int], Tensors]
    law: Callable[[Moments, Tensors], Affine]
    track: Callable[[Tensors], None] | None = None
    torchs: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class RunningLaw:
    """A law with running statistics, where no gradient is wanted, as a backend's module of laws computes it.

    name: of the function of that module that ``coefficients`` calls; a backend that has none runs the law as it is
    written. coefficients: (laws, mean, var, count) -> coefficients; var is None for a law that reads means alone.
    """

    name: str
    coefficients: Callable[[ModuleType, Tensor, Tensor | None, int], Affine]


def forward(
    x: Tensor, fused: FusedLaw, act: str, residual: Tensor | None, backend: ModuleType, parameters: Tensors
) -> tuple[Tensor, Tensor, Tensors]:
    """(y, the moments' mean, saved); running statistics take the batch in."""
    mean, var = backend.moments(x, True)
    saved = fused.forward(backend.laws_for(x.dtype), mean, var, x.shape[2] * x.shape[3], parameters)
    y = backend.affine(x, *fused.affine(saved, parameters), residual, act)
    if fused.track is not None:
        fused.track(saved)
    return y, mean, saved


def normalize_fused(x: Tensor, fused: FusedLaw, act: str, residual: Tensor | None, backend: ModuleType) -> Tensor:
    """``normalize`` by a backend that has laws for x's dtype; not under torch.func."""
    return _Fused.apply(x, residual, act, backend, fused, *fused.parameters)


class _Fused(Function):
    """Forward saves what it made on the way, and returns y alone: every further output of a node has its price.

    That is not open to a Function of torch.func, which sees only what goes in and comes out.
    """

    @staticmethod
    def forward(ctx, x, residual, act, backend, fused, *parameters):
        y, mean, saved = forward(x, fused, act, residual, backend, parameters)
        ctx.act, ctx.backend, ctx.fused = act, backend, fused
        ctx.has_residual, ctx.number = residual is not None, len(parameters)
        ctx.save_for_backward(x, y if ctx.has_residual and act != "none" else None, *parameters, mean, *saved)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:  # y took no part in the loss
            return (None,) * (5 + ctx.number)
        x, y, *rest = ctx.saved_tensors
        parameters, (mean, *saved) = rest[: ctx.number], rest[ctx.number :]
        if torch.is_grad_enabled():
            dx, g, to_parameters = _differentiable(ctx.fused, ctx.act, dy, x, y, parameters)
            return dx, g if ctx.has_residual else None, None, None, None, *to_parameters
        backend, fused, act, g = ctx.backend, ctx.fused, ctx.act, dy
        coefficients = fused.affine(saved, parameters)
        dscale, dshift, masked_g = backend.affine_backward(dy, x, *coefficients, y, act)
        centre, dvar2, dmean1, *to_parameters = fused.backward(
            backend.laws_for(x.dtype), dscale, dshift, mean, saved, parameters, x.shape[2] * x.shape[3]
        )
        if masked_g is not None:
            g, act = masked_g, "none"
        dx = None
        if ctx.needs_input_grad[0]:
            dx = backend.moments_backward(g, x, *coefficients, centre, dvar2, dmean1, act)
        to_parameters = [
            None if p is None else d if d.dtype == p.dtype else d.to(p.dtype)
            for p, d in zip(parameters, to_parameters, strict=True)
        ]
        return dx, g if ctx.has_residual else None, None, None, None, *to_parameters


def _differentiable(fused: FusedLaw, act: str, dy: Tensor, x: Tensor, y: Tensor | None, parameters: list):
    """(dx, g, parameter gradients) as differentiable functions: the definition, run again under autograd.

    On aliases of x and the parameters: their own history, in which the parameters may stand again, is autograd's part.
    """
    x, *parameters = (None if t is None else t.view_as(t) for t in (x, *parameters))
    z = reference.affine(
        x, *fused.law(Moments(*reference.moments(x), x.shape[2] * x.shape[3]), parameters), None, "none"
    )
    g = masked(act, dy, z if y is None else y)
    wanted = [t for t in (x, *parameters) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(z, wanted, g, create_graph=True) if wanted else ())
    dx, *rest = (next(found) if t is not None and t.requires_grad else None for t in (x, *parameters))
    return dx, g, rest


def shift_or_zeros(bias: Tensor | None, like: Tensor) -> Tensor:
    """The bias (C) as a shift in the statistics' dtype; zeros where there is none."""
    return like.new_zeros(like.shape[-1]) if bias is None else bias.to(like.dtype)
