"""From ``nn.BatchNorm2d`` to a law: what carries over, how each law starts as BN, and whether it does."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from anorm.norms.base import Norm, RunningNorm
from anorm.norms.build import set_sync

__all__ = ["carry", "compare"]


@torch.no_grad()
def carry(old: nn.Module, new: nn.Module, given: set[str]) -> None:
    """Statistics, eps and momentum (but for those in ``given``) and affine of a BN into a new layer."""
    inner = new
    while isinstance(below := getattr(inner, "base", getattr(inner, "module", None)), nn.Module):
        inner = below
    for name in {"eps", "momentum"} - given:
        if isinstance(inner, RunningNorm) or hasattr(inner, name):
            setattr(inner, name, getattr(old, name))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        mine, theirs = getattr(inner, name, None), getattr(old, name)
        if theirs is not None and mine is not None and mine.shape == theirs.shape:
            mine.copy_(theirs)
    if old.running_mean is None and isinstance(inner, RunningNorm):
        inner.eval_stats = "batch"
    ones = torch.ones(old.num_features, dtype=torch.float32)
    start = new.start_as if isinstance(new, Norm) else partial(Norm.start_as, new)
    start(ones if old.weight is None else old.weight, 0 * ones if old.bias is None else old.bias)


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
