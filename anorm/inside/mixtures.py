"""Statistics of mixture weights: how many components a layer really uses, which ones never, and whether
classes differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Mixture", "by_class", "entropy", "explained_by_class", "mixture"]

NEVER, ALWAYS = 0.001, 0.999
"""Parts of the limit below and above which a weight counts as closed and as open."""
NEARLY_ALL = 0.99
"""Part of the instances for which it must be so."""


@dataclass(frozen=True)
class Mixture:
    """k: components; entropy: of the normalized weights, in nats, mean over instances; effective: mean of
    exp(entropy), 1 to k; of_mean: effective number of the mean weights; dead, saturated: numbers of the
    components (from 0) that are closed, or fully open, for nearly all instances; varying: mean over
    components of the standard deviation over instances.
    """

    k: int
    entropy: float
    effective: float
    of_mean: float
    dead: tuple[int, ...]
    saturated: tuple[int, ...]
    varying: float


def entropy(weights: Tensor) -> Tensor:
    """(N, K), not negative -> (N,), in nats, of each row divided by its sum; nan where that is 0."""
    share = weights.double() / weights.double().sum(-1, keepdim=True)
    return -torch.special.xlogy(share, share).sum(-1)


def mixture(weights: Tensor, limit: float | None = 1.0) -> Mixture:
    """weights (N, K) of N instances. limit: the largest possible weight; without one nothing is saturated."""
    found = entropy(weights)
    found = found[found.isfinite()]
    closed = (weights <= NEVER * (limit or 1.0)).double().mean(0) >= NEARLY_ALL
    opened = torch.zeros_like(closed)
    if limit is not None:
        opened = (weights >= ALWAYS * limit).double().mean(0) >= NEARLY_ALL
    nothing = not len(found)
    return Mixture(
        k=weights.shape[1],
        entropy=0.0 if nothing else float(found.mean()),
        effective=0.0 if nothing else float(found.exp().mean()),
        of_mean=0.0 if nothing else float(entropy(weights.double().mean(0)).exp()),
        dead=tuple(closed.nonzero().flatten().tolist()),
        saturated=tuple(opened.nonzero().flatten().tolist()),
        varying=float(weights.double().std(0, correction=0).mean()),
    )


def by_class(weights: Tensor, labels: Tensor, classes: list[int]) -> Tensor:
    """Mean weights of each class, (classes, K)."""
    return torch.stack([weights[labels == k].double().mean(0) for k in classes])


def explained_by_class(weights: Tensor, labels: Tensor) -> float:
    """Part of the weights' variance over instances that lies between classes (0 to 1); 0 where nothing varies."""
    weights = weights.double()
    groups = [weights[labels == k] for k in labels.unique()]
    centre = weights.mean(0)
    between = sum(len(group) * (group.mean(0) - centre).square().sum() for group in groups)
    total = (weights - centre).square().sum()
    return float(between / total) if total > 1e-12 * max(1.0, float(weights.square().sum())) else 0.0
