"""The mathematics that every layer here shares: moments, affine maps and how they combine. No layers, no kernels.

A layer sees a feature map x of shape (N, C, H, W) only through its moments (mean and biased variance of each instance
and channel over H x W) and acts on it only through an affine map per instance and channel. What lies between, the law,
is built from the functions below; everything is differentiable and works on (N, C) tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Affine", "Moments", "gate", "mix", "pool_batch", "pool_groups", "squeeze", "standardize", "then", "unbias"]


class Moments(NamedTuple):
    """Mean and biased variance of cells that hold ``count`` values each.

    ``mean`` and ``var`` have one shape: (N, C) for instances, (C,) once pooled over the batch. ``var`` is None where
    only the mean was asked for. ``count`` is H*W for instances, N*H*W after pooling over the batch (a 0-dimensional
    tensor where processes were pooled).
    """

    mean: Tensor
    var: Tensor | None
    count: int | Tensor


class Affine(NamedTuple):
    """y = scale * (x - centre) + shift, with coefficients of shape (C,) or (N, C) (one may differ from another).

    The centred form keeps its digits where |mean| is much larger than the standard deviation.
    """

    centre: Tensor
    scale: Tensor
    shift: Tensor


def _pool(mean: Tensor, var: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Law of total variance over cells of equal count; a sum of non-negative terms, so it never cancels."""
    mu = mean.mean(dim, keepdim=True)
    return mu.squeeze(dim), var.mean(dim) + (mean - mu).square().mean(dim)


def _nothing(mean: Tensor) -> tuple[Tensor, Tensor]:
    """Stands for the moments of an empty batch, which are used on no value: 0/0 must not reach gradients or others."""
    return mean.new_zeros(mean.shape[1:]), mean.new_ones(mean.shape[1:])


def pool_batch(moments: Moments, sync: bool = False) -> Moments:
    """Moments over the batch (what BN standardizes with): (N, C) -> (C,), count -> N * count.

    mu = E_n[m_n],  var = E_n[v_n] + E_n[(m_n - mu)^2].

    With ``sync`` the average runs over all processes of the default group, weighted by the number of values that
    each one really holds; the gradient flows through the all-reduce.
    """
    mean, var = _pool(moments.mean, moments.var, 0) if moments.mean.shape[0] else _nothing(moments.mean)
    count = moments.mean.shape[0] * moments.count
    if not (sync and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Moments(mean, var, count)
    own = mean.new_tensor(float(count))
    total = _AllReduceSum.apply(own)
    weight = own / total
    mu = _AllReduceSum.apply(weight * mean)
    return Moments(mu, _AllReduceSum.apply(weight * (var + (mean - mu).square())), total)


def pool_groups(moments: Moments, groups: int) -> Moments:
    """Moments over each instance's groups of C/groups consecutive channels, repeated for every channel: (N, C).

    ``groups=1`` is LN over (C, H, W); ``groups=C`` gives the moments back (IN).
    """
    n, c = moments.mean.shape
    if groups == c:
        return moments
    cells = (n, groups, c // groups)
    mean, var = _pool(moments.mean.view(cells), moments.var.view(cells), 2)
    spread = lambda t: t[:, :, None].expand(cells).reshape(n, c)
    return Moments(spread(mean), spread(var), moments.count * (c // groups))


def unbias(count: int | Tensor) -> float | Tensor:
    """n / (n - 1), from the biased variance of n values to the unbiased one; a single value keeps its 0.

    A tensor (values of several processes, sizes in a trace) gives a tensor.
    """
    if isinstance(count, Tensor):
        count = count if count.is_floating_point() else count.double()
        return count / (count - 1).clamp_min(1)
    return count / (count - 1) if count > 1 else 1.0


def standardize(mean: Tensor, var: Tensor, eps: float) -> Affine:
    """x -> (x - mean) / sqrt(var + eps)."""
    return Affine(mean, torch.rsqrt(var + eps), torch.zeros_like(mean))


def then(first: Affine, scale: Tensor | None, shift: Tensor | None) -> Affine:
    """y = scale * first(x) + shift; None stands for 1 and 0."""
    centre, s, b = first
    if scale is not None:
        s, b = scale * s, scale * b
    return Affine(centre, s, b if shift is None else b + shift)


def mix(first: Affine, second: Affine, weight: Tensor) -> Affine:
    """weight * first(x) + (1 - weight) * second(x), centred where ``first`` is centred."""
    centre, s, b = first
    offset = second.scale * (centre - second.centre) + second.shift
    return Affine(centre, weight * s + (1 - weight) * second.scale, weight * b + (1 - weight) * offset)


def gate(affine: Affine, weight: Tensor) -> Affine:
    """weight * affine(x): a channel gate (SE) or a dropout mask, (N, C), on top of a normalization."""
    return Affine(affine.centre, weight * affine.scale, weight * affine.shift)


def squeeze(affine: Affine, mean: Tensor) -> Tensor:
    """Mean over H x W of affine(x), exactly, from the mean of x: what SE's squeeze reads, without reading the map."""
    return affine.scale * (mean - affine.centre) + affine.shift


class _AllReduceSum(torch.autograd.Function):
    """Sum over processes; the gradient of a sum is the sum of the processes' gradients."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        out = tensor.clone()
        dist.all_reduce(out)
        return out

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        out = grad.clone()
        dist.all_reduce(out)
        return out
