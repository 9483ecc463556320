"""Switchable Normalization (Luo et al., ICLR 2019)."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from anorm.algebra import Affine, Moments, pool_batch, pool_groups, standardize, then, unbias
from anorm.norms.base import Choice, ParamNeeds, Parts, RunningNorm
from anorm.ops.fused import FusedLaw, RunningLaw, Tensors, shift_or_zeros

__all__ = ["NORMS", "SwitchableNorm", "fused_sn"]


class SwitchableNorm(RunningNorm):
    """y = weight * (x - sum_k w_k mu_k) / sqrt(sum_k w'_k var_k + eps) + bias, over k = IN, LN, BN (eq. 3).

    w = softmax(mean_weight) and w' = softmax(var_weight), 3 + 3 scalars a layer, initialised to ones (1/3 each).

    The defaults are what the official code computes: the instance variance is the unbiased one (guarded on 1x1 maps,
    where the official code gives NaN), and the LN and BN variances are pooled from it; ``running_var`` starts at 0,
    tracks the pooled variance as it is, and momentum 0.1 is the official "keep 0.9". Sums of squares are centred
    rather than E[x^2] - E[x]^2, which is the same number without the cancellation.

    Args:
        channels: C.
        act: activation after the norm, or None.
        eps: added to the mixed variance.
        momentum: weight of the new batch in the running statistics; None is the cumulative average, the paper's
            preferred evaluation ("batch average").
        use_bn: False drops the BN branch and the buffers (the official setting for one image a GPU).
        variance: "unbiased" (official code) or "biased" (the paper's equation 2).
        affine: learn weight and bias (C).
    """

    def __init__(
        self,
        channels: int,
        act: str | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        use_bn: bool = True,
        variance: str = "unbiased",
        affine: bool = True,
    ) -> None:
        super().__init__(channels, act, eps, momentum, initial_var=0.0, unbiased=False)
        if variance not in ("unbiased", "biased"):
            raise ValueError(f"variance={variance!r} is neither 'unbiased' nor 'biased'")
        self.variance = variance
        self.use_bn = use_bn
        self._make_affine(affine)
        branches = 3 if use_bn else 2
        self.mean_weight = nn.Parameter(torch.ones(branches))
        self.var_weight = nn.Parameter(torch.ones(branches))
        if use_bn:
            self._make_buffers()
        else:
            self._make_no_buffers()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.mean_weight)
        nn.init.ones_(self.var_weight)

    @torch.no_grad()
    def start_as(self, weight: Tensor, bias: Tensor) -> None:
        """All weight on BN: softmax(0, 0, 20) is one-hot in float32. The switches barely learn from there."""
        super().start_as(weight, bias)
        if self.use_bn:
            for control in (self.mean_weight, self.var_weight):
                control.copy_(control.new_tensor([0.0, 0.0, 20.0]))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Importance weights of the means and of the variances, in the order IN, LN[, BN]."""
        return tuple(_at_least_float32(w).softmax(0) for w in (self.mean_weight, self.var_weight))

    def parts(self, moments: Moments) -> Parts:
        weights, names = self.weights(), ("IN", "LN", "BN")[: len(self.mean_weight)]
        shares = dict(zip(("means", "variances"), (Choice("shares", w, names) for w in weights), strict=True))
        return Parts(self._standardized(moments, *weights), self.weight, self.bias, shares)

    def fused(self, x: Tensor) -> FusedLaw | RunningLaw | None:
        if type(self) is not SwitchableNorm or not self.use_bn or x.numel() == 0:
            return None
        parameters = self.weight, self.bias, self.mean_weight, self.var_weight
        unbias = self._unbias(x.shape[2] * x.shape[3])
        if not self.from_batch:
            return running_sn(parameters, self.running_mean, self.running_var, unbias, self.epsilon)
        if self.sync or x.numel() <= self.channels:
            return None
        return fused_sn(parameters, unbias, self.epsilon, self.track if self.tracking else None)

    def _unbias(self, count: int) -> float:
        """Factor of an instance's variance over so many values."""
        return unbias(count) if self.variance == "unbiased" else 1.0

    def _standardized(self, moments: Moments, w_mean: Tensor, w_var: Tensor) -> Affine:
        instance = moments._replace(var=moments.var * self._unbias(moments.count))
        branches = [instance[:2], pool_groups(instance, 1)[:2]]
        if self.use_bn:
            branches.append(self.batch_statistics(instance))
        return _mixed(branches, w_mean, w_var, self.epsilon)

    def param_needs(self) -> dict[str, ParamNeeds]:
        control = {name: ParamNeeds("control") for name in ("mean_weight", "var_weight")}
        return super().param_needs() | control


def _at_least_float32(weight: Tensor) -> Tensor:
    """Shares that are rounded to a half-precision model's dtype do not sum to one."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _mixed(branches: list[tuple[Tensor, Tensor]], w_mean: Tensor, w_var: Tensor, eps: float) -> Affine:
    """Standardize with shares of the branches' means and variances."""
    mu = sum(w * mean for w, (mean, _) in zip(w_mean, branches, strict=True))
    sigma2 = sum(w * var for w, (_, var) in zip(w_var, branches, strict=True))
    return standardize(mu, sigma2, eps)


def fused_sn(parameters: Tensors, unbias: float, eps: float, track: Callable | None) -> FusedLaw:
    """SN over IN, LN and BN in one call each way.

    parameters: weight and bias (C) or None, the logits of the means' and of the variances' shares (3). unbias: factor
    of the instance's variance. ``track(mean, variance)``: of the batch.
    """

    def law(moments: Moments, p: Tensors) -> Affine:
        instance = moments._replace(var=moments.var * unbias)
        shares = (logits.to(moments.mean.dtype).softmax(0) for logits in p[2:])
        branches = [instance[:2], pool_groups(instance, 1)[:2], pool_batch(instance)[:2]]
        return then(_mixed(branches, *shares, eps), *p[:2])

    return FusedLaw(
        name="sn_coefficients",
        parameters=parameters,
        forward=lambda laws, mean, var, count, p: (
            *laws.sn_coefficients(mean, var, p[0], p[2], p[3], unbias, eps),
            var,
        ),
        affine=lambda saved, p: Affine(saved[0], saved[1], shift_or_zeros(p[1], saved[1])),
        backward=lambda laws, dscale, dshift, mean, saved, p, count: (
            mean,
            *laws.sn_coefficients_backward(dscale, dshift, mean, saved[-1], *saved[1:-1], count, unbias),
        ),
        law=law,
        track=None if track is None else lambda saved: track(saved[5], saved[6]),
    )


def running_sn(parameters: Tensors, mean: Tensor, var: Tensor, unbias: float, eps: float) -> RunningLaw:
    """SN over IN, LN and BN with running statistics of the batch, in one call; parameters as in ``fused_sn``."""
    weight, bias, *logits = parameters

    def coefficients(laws: ModuleType, m: Tensor, v: Tensor, count: int) -> Affine:
        centre, scale = laws.sn_running_coefficients(m, v, weight, *logits, mean, var, unbias, eps)
        return Affine(centre, scale, shift_or_zeros(bias, scale))

    return RunningLaw("sn_running_coefficients", coefficients)


NORMS = {"sn": SwitchableNorm}
