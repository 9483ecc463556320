"""The same layers as one writes them from the papers with torch's modules, to measure against.

Each takes its values from a layer of this package, so that both compute the same function, and lists its
parameters in that layer's order. Statistics are tracked as nn.BatchNorm2d does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anorm.norms.attentive import AttentiveNorm
from anorm.norms.base import Norm, Site
from anorm.norms.batch import BatchNorm
from anorm.norms.group import GroupNorm
from anorm.norms.placement import Placement
from anorm.norms.squeeze_excite import SqueezeExcite
from anorm.norms.switchable import SwitchableNorm

__all__ = ["NaiveAN", "NaiveSE", "NaiveSN", "WithAct", "eager_bn", "naive", "networks"]


def _copy(own: nn.Parameter | Tensor, value: Tensor) -> None:
    with torch.no_grad():
        own.copy_(value.reshape(own.shape))


class WithAct(nn.Module):
    """A norm, then the residual, then ReLU, both in place: what people run today."""

    def __init__(self, norm: nn.Module, act: str | None) -> None:
        super().__init__()
        assert act in (None, "relu"), act
        self.norm, self.act = norm, act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        if residual is not None:
            y += residual
        return F.relu(y, inplace=True) if self.act else y


class NaiveAN(nn.Module):
    """AN over BN: batch norm without affine, then the mixture that the instance's moments choose."""

    def __init__(self, layer: AttentiveNorm) -> None:
        super().__init__()
        channels, k = layer.channels, layer.k
        self.base = nn.BatchNorm2d(channels, affine=False)
        self.weight, self.bias = (
            nn.Parameter(layer.weight.detach().clone()),
            nn.Parameter(layer.bias.detach().clone()),
        )
        self.fc, self.norm = nn.Conv2d(channels, k, 1, bias=False), nn.BatchNorm2d(k)
        _copy(self.fc.weight, layer.attention.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        mean = F.adaptive_avg_pool2d(x, 1)
        var = torch.var(x, dim=(2, 3), keepdim=True)
        a = self.norm(self.fc((mean * (var + 1e-3).rsqrt()).to(self.fc.weight.dtype)))
        gates = (F.relu6(a + 3) / 6).flatten(1)
        gamma, beta = (gates @ self.weight)[..., None, None], (gates @ self.bias)[..., None, None]
        return gamma.to(x.dtype) * y + beta.to(x.dtype)


class NaiveSE(nn.Module):
    """Batch norm, then squeeze and excitation on its output."""

    def __init__(self, layer: SqueezeExcite) -> None:
        super().__init__()
        hidden, channels = layer.fc1.weight.shape
        self.norm = nn.BatchNorm2d(channels)
        self.fc1, self.fc2 = (
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.Conv2d(hidden, channels, 1, bias=False),
        )
        _copy(self.fc1.weight, layer.fc1.weight)
        _copy(self.fc2.weight, layer.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        squeezed = F.adaptive_avg_pool2d(y, 1).to(self.fc1.weight.dtype)
        return y * torch.sigmoid(self.fc2(F.relu(self.fc1(squeezed)))).to(y.dtype)


class NaiveSN(nn.Module):
    """Switchable norm from torch.mean and torch.var, centred."""

    def __init__(self, layer: SwitchableNorm) -> None:
        super().__init__()
        channels = layer.channels
        self.eps, self.momentum = layer.epsilon, layer.momentum
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.mean_weight, self.var_weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        mean_in, var_in = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True)
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = var_in.mean(1, keepdim=True) + (mean_in - mean_ln).square().mean(1, keepdim=True)
        mean_bn = mean_in.mean(0, keepdim=True)
        var_bn = var_in.mean(0, keepdim=True) + (mean_in - mean_bn).square().mean(0, keepdim=True)
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(mean_bn.flatten().to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(var_bn.flatten().to(self.running_var.dtype), self.momentum)
        else:
            mean_bn, var_bn = (t[None, :, None, None] for t in (self.running_mean, self.running_var))
        m, v = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mean = m[0] * mean_in + m[1] * mean_ln + m[2] * mean_bn
        var = v[0] * var_in + v[1] * var_ln + v[2] * var_bn
        y = (x - mean.to(x.dtype)) * (var + self.eps).rsqrt().to(x.dtype)
        return y * self.weight[:, None, None].to(x.dtype) + self.bias[:, None, None].to(x.dtype)


def naive(layer: Norm) -> WithAct:
    """The layer's function and activation from torch's modules, its values and order of parameters kept."""
    if isinstance(layer, AttentiveNorm):
        twin: nn.Module = NaiveAN(layer)
    elif isinstance(layer, SqueezeExcite):
        twin = NaiveSE(layer)
    elif isinstance(layer, SwitchableNorm):
        twin = NaiveSN(layer)
    elif isinstance(layer, BatchNorm):
        twin = nn.BatchNorm2d(layer.channels)
    elif isinstance(layer, GroupNorm):
        twin = nn.GroupNorm(layer.groups, layer.channels)
    else:
        name = type(layer).__name__
        raise ValueError(f"no naive form of {name}: add one to benchmarks/naive.py")
    return WithAct(twin, layer.act)


def eager_bn(site: Site) -> WithAct:
    return WithAct(nn.BatchNorm2d(site.channels), site.act)


def networks() -> dict[str, object]:
    """Label -> what makes each norm of a ResNet-50; AN at its 16 places, SE at its 16."""
    an, se = Placement("an"), Placement("se")
    return {
        "eager BN": eager_bn,
        "AN, eager BN elsewhere": lambda site: an(site) if site.focus else eager_bn(site),
        "naive AN, eager BN elsewhere": lambda site: naive(an(site)) if site.focus else eager_bn(site),
        "AN, everything fused": "an",
        "BN, everything fused": "bn",
        "GN": "gn",
        "eager GN": lambda site: WithAct(nn.GroupNorm(32, site.channels), site.act),
        "SE": "se",
        "eager SE": lambda site: naive(se(site)) if site.last else eager_bn(site),
    }
