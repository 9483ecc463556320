"""The bridge between the two passes: autograd runs the law between them, and one pass still makes the whole dx.

    mean, var, slots = _Moments(x)          reduction pass
    centre, scale, shift = law(mean, var)   ordinary autograd on small tensors
    y = _Affine(x, centre, ..., slots)      elementwise pass

Written naively, the gradient of x has two parts, one through the elementwise pass and one through the moments, that
autograd would write, read back and add. Instead ``_Moments`` returns, besides the moments, empty slots (zero stride,
no memory) that ``_Affine`` takes and ignores; in backward ``_Affine`` hands its coefficients and the incoming
gradient back as the slots' "gradients", so that ``_Moments.backward`` holds everything for one pass over (dy, x).
The slots are private to one pair of calls: two users of one slot would be summed. That is why ``normalize`` is the
only public function.

First order goes through the backend; with ``create_graph=True`` backward runs the reference formulas, which are
themselves differentiable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from anorm.ops import reference
from anorm.ops.activations import masked

__all__ = ["fixed_affine", "moments_and_slots", "slotted_affine"]

Slots = tuple[Tensor, Tensor, Tensor, Tensor]


def moments_and_slots(
    x: Tensor, var: bool, act: str, backend: ModuleType
) -> tuple[Tensor, Tensor | None, Slots]:
    """Moments of x, and the slots to be given to exactly one ``slotted_affine`` of the same x.

    ``act`` is the activation whose mask the backward must recompute from x; "none" where the gradient that comes
    back through the slots is masked already (a residual was added) or needs no mask.
    """
    mean, variance, *slots = _Moments.apply(x, var, act, backend)
    return mean, variance, tuple(slots)


def slotted_affine(
    x: Tensor,
    centre: Tensor,
    scale: Tensor,
    shift: Tensor,
    slots: Slots,
    residual: Tensor | None,
    act: str,
    backend: ModuleType,
) -> Tensor:
    return _Affine.apply(x, centre, scale, shift, residual, act, backend, *slots)


def fixed_affine(
    x: Tensor,
    centre: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    act: str,
    backend: ModuleType,
) -> Tensor:
    """Coefficients that do not depend on x: no reduction forward, and none backward unless they need gradients."""
    return _Affine.apply(x, centre, scale, shift, residual, act, backend, None, None, None, None)


class _InOrder(inspect.Signature):
    def bind(self, *args, **kwargs) -> SimpleNamespace:
        return SimpleNamespace(args=args, kwargs=kwargs, apply_defaults=lambda: None)


def in_order(forward: Callable) -> Callable:
    """A Function's forward that is always called with all its arguments in order.

    Before each call of a Function with ``setup_context`` torch derives forward's signature anew and binds the
    arguments to it, which takes longer than a pass over a small map.
    """
    forward.__signature__ = _InOrder(inspect.signature(forward).parameters.values())
    return forward


class _Moments(Function):
    generate_vmap_rule = True

    @staticmethod
    @in_order
    def forward(x: Tensor, var: bool, act: str, backend: ModuleType) -> tuple[Any, ...]:
        mean, variance = backend.moments(x, var)
        empty = mean.new_zeros(())
        slot = lambda: empty.expand(mean.shape)
        return mean, variance, slot(), slot(), slot(), x.new_zeros(()).expand(x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, _, ctx.act, ctx.backend = inputs
        ctx.save_for_backward(x, output[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dmean, dvar, centre, scale, shift, dy):
        x, mean = ctx.saved_tensors
        count = x.shape[2] * x.shape[3]
        act = ctx.act
        # the moments alone took part: second-order gradients reach them through the first backward
        if dy is None:
            act, dy = "none", x.new_zeros(()).expand(x.shape)
            centre = scale = shift = torch.zeros_like(mean)
        dmean1 = None if dmean is None else dmean / count
        dvar2 = None if dvar is None else dvar * (2.0 / count)
        if dvar2 is not None and dmean1 is None:
            dmean1 = torch.zeros_like(dvar2)
        backend = _first_order(ctx.backend)
        dx = backend.moments_backward(dy, x, centre, scale, shift, mean, dvar2, dmean1, act)
        return dx, None, None, None


class _Affine(Function):
    generate_vmap_rule = True

    @staticmethod
    @in_order
    def forward(x, centre, scale, shift, residual, act, backend, slot_c, slot_s, slot_b, slot_g):
        return backend.affine(x, centre, scale, shift, residual, act)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, centre, scale, shift, residual, ctx.act, ctx.backend, *slots = inputs
        ctx.slotted = slots[0] is not None
        ctx.residual = residual is not None
        # the mask comes from x where that is possible: y then need not be kept for this layer's sake
        ctx.save_for_backward(x, centre, scale, shift, output if ctx.residual and ctx.act != "none" else None)

    @staticmethod
    def backward(ctx, dy):
        x, centre, scale, shift, y = ctx.saved_tensors
        backend = _first_order(ctx.backend)
        if not ctx.slotted and not any(ctx.needs_input_grad[1:4]):
            return _fixed_backward(ctx, backend, dy)
        dscale, dshift, g = backend.affine_backward(dy, x, centre, scale, shift, y, ctx.act)
        masked_here = g is not None
        g = g if masked_here else dy
        to_residual = g if ctx.residual else None
        coefficients = (_like(-scale * dshift, centre), _like(dscale, scale), _like(dshift, shift))
        if ctx.slotted:
            cells = x.shape[:2]
            slots = centre.expand(cells), scale.expand(cells), shift.expand(cells), g
            return None, *coefficients, to_residual, None, None, *slots
        act = "none" if masked_here else ctx.act
        dx = None
        if ctx.needs_input_grad[0]:
            dx = backend.moments_backward(g, x, centre, scale, shift, None, None, None, act)
        return dx, *coefficients, to_residual, None, None, None, None, None, None


def _fixed_backward(ctx, backend: ModuleType, dy: Tensor):
    """dx = scale * g without any reduction: evaluation, frozen statistics with frozen coefficients."""
    x, centre, scale, shift, y = ctx.saved_tensors
    act, g = ctx.act, dy
    if y is not None:
        act, g = "none", masked(ctx.act, dy, y)
    dx = None
    if ctx.needs_input_grad[0]:
        dx = backend.moments_backward(g, x, centre, scale, shift, None, None, None, act)
    return dx, None, None, None, g if ctx.residual else None, None, None, None, None, None, None


def _first_order(backend: ModuleType) -> ModuleType:
    return reference if torch.is_grad_enabled() else backend


def _like(grad: Tensor, coefficient: Tensor) -> Tensor:
    """(N, C) -> the coefficient's own shape."""
    return grad.sum(0) if coefficient.dim() == 1 else grad
