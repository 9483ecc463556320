"""Laws whose coefficients compiled backends make in one call each way: BN, GN (LN, IN), AN over BN, SE over BN, SN.

A layer of one of these that takes its statistics from its input is a single autograd node of six calls (moments,
coefficients, affine; affine_backward, coefficients_backward, moments_backward) instead of three nodes with the law's
own small graph between them, which on small maps costs more than the passes. SE adds its two matrices in PyTorch. Every
other law goes through ``autograd.py`` and needs nothing from here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from anorm.algebra import Affine, Moments, gate, pool_batch, pool_groups, squeeze, standardize, then
from anorm.ops import reference
from anorm.ops.activations import masked

__all__ = ["HotLaw", "hot_an", "hot_bn", "hot_gn", "hot_se", "hot_sn", "normalize_hot"]

Tensors = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class HotLaw:
    """How a compiled backend's module of laws helps to compute a law; ``made`` is what forward returned.

    name: of the function of that module which forward calls; a backend that has none runs the law as it is written.
    parameters: the law's.
    forward: (laws, mean, var, count, parameters) -> made.
    affine: (made, parameters) -> coefficients.
    backward: (laws, dscale, dshift, mean, made, parameters, count) -> (about, dvar2, dmean1, *parameter gradients).
    law: (moments, parameters) -> coefficients: the same in PyTorch without side effects, for gradients of gradients.
    track: takes made; running statistics.
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


def normalize_hot(x: Tensor, hot: HotLaw, act: str, residual: Tensor | None, backend: ModuleType) -> Tensor:
    """``normalize`` by a backend that has laws for x's dtype; not under torch.func."""
    return _Hot.apply(x, residual, act, backend, hot, *hot.parameters)


class _Hot(Function):
    """Forward saves what it made on the way, and returns y alone: every further output of a node has its price.

    That is not open to a Function of torch.func, which sees only what goes in and comes out.
    """

    @staticmethod
    def forward(ctx, x, residual, act, backend, hot, *parameters):
        mean, var = backend.moments(x, True)
        made = hot.forward(backend.laws(x.dtype), mean, var, x.shape[2] * x.shape[3], parameters)
        y = backend.affine(x, *hot.affine(made, parameters), residual, act)
        if hot.track is not None:
            hot.track(made)
        ctx.act, ctx.backend, ctx.hot = act, backend, hot
        ctx.has_residual, ctx.number = residual is not None, len(parameters)
        ctx.save_for_backward(x, y if ctx.has_residual and act != "none" else None, *parameters, mean, *made)
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:  # y took no part in the loss
            return (None,) * (5 + ctx.number)
        x, y, *rest = ctx.saved_tensors
        parameters, (mean, *made) = rest[: ctx.number], rest[ctx.number :]
        if torch.is_grad_enabled():
            dx, g, to_parameters = _differentiable(ctx.hot, ctx.act, dy, x, y, parameters)
            return dx, g if ctx.has_residual else None, None, None, None, *to_parameters
        backend, hot, act, g = ctx.backend, ctx.hot, ctx.act, dy
        coefficients = hot.affine(made, parameters)
        dscale, dshift, masked_g = backend.affine_backward(dy, x, *coefficients, y, act)
        about, dvar2, dmean1, *to_parameters = hot.backward(
            backend.laws(x.dtype), dscale, dshift, mean, made, parameters, x.shape[2] * x.shape[3]
        )
        if masked_g is not None:
            g, act = masked_g, "none"
        dx = None
        if ctx.needs_input_grad[0]:
            dx = backend.moments_backward(g, x, *coefficients, about, dvar2, dmean1, act)
        to_parameters = [
            None if p is None else d if d.dtype == p.dtype else d.to(p.dtype)
            for p, d in zip(parameters, to_parameters, strict=True)
        ]
        return dx, g if ctx.has_residual else None, None, None, None, *to_parameters


def _differentiable(hot: HotLaw, act: str, dy: Tensor, x: Tensor, y: Tensor | None, parameters: list):
    """(dx, g, parameter gradients) as differentiable functions: the definition, run again under autograd.

    On aliases of x and the parameters: their own history, in which the parameters may stand again, is autograd's part.
    """
    x, *parameters = (None if t is None else t.view_as(t) for t in (x, *parameters))
    z = reference.affine(
        x, *hot.law(Moments(*reference.moments(x), x.shape[2] * x.shape[3]), parameters), None, "none"
    )
    g = masked(act, dy, z if y is None else y)
    wanted = [t for t in (x, *parameters) if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(z, wanted, g, create_graph=True) if wanted else ())
    dx, *rest = (next(found) if t is not None and t.requires_grad else None for t in (x, *parameters))
    return dx, g, rest


def _shift(bias: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape[-1]) if bias is None else bias.to(like.dtype)


def hot_bn(weight: Tensor | None, bias: Tensor | None, eps: float, track: Callable | None) -> HotLaw:
    """Batch normalization with the batch's statistics; ``track(mean, unbiased variance)``."""
    return HotLaw(
        name="bn_coefficients",
        parameters=(weight, bias),
        forward=lambda laws, mean, var, count, p: laws.bn_coefficients(mean, var, p[0], count, eps),
        affine=lambda made, p: Affine(made[0], made[1], _shift(p[1], made[1])),
        backward=lambda laws, dscale, dshift, mean, made, p, count: (
            made[0],
            *laws.bn_coefficients_backward(dscale, dshift, made[1], made[2], count),
        ),
        law=lambda moments, p: then(standardize(*pool_batch(moments)[:2], eps), *p),
        track=None if track is None else lambda made: track(made[0], made[3]),
    )


def hot_gn(weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> HotLaw:
    """Group normalization."""
    return HotLaw(
        name="gn_coefficients",
        parameters=(weight, bias),
        forward=lambda laws, mean, var, count, p: laws.gn_coefficients(mean, var, p[0], groups, eps),
        affine=lambda made, p: Affine(made[0], made[1], _shift(p[1], made[1])),
        backward=lambda laws, dscale, dshift, mean, made, p, count: (
            made[0],
            *laws.gn_coefficients_backward(dscale, dshift, made[1], made[2], groups, count),
        ),
        law=lambda moments, p: then(standardize(*pool_groups(moments, groups)[:2], eps), *p),
        torchs=lambda x: F.group_norm(
            x, groups, *(None if p is None else p.float() for p in (weight, bias)), eps
        ),
    )


def hot_an(parameters: Tensors, eps: tuple[float, float, float], track: Callable | None) -> HotLaw:
    """Attentive normalization over BN in its published form.

    parameters: mixtures of scale and shift (K, C), FC (K, C), weight and bias of the attention norm (K). eps: of the
    base norm, the descriptor, the attention norm. ``track(mean, unbiased variance, mean, unbiased variance)``: of the
    base norm and of the attention norm.
    """
    return HotLaw(
        name="an_coefficients",
        parameters=parameters,
        forward=lambda laws, mean, var, count, p: laws.an_coefficients(mean, var, *p, count, *eps),
        affine=lambda made, p: Affine(*made[:3]),
        backward=lambda laws, dscale, dshift, mean, made, p, count: (
            mean,
            *laws.an_coefficients_backward(
                dscale, dshift, mean, *(made[i] for i in (0, 1, 3, 5, 6, 7, 10)), *p, count
            ),
        ),
        law=lambda moments, p: _an(moments, p, eps),
        track=None if track is None else lambda made: track(made[0], made[4], made[8], made[9]),
    )


def hot_se(base: HotLaw, layers: Tensors, eps: float) -> HotLaw:
    """Squeeze-and-excitation on batch normalization: the base's coefficients in one call, the gate in PyTorch.

    layers: weight (H, C) and bias (H) or None of the first, weight (C, H) and bias (C) or None of the second. eps: the
    base's, which has weight and bias.
    """
    return HotLaw(
        name=base.name,
        parameters=(*base.parameters, *layers),
        forward=lambda laws, mean, var, count, p: _gated(laws, mean, var, count, p, eps),
        affine=lambda made, p: Affine(made[0], *made[4:6]),
        backward=_gated_backward,
        law=lambda moments, p: _se(moments, p, eps),
        track=base.track,  # what it takes stands where the base's own coefficients would
    )


def _gated(
    laws: ModuleType, mean: Tensor, var: Tensor, count: int, parameters: Tensors, eps: float
) -> Tensors:
    weight, bias, *layers = (None if p is None else p.to(mean.dtype) for p in parameters)
    centre, base, rstd, unbiased = laws.bn_coefficients(mean, var, weight, count, eps)
    squeezed = torch.addcmul(bias, mean - centre, base)
    hidden = F.linear(squeezed, *layers[:2]).relu_()
    gates = F.linear(hidden, *layers[2:]).sigmoid_()
    return centre, base, rstd, unbiased, gates * base, gates * bias, squeezed, hidden, gates


def _gated_backward(
    laws: ModuleType,
    dscale: Tensor,
    dshift: Tensor,
    mean: Tensor,
    made: Tensors,
    parameters: Tensors,
    count: int,
) -> Tensors:
    centre, base, rstd, _, _, _, squeezed, hidden, gates = made
    _, bias, first, first_bias, second, second_bias = (
        None if p is None else p.to(mean.dtype) for p in parameters
    )
    dgates = torch.addcmul(dscale * base, dshift, bias)
    dlogits = torch.ops.aten.sigmoid_backward(dgates, gates)
    dhidden = torch.ops.aten.threshold_backward(dlogits @ second, hidden, 0)
    dsqueezed = dhidden @ first
    # the base norm sees both the map and its squeeze, which is its output at the instance's mean
    dvar2, dmean1, dweight, dbias = laws.bn_coefficients_backward(
        torch.addcmul(dscale * gates, dsqueezed, mean - centre),
        torch.addcmul(dsqueezed, dshift, gates),
        base,
        rstd,
        count,
    )
    dmean1 = torch.addcmul(dmean1, dsqueezed, base, value=1 / count)
    layers = (
        dhidden.t() @ squeezed, None if first_bias is None else dhidden.sum(0),
        dlogits.t() @ hidden, None if second_bias is None else dlogits.sum(0),
    )  # fmt: skip
    return centre, dvar2, dmean1, dweight, dbias, *layers


def _se(moments: Moments, parameters: Tensors, eps: float) -> Affine:
    """Squeeze-and-excitation on batch normalization, in PyTorch: eq. 2 and 3 of Hu et al. (2018)."""
    weight, bias, *layers = (None if p is None else p.to(moments.mean.dtype) for p in parameters)
    base = then(standardize(*pool_batch(moments)[:2], eps), weight, bias)
    hidden = F.relu(F.linear(squeeze(base, moments.mean), *layers[:2]))
    return gate(base, torch.sigmoid(F.linear(hidden, *layers[2:])))


def hot_sn(parameters: Tensors, unbias: float, eps: float, track: Callable | None) -> HotLaw:
    """Switchable normalization over IN, LN and BN.

    parameters: weight and bias (C) or None, the logits of the means' and of the variances' shares (3). unbias: factor
    of the instance's variance. ``track(mean, variance)``: of the batch.
    """
    return HotLaw(
        name="sn_coefficients",
        parameters=parameters,
        forward=lambda laws, mean, var, count, p: (
            *laws.sn_coefficients(mean, var, p[0], p[2], p[3], unbias, eps),
            var,
        ),
        affine=lambda made, p: Affine(made[0], made[1], _shift(p[1], made[1])),
        backward=lambda laws, dscale, dshift, mean, made, p, count: (
            mean,
            *laws.sn_coefficients_backward(dscale, dshift, mean, made[-1], *made[1:-1], count, unbias),
        ),
        law=lambda moments, p: _sn(moments, p, unbias, eps),
        track=None if track is None else lambda made: track(made[5], made[6]),
    )


def _sn(moments: Moments, parameters: Tensors, unbias: float, eps: float) -> Affine:
    """Switchable normalization over IN, LN and BN, in PyTorch: eq. 3 of Luo et al. (2019)."""
    weight, bias, *logits = parameters
    instance = moments._replace(var=moments.var * unbias)
    means, variances = zip(
        *(m[:2] for m in (instance, pool_groups(instance, 1), pool_batch(instance))), strict=True
    )
    mixed = (
        sum(share * t for share, t in zip(of.to(instance.mean.dtype).softmax(0), found, strict=True))
        for of, found in zip(logits, (means, variances), strict=True)
    )
    return then(standardize(*mixed, eps), weight, bias)


def _an(moments: Moments, parameters: Tensors, eps: tuple[float, float, float]) -> Affine:
    """Attentive normalization over BN in its published form, in PyTorch: eq. 8, 9, 11 of Li, Sun and Wu (2020)."""
    mean, var, n = moments
    mixed_weight, mixed_bias, fc, weight, bias = (p.to(mean.dtype) for p in parameters)
    descriptor = mean * torch.rsqrt(var * (n / (n - 1) if n > 1 else 1.0) + eps[1])
    a = F.linear(descriptor, fc)
    over_batch = pool_batch(Moments(a, torch.zeros_like(a), 1))
    gates = F.relu6(squeeze(then(standardize(*over_batch[:2], eps[2]), weight, bias), a) + 3.0) / 6.0
    return then(standardize(*pool_batch(moments)[:2], eps[0]), gates @ mixed_weight, gates @ mixed_bias)
