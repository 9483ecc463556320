"""Batch Normalization (Ioffe and Szegedy, 2015)."""

from __future__ import annotations

from torch import Tensor

from anorm.algebra import Moments, standardize
from anorm.norms.base import Parts, RunningNorm
from anorm.ops.hot import HotLaw, hot_bn

__all__ = ["NORMS", "BatchNorm"]


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

    def hot(self, x: Tensor) -> HotLaw | None:
        if not self.from_batch or self.sync or x.numel() <= self.channels:
            return None
        return hot_bn(self.weight, self.bias, self.epsilon, self.track if self.tracking else None)


NORMS = {"bn": BatchNorm}
