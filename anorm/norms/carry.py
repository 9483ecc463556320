"""From ``nn.BatchNorm2d`` to a law: what carries over, how each law starts as BN, and whether it does."""

from __future__ import annotations

import copy
from functools import singledispatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.norms.attentive import ACTIVATIONS, AttentiveNorm
from anorm.norms.base import RunningNorm
from anorm.norms.build import set_sync
from anorm.norms.sparse_switchable import SparseSwitchableNorm
from anorm.norms.squeeze_excite import SqueezeExcite
from anorm.norms.switchable import SwitchableNorm

__all__ = ["carry", "compare", "start_as"]


@torch.no_grad()
def carry(old: nn.Module, new: nn.Module, given: set[str]) -> None:
    """Statistics, eps and momentum (but for those in ``given``) and affine of a BN into a new layer."""
    inner = new
    while (below := getattr(inner, "base", getattr(inner, "module", None))) is not None:
        inner = below
    for name in {"eps", "momentum"} - given:
        if hasattr(inner, name):
            setattr(inner, name, getattr(old, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        mine, theirs = getattr(inner, name, None), getattr(old, name)
        if theirs is not None and mine is not None and mine.shape == theirs.shape:
            mine.copy_(theirs)
    if old.running_mean is None and isinstance(inner, RunningNorm):
        inner.eval_stats = "batch"
    ones = torch.ones(old.num_features, dtype=torch.float32)
    start_as(new, ones if old.weight is None else old.weight, 0 * ones if old.bias is None else old.bias)


@singledispatch
def start_as(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    """Set a new layer to act like BN with this affine, weight and bias (C), as far as its law allows.

    In general: its own ``weight`` and ``bias`` where they have that shape. Register a law's own way with
    ``start_as.register``.
    """
    layer = getattr(layer, "module", layer)
    for name, value in (("weight", weight), ("bias", bias)):
        own = getattr(layer, name, None)
        if isinstance(own, Tensor) and own.shape == value.shape:
            own.copy_(value)


@start_as.register
def _(layer: AttentiveNorm, weight: Tensor, bias: Tensor) -> None:
    """The attention's last affine layer at weight 0 gives every instance the same lambda (1/2 for hsigmoid),
    so gamma_k = gamma / sum_k lambda_k (2 gamma / K), and beta likewise.

    Where that layer is the FC (A1, SE), nothing would ever tell the K components apart: they differ by noise
    of the published size that cancels in the sum.
    """
    last = layer.attention.norm or layer.attention.fc
    last.weight.zero_()
    last.bias.fill_(1.0 if layer.attention.activation == "relu" else 0.0)
    lambdas = ACTIVATIONS[layer.attention.activation](last.bias[None].double())[0, : layer.k]
    for mixture, value in ((layer.weight, weight), (layer.bias, bias)):
        mixture.copy_((value / lambdas.sum().to(value)).expand_as(mixture))
        if last is layer.attention.fc and layer.k > 1:
            noise = 0.1 * torch.randn_like(mixture)
            mixture.add_(noise - noise.mean(0))
    start_as(layer.base, torch.ones_like(weight), torch.zeros_like(bias))


@start_as.register
def _(layer: SqueezeExcite, weight: Tensor, bias: Tensor) -> None:
    """Second FC at 0: every gate is sigmoid(0) = 1/2, made up for by the doubled affine below."""
    for parameter in layer.fc2.parameters():
        parameter.zero_()
    start_as(layer.base, 2 * weight, 2 * bias)


@start_as.register
def _(layer: SwitchableNorm, weight: Tensor, bias: Tensor) -> None:
    """All weight on BN: softmax(0, 0, 20) is one-hot in float32. The switches barely learn from there."""
    start_as.dispatch(nn.Module)(layer, weight, bias)
    if layer.use_bn:
        for control in (layer.mean_weight, layer.var_weight):
            control.copy_(control.new_tensor([0.0, 0.0, 20.0]))


@start_as.register
def _(layer: SparseSwitchableNorm, weight: Tensor, bias: Tensor) -> None:
    """The affine alone: weights that start one-hot would count as a choice that is made after one step."""
    start_as.dispatch(nn.Module)(layer, weight, bias)


def compare(old: nn.Module, new: nn.Module) -> tuple[str, str]:
    """("yes", "in evaluation", "no" or "not known", why): both layers on random features, in float64."""
    reference = next((t for t in (old.weight, old.running_mean) if t is not None), None)
    if reference is not None and reference.device.type == "meta":
        return "not known", "on the meta device"
    tensors = (old.running_mean, old.running_var, old.weight, old.bias)
    mean, var, weight, bias = (None if t is None else t.detach().double() for t in tensors)
    device = None if reference is None else reference.device
    noise = torch.randn(
        4, old.num_features, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    x = noise.to(device)
    if mean is not None:
        x = x * (var[:, None, None] + old.eps).sqrt() + mean[:, None, None]
    act = copy.deepcopy(getattr(old, "act", nn.Identity())).double()
    twin = copy.deepcopy(new).double()
    if hasattr(twin, "drop"):
        twin.drop = nn.Identity()
    set_sync(twin, False)
    deviation = []
    for training in (False, True):
        batch = training or mean is None
        stats = (None, None) if batch else (mean, var)
        with torch.no_grad():
            expected = act.train(training)(F.batch_norm(x, *stats, weight, bias, batch, 0.0, old.eps))
            found = twin.train(training)(x)
        deviation.append(float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)))
    dtype = torch.float32 if reference is None else reference.dtype
    tolerance = 32 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    if deviation[0] <= tolerance:
        return (
            ("yes", "")
            if deviation[1] <= tolerance
            else ("in evaluation", f"training: off by {deviation[1]:.0%}")
        )
    has_batch = any(isinstance(layer, (RunningNorm, nn.BatchNorm2d)) for layer in new.modules())
    why = "does not start as BN" if has_batch else "its statistics are not the batch's"
    return "no", f"{why}: off by {deviation[0]:.0%} on random features"
