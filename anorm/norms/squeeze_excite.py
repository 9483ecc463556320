"""Squeeze-and-Excitation directly on a normalization (Hu et al., CVPR 2018)."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.algebra import Affine, Moments, gate, pool_batch, squeeze, standardize, then
from anorm.norms.base import (
    Choice,
    Norm,
    ParamNeeds,
    Parts,
    Site,
    around,
    called_as_is,
    fully_connected,
    without_autocast,
)
from anorm.norms.batch import BatchNorm
from anorm.norms.build import build_base
from anorm.ops.fused import FusedLaw, RunningLaw, Tensors

__all__ = ["NORMS", "SqueezeExcite", "fused_se"]


class SqueezeExcite(Norm):
    """y = lambda_nc * B(x), lambda = sigmoid(W2 relu(W1 mean_hw B(x))), B the base norm with its affine (eq. 3-5).

    The squeeze of a normalized map is an exact function of x's means, so the gate costs no pass over the map.
    SE behind an activation (MobileNetV3, EfficientNet) is another layer and cannot be written this way.

    Args:
        channels: C.
        act: activation after the gate, or None.
        reduction: r of the bottleneck C -> C/r -> C. In a network the default is the AN paper's: 16 at a block's
            last norm and 4 elsewhere (Tables 2 and 3).
        base: the norm below, a name or {name: ..., options}.
        bias: biases in the two fully connected layers (the AN paper's code has none, Hu et al. have them).
    """

    def __init__(
        self,
        channels: int,
        act: str | None = None,
        reduction: int = 16,
        base: str | dict = "bn",
        bias: bool = False,
    ) -> None:
        super().__init__(channels, act)
        if reduction < 1:
            raise ValueError(f"reduction={reduction}: the bottleneck C/reduction needs a positive divisor")
        hidden = max(channels // reduction, 1)
        self.base = build_base(base, channels, affine=True)
        self.fc1 = nn.Linear(channels, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, channels, bias=bias)

    @classmethod
    def at(cls, site: Site, reduction: int | None = None, **options) -> SqueezeExcite:
        if reduction is None:
            reduction = 16 if site.last or not site.block_norm else 4
        return super().at(site, reduction=reduction, **options)

    @classmethod
    def belongs(cls, site: Site) -> bool:
        return site.last

    def needs(self) -> str:
        return "mean_var" if self.base.needs() == "mean_var" else "mean"

    def law(self, moments: Moments) -> Affine:
        normalized = self.base.law(moments)
        return gate(normalized, self.weights(squeeze(normalized, moments.mean)))

    def run(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        if called_as_is(self.base):
            return super().run(x, residual, mask)
        z = self.base(x)
        with without_autocast(x):
            means = z.to(torch.promote_types(z.dtype, torch.float32)).mean((2, 3))
            return around(z, self.weights(means), None, self.act, residual, mask)

    def fused(self, x: Tensor) -> FusedLaw | RunningLaw | None:
        base, fc1, fc2 = self.base, self.fc1, self.fc2
        if type(base) is not BatchNorm or not (called_as_is(fc1, nn.Linear) and called_as_is(fc2, nn.Linear)):
            return None
        layers = fc1.weight, fc1.bias, fc2.weight, fc2.bias
        if not base.from_batch and x.numel():
            statistics = base.running_mean, base.running_var
            return running_se(statistics, (base.weight, base.bias, *layers), base.epsilon)
        below = base.fused(x)
        return below and fused_se(below, layers, base.epsilon)

    def parts(self, moments: Moments) -> Parts | None:
        below = self.base.parts(moments)
        if below is None:
            return None
        weight = self.weights(squeeze(then(*below[:3]), moments.mean))
        gamma = weight if below.gamma is None else weight * below.gamma
        beta = None if below.beta is None else weight * below.beta
        choices = {"channel gates": Choice("gates", weight)} | below.choices
        return Parts(below.standardized, gamma, beta, choices)

    def weights(self, squeezed: Tensor) -> Tensor:
        """The gates (N, C) for squeezed features (N, C)."""
        hidden = F.relu(fully_connected(self.fc1, squeezed))
        return torch.sigmoid(fully_connected(self.fc2, hidden))

    @torch.no_grad()
    def start_as(self, weight: Tensor, bias: Tensor) -> None:
        """Second FC at 0: every gate is sigmoid(0) = 1/2, made up for by the doubled affine below."""
        for parameter in self.fc2.parameters():
            parameter.zero_()
        self.base.start_as(2 * weight, 2 * bias)

    def zero_init(self) -> None:
        self.base.zero_init()

    def param_needs(self) -> dict[str, ParamNeeds]:
        attention = {name: ParamNeeds("attention") for name, _ in self.named_parameters()}
        return attention | {f"base.{name}": needs for name, needs in self.base.param_needs().items()}


def fused_se(base: FusedLaw, layers: Tensors, eps: float) -> FusedLaw:
    """SE on BN: the base's coefficients in one call each way, the gate in PyTorch.

    layers: weight (H, C) and bias (H) or None of the first, weight (C, H) and bias (C) or None of the second. eps: the
    base's, which has weight and bias.
    """
    return FusedLaw(
        name=base.name,
        parameters=(*base.parameters, *layers),
        forward=lambda laws, mean, var, count, p: _forward(laws, mean, var, count, p, eps),
        affine=lambda saved, p: Affine(saved[0], *saved[4:6]),
        backward=_backward,
        law=lambda moments, p: _law(moments, p, eps),
        track=base.track,  # what it takes stands where the base's own coefficients would
    )


def _gates(squeezed: Tensor, layers: Tensors) -> tuple[Tensor, Tensor]:
    """(the hidden layer, lambda) of eq. 3."""
    hidden = F.relu(F.linear(squeezed, *layers[:2]))
    return hidden, torch.sigmoid(F.linear(hidden, *layers[2:]))


def _law(moments: Moments, parameters: Tensors, eps: float) -> Affine:
    weight, bias, *layers = (None if p is None else p.to(moments.mean.dtype) for p in parameters)
    base = then(standardize(*pool_batch(moments)[:2], eps), weight, bias)
    return gate(base, _gates(squeeze(base, moments.mean), layers)[1])


def _forward(
    laws: ModuleType, mean: Tensor, var: Tensor, count: int, parameters: Tensors, eps: float
) -> Tensors:
    weight, bias, *layers = (None if p is None else p.to(mean.dtype) for p in parameters)
    centre, base, rstd, unbiased = laws.bn_coefficients(mean, var, weight, count, eps)
    squeezed = torch.addcmul(bias, mean - centre, base)
    hidden, gates = _gates(squeezed, layers)
    return centre, base, rstd, unbiased, gates * base, gates * bias, squeezed, hidden, gates


def _backward(
    laws: ModuleType,
    dscale: Tensor,
    dshift: Tensor,
    mean: Tensor,
    saved: Tensors,
    parameters: Tensors,
    count: int,
) -> Tensors:
    centre, base, rstd, _, _, _, squeezed, hidden, gates = saved
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


def running_se(statistics: tuple[Tensor, Tensor], parameters: Tensors, eps: float) -> RunningLaw:
    """SE on BN with running statistics in one call; parameters: the base's weight and bias, then as in ``fused_se``."""
    return RunningLaw(
        "se_running_coefficients",
        lambda laws, mean, var, count: Affine(
            statistics[0], *laws.se_running_coefficients(mean, *statistics, *parameters, eps)
        ),
    )


NORMS = {"se": SqueezeExcite}
