"""Mixup, CutMix and label smoothing: one mixed batch, one loss."""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F


class Target(NamedTuple):
    """labels (N,), their partners (N,) or None where nothing was mixed, and the weight of the labels, in [0, 1]."""

    labels: Tensor
    partners: Tensor | None
    weight: float


class Mixing:
    """Mixup (Zhang et al. 2018, section 2) and CutMix (Yun et al. 2019, section 3), with label smoothing.

        mixup:   x = lambda x + (1 - lambda) x[perm],                lambda ~ Beta(a, a), one a micro-batch
        CutMix:  x with a box of x[perm] of relative area 1 - lambda (lambda is then the true area left)
        loss     lambda L(y) + (1 - lambda) L(y[perm]),              L(y) = (1 - e) (-log p_y) + e mean_k(-log p_k)

    mixup, cutmix: the Beta parameters, 0 for none; with both, each micro-batch takes either with probability 1/2.
    label_smoothing: e, in [0, 1).
    """

    def __init__(
        self, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0, num_classes: int = 1000
    ):
        if mixup < 0 or cutmix < 0:
            raise ValueError(
                f"mixup={mixup} and cutmix={cutmix} are Beta parameters: give 0 (off) or a positive number"
            )
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be at least 1")
        self.mixup, self.cutmix, self.label_smoothing, self.num_classes = (
            mixup,
            cutmix,
            label_smoothing,
            num_classes,
        )

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def mix(self, images: Tensor, labels: Tensor, rng: torch.Generator) -> tuple[Tensor, Target]:
        """Return mixed images (the given ones when nothing is mixed) and their target. images (N,C,H,W) floating, labels (N,)
        on any device; rng a CPU generator, `stream(seed, "mix", step, j)`. Draws on the host; never waits for the device.
        """
        if not self.mixes:
            return images, Target(labels, None, 1.0)
        # numpy has a Beta distribution that takes a generator; torch's takes none
        draws = numpy.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
        use_cutmix = self.cutmix > 0 and (self.mixup == 0 or draws.random() < 0.5)
        alpha = self.cutmix if use_cutmix else self.mixup
        weight = float(draws.beta(alpha, alpha))
        partner = torch.randperm(len(images), generator=rng).to(images.device, non_blocking=True)
        if use_cutmix:
            top, bottom, left, right = _box(images.shape[2], images.shape[3], weight, draws)
            mixed = images.clone(memory_format=torch.preserve_format)
            mixed[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
            weight = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
        else:
            mixed = torch.lerp(images[partner], images, weight)
        return mixed, Target(labels, labels[partner], weight)

    def loss(self, logits: Tensor, target: Target) -> Tensor:
        """Return the mean over the micro-batch, in float32 at least. logits (N, num_classes)."""
        assert logits.shape[1] == self.num_classes, (logits.shape, self.num_classes)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, target.labels, label_smoothing=self.label_smoothing)
        if target.partners is None:
            return loss
        other = F.cross_entropy(logits, target.partners, label_smoothing=self.label_smoothing)
        return target.weight * loss + (1 - target.weight) * other


def _box(height: int, width: int, keep: float, draws: numpy.random.Generator) -> tuple[int, int, int, int]:
    """Return a box of relative area 1 - keep around a uniform centre, clipped to the image (top, bottom, left, right)."""
    half_height, half_width = height * (1 - keep) ** 0.5 / 2, width * (1 - keep) ** 0.5 / 2
    y, x = draws.integers(height), draws.integers(width)
    top, bottom = round(max(y - half_height, 0)), round(min(y + half_height, height))
    left, right = round(max(x - half_width, 0)), round(min(x + half_width, width))
    return top, bottom, left, right
