"""Sparse Switchable Normalization (Shao et al., CVPR 2019): SN whose importance weights become one-hot."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from anorm.norms.base import Norm, ParamNeeds
from anorm.norms.switchable import SwitchableNorm

__all__ = ["NORMS", "SparseSwitchableNorm", "sparsemax", "sparsestmax"]

ONE_HOT = 1 - 1e-6
"""max - min of the weights from which a choice counts as made: one, less the rounding of float32."""

COINCIDE = 1e-6
"""Distance (float32 rounding again) below which a point is taken for the centre: it then has no direction."""


def sparsemax(z: Tensor) -> Tensor:
    """Euclidean projection of each row of z (..., K) on the simplex (Martins and Astudillo, 2016).

    p = max(z - tau, 0) with tau = (sum of the k largest - 1) / k and k the largest count with 1 + k z_(k)
    above that sum. Free of branches; the gradient is g - mean of g over the support.
    """
    ordered = z.sort(-1, descending=True).values
    above = ordered.cumsum(-1) - 1
    count = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
    k = (count * ordered > above).sum(-1, keepdim=True)
    return (z - above.gather(-1, k - 1) / k).clamp(min=0)


def sparsestmax(z: Tensor, radius: Tensor | float, centre: str = "support") -> Tensor:
    """Sparsemax pushed out of a ball of ``radius`` around the simplex's centre: (..., K) -> (..., K).

    With p = sparsemax(z), u the uniform point on the support of p: where |p - u| < r, p moves along p - u to
    the distance r; where it leaves the simplex it is projected back, on a face of smaller support u', and the
    rest of the distance, sqrt(r^2 - |u' - u|^2), is sought there. r = 0 is sparsemax; K candidates are
    one-hot from r = sqrt(1 - 1/K). Where p = u there is no direction to move in and p stays (the recursion
    divides 0 by 0).

    The recursion is at most K - 1 deep and a level leaves a settled point where it is: all levels run,
    without a branch on a value.

    Args:
        centre: from where the first distance is measured. "support" (authors' code): the uniform point on the
            support of sparsemax(z), with the whole radius; "simplex" (the paper's definition: the point of
            the simplex nearest to z among those at least r away from (1/K, ..., 1/K)). They differ where
            sparsemax itself drops a candidate: the code's weights are one-hot sooner.
    """
    p = sparsemax(z)
    u = _uniform_on_support(p) if centre == "support" else torch.full_like(p, 1 / p.shape[-1])
    squared = torch.as_tensor(radius, dtype=z.dtype, device=z.device).square()
    p = _push(p, u, squared)
    for _ in range(p.shape[-1] - 1):
        p = torch.where(p > 0, sparsemax(p), 0.0)  # tau >= 0 but for rounding: what is out stays out
        face = _uniform_on_support(p)
        squared = (squared - (face - u).square().sum(-1, keepdim=True)).clamp(min=0)
        u = face
        p = _push(p, u, squared)
    return p.clamp(0, 1)


def _uniform_on_support(p: Tensor) -> Tensor:
    support = (p > 0).to(p.dtype)
    return support / support.sum(-1, keepdim=True)


def _push(p: Tensor, u: Tensor, squared_radius: Tensor) -> Tensor:
    """p, or the point of the sphere around u in the direction of p where p lies inside."""
    offset = p - u
    squared = offset.square().sum(-1, keepdim=True)
    inside = (squared < squared_radius) & (squared > COINCIDE**2)
    stretch = (torch.where(inside, squared_radius, 1.0) / torch.where(inside, squared, 1.0)).sqrt()
    return torch.where(inside, u + stretch * offset, p)


class SparseSwitchableNorm(SwitchableNorm):
    """SN with SparsestMax(mean_weight; r) and SparsestMax(var_weight; r) as importance weights.

    The radius r is the share of training done, from 0 (sparsemax) to 1; from sqrt(2/3) on three candidates
    are one-hot and each layer is IN, LN or BN in its means and in its variances. A choice that is made is
    kept: its parameters become the one-hot vector and learn no more.

    The control parameters learn at a tenth of the rate, without weight decay, with a gradient norm of at most
    1 (the authors' code). Statistics are SN's, see there; the running ones follow slowly ("keep 0.997").

    Args:
        channels: C.
        act: activation after the norm, or None.
        eps: added to the mixed variance.
        momentum: weight of the new batch in the running statistics; None for their cumulative average.
        use_bn: False drops the BN branch and its buffers.
        variance: "unbiased" (authors' code) or "biased".
        affine: learn weight and bias (C).
        centre: "support" (authors' code) or "simplex" (the paper); see ``sparsestmax``.

    State beside SN's: ``radius`` (), and ``chosen`` (2), the index of the chosen branch for means and for
    variances, -1 while it is open.
    """

    def __init__(
        self,
        channels: int,
        act: str | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.003,
        use_bn: bool = True,
        variance: str = "unbiased",
        affine: bool = True,
        centre: str = "support",
    ) -> None:
        super().__init__(channels, act, eps, momentum, use_bn, variance, affine)
        if centre not in ("support", "simplex"):
            raise ValueError(f"centre={centre!r} is neither 'support' nor 'simplex'")
        self.centre = centre
        self.register_buffer("radius", torch.tensor(0.0))
        self.register_buffer("chosen", torch.tensor([-1, -1]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.radius.zero_()
        self.chosen.fill_(-1)

    def start_as(self, weight: Tensor, bias: Tensor) -> None:
        """The affine alone: weights that start one-hot would count as a choice that is made after one step."""
        Norm.start_as(self, weight, bias)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Importance weights of the means and of the variances, in the order IN, LN[, BN]."""
        z = torch.stack((self.mean_weight, self.var_weight))
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        sparse = sparsestmax(z, self.radius, self.centre)
        mean, var = torch.where(self._made(), self._one_hot(z), sparse)
        return mean, var

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Radius = progress; choices that have become one-hot are kept from now on."""
        self.radius.fill_(progress)
        weights = torch.stack(self.weights())
        settled = weights.amax(1) - weights.amin(1) >= ONE_HOT
        self.chosen.copy_(torch.where(settled, weights.argmax(1), self.chosen))
        made, one_hot = self._made(), self._one_hot(weights)
        for row, parameter in enumerate((self.mean_weight, self.var_weight)):
            parameter.copy_(torch.where(made[row], one_hot[row].to(parameter.dtype), parameter))

    def _made(self) -> Tensor:
        return (self.chosen >= 0)[:, None]

    def _one_hot(self, like: Tensor) -> Tensor:
        return F.one_hot(self.chosen.clamp(min=0), like.shape[1]).to(like.dtype)

    def param_needs(self) -> dict[str, ParamNeeds]:
        control = ParamNeeds("control", decay=False, lr_scale=0.1, clip=1.0)
        return super().param_needs() | dict.fromkeys(("mean_weight", "var_weight"), control)


NORMS = {"ssn": SparseSwitchableNorm}
