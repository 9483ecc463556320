"""Batch Normalization (Ioffe and Szegedy, 2015)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from anorm.algebra import Affine, Moments, pool_batch, standardize, then
from anorm.norms.base import Parts, RunningNorm
from anorm.ops.fused import FusedLaw, shift_or_zeros

__all__ = ["NORMS", "BatchNorm", "fused_bn"]


class BatchNorm(RunningNorm):
    """y = weight * (x - mu_c) / sqrt(var_c + eps) + bias, mu and var over (N, H, W).

    The biased variance standardizes, the unbiased one is tracked; names, defaults and state_dict are those of
    ``torch.nn.BatchNorm2d``. In evaluation (or frozen) the running statistics stand in, and no reduction pass runs.

    Args:
        channels: C.
        act: activation after the norm, or None.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics; None for their cumulative average.
        affine: learn weight and bias (C).

    Raises ValueError in training when a channel has a single value (N*H*W = 1).
    """

    plain = True

    def __init__(
        self,
        channels: int,
        act: str | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(channels, act, eps, momentum)
        self._make_affine(affine)
        self._make_buffers()

    def needs(self) -> str:
        return "mean_var" if self.from_batch else "none"

    def parts(self, moments: Moments | None) -> Parts:
        return Parts(standardize(*self.batch_statistics(moments), self.epsilon), self.weight, self.bias)

    def fused(self, x: Tensor) -> FusedLaw | None:
        if not self.from_batch or self.sync or x.numel() <= self.channels:
            return None
        return fused_bn(self.weight, self.bias, self.epsilon, self.track if self.tracking else None)


def fused_bn(weight: Tensor | None, bias: Tensor | None, eps: float, track: Callable | None) -> FusedLaw:
    """BN with the batch's statistics in one call each way; ``track(mean, unbiased variance)``."""
    return FusedLaw(
        name="bn_coefficients",
        parameters=(weight, bias),
        forward=lambda laws, mean, var, count, p: laws.bn_coefficients(mean, var, p[0], count, eps),
        affine=lambda saved, p: Affine(saved[0], saved[1], shift_or_zeros(p[1], saved[1])),
        backward=lambda laws, dscale, dshift, mean, saved, p, count: (
            saved[0],
            *laws.bn_coefficients_backward(dscale, dshift, saved[1], saved[2], count),
        ),
        law=lambda moments, p: then(standardize(*pool_batch(moments)[:2], eps), *p),
        track=None if track is None else lambda saved: track(saved[0], saved[3]),
    )


NORMS = {"bn": BatchNorm}
