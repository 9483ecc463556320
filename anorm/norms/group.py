"""Group Normalization (Wu and He, 2018) and its two ends: Layer and Instance Normalization."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from anorm.algebra import Affine, Moments, pool_groups, standardize, then
from anorm.norms.base import Norm, Parts, checked_eps
from anorm.ops.fused import FusedLaw, shift_or_zeros

__all__ = ["NORMS", "GroupNorm", "InstanceNorm", "LayerNorm", "fused_gn", "resolve_groups"]


def resolve_groups(groups: int | str, channels: int, at_most: int = 32) -> int:
    """The number of groups: "auto" is the largest divisor of C up to 32; a number must divide C.

    Raises ValueError, which names the nearest that do.
    """
    if groups == "auto":
        return max(g for g in range(1, min(at_most, channels) + 1) if channels % g == 0)
    if not isinstance(groups, int) or groups < 1 or channels % groups:
        divisors = [d for d in range(1, channels + 1) if channels % d == 0]
        near = sorted(divisors, key=lambda d: abs(d - groups) if isinstance(groups, int) else d)[:4]
        raise ValueError(
            f"{channels} channels cannot be divided into groups={groups}; "
            f"use groups=auto or one of {', '.join(map(str, sorted(near)))}"
        )
    return groups


class GroupNorm(Norm):
    """y = weight_c * (x - mu_ng) / sqrt(var_ng + eps) + bias_c, mu and var over each instance's C/groups channels.

    Equal to ``torch.nn.GroupNorm``, with its state_dict. Independent of the batch, the same in training and evaluation.

    Args:
        channels: C.
        act: activation after the norm, or None.
        groups: number of groups (32 in the paper), or "auto": the largest divisor of C up to 32.
        eps: added to the variance.
        affine: learn weight and bias (C).

    Raises ValueError when an explicit number of groups does not divide C, and, as torch does, for a map of one instance
    whose groups hold one value each.
    """

    one_value = False
    """Whether a single value is standardized, to 0."""

    def __init__(
        self,
        channels: int,
        act: str | None = None,
        groups: int | str = "auto",
        eps: float = 1e-5,
        affine: bool = True,
    ) -> None:
        super().__init__(channels, act)
        self.groups = resolve_groups(groups, channels)
        self.eps = checked_eps(eps)
        self._make_affine(affine)

    def parts(self, moments: Moments) -> Parts:
        mean, var, _ = pool_groups(moments, self.groups)
        return Parts(standardize(mean, var, self.eps), self.weight, self.bias)

    def check(self, x: Tensor) -> None:
        super().check(x)
        if x.numel() == self.groups and not self.one_value:
            raise ValueError(
                f"{type(self).__name__}({self.channels}, groups={self.groups}) got a shape {tuple(x.shape)}, one value "
                "a group: nothing is left of it. Take fewer groups or larger maps"
            )

    def fused(self, x: Tensor) -> FusedLaw:
        return fused_gn(self.weight, self.bias, self.groups, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class LayerNorm(GroupNorm):
    """GN with one group: mu and var over (C, H, W) of each instance, an affine per channel.

    Layer Normalization (Ba et al., 2016) as Wu and He use it. (The ``LayerNorm2d`` of ConvNeXt, over C alone at each position, is another function.)
    """

    def __init__(self, channels: int, act: str | None = None, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(channels, act, 1, eps, affine)


class InstanceNorm(GroupNorm):
    """GN with C groups: each channel of each instance by itself.

    Instance Normalization (Ulyanov et al., 2016). Learns an affine by default, unlike ``torch.nn.InstanceNorm2d``; a 1x1 map gives ``bias`` (its variance is 0).
    """

    one_value = True

    def __init__(self, channels: int, act: str | None = None, eps: float = 1e-5, affine: bool = True) -> None:
        super().__init__(channels, act, channels, eps, affine)


def fused_gn(weight: Tensor | None, bias: Tensor | None, groups: int, eps: float) -> FusedLaw:
    """GN in one call each way."""
    return FusedLaw(
        name="gn_coefficients",
        parameters=(weight, bias),
        forward=lambda laws, mean, var, count, p: laws.gn_coefficients(mean, var, p[0], groups, eps),
        affine=lambda saved, p: Affine(saved[0], saved[1], shift_or_zeros(p[1], saved[1])),
        backward=lambda laws, dscale, dshift, mean, saved, p, count: (
            saved[0],
            *laws.gn_coefficients_backward(dscale, dshift, saved[1], saved[2], groups, count),
        ),
        law=lambda moments, p: then(standardize(*pool_groups(moments, groups)[:2], eps), *p),
        torchs=lambda x: F.group_norm(
            x, groups, *(None if p is None else p.float() for p in (weight, bias)), eps
        ),
    )


NORMS = {"gn": GroupNorm, "ln": LayerNorm, "in": InstanceNorm}
