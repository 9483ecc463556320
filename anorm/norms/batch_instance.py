"""Batch-Instance Normalization (Nam and Kim, NeurIPS 2018)."""

from __future__ import annotations

import torch
from torch import nn

from anorm.algebra import Moments, mix, standardize
from anorm.norms.base import Choice, ParamNeeds, Parts, RunningNorm

__all__ = ["NORMS", "BatchInstanceNorm"]


class BatchInstanceNorm(RunningNorm):
    """y = weight * (rho * x_hat_BN + (1 - rho) * x_hat_IN) + bias, a gate rho in [0, 1] for each channel.

    x_hat_BN has the statistics of the batch in training and the running ones in evaluation; x_hat_IN always
    has the instance's own (biased variance). rho = 1 is BN, rho = 0 is IN.

    The gates start at 1 and are clipped to [0, 1] after each optimizer step; they learn at ten times the rate
    of the others, without weight decay. An optimizer's momentum is not told of the clipping, as in the
    authors' code. On a 1x1 map the instance branch is 0 (the authors' code raises).

    Args:
        channels: C.
        act: activation after the norm, or None.
        eps: added to both variances.
        momentum: weight of the new batch in the running statistics; None for their cumulative average.
        affine: learn weight and bias (C), shared by the branches.

    State: ``weight``, ``bias``, ``running_*`` as in ``torch.nn.BatchNorm2d``, and ``gate`` (C).
    Raises ValueError in training when a channel has a single value (N*H*W = 1).
    """

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
        self.gate = nn.Parameter(torch.ones(channels))

    def parts(self, moments: Moments) -> Parts:
        batch = standardize(*self.batch_statistics(moments), self.epsilon)
        instance = standardize(moments.mean, moments.var, self.epsilon)
        gate = {"share of BN": Choice("gates", self.gate)}
        return Parts(mix(batch, instance, self.gate), self.weight, self.bias, gate)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.gate)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.gate.clamp_(0.0, 1.0)

    def param_needs(self) -> dict[str, ParamNeeds]:
        return super().param_needs() | {"gate": ParamNeeds("control", decay=False, lr_scale=10.0)}


NORMS = {"bin": BatchInstanceNorm}
