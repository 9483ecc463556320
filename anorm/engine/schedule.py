"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, then half a cosine, a value for every iteration ("Attentive Normalization", section 4).

    With t = (step + 1) / steps_per_epoch in epochs, W = warmup_epochs and T = epochs:

        t < W:  peak * t / W
        else:   peak * (floor + (1 - floor) * (1 + cos(pi (t - W) / (T - W))) / 2)
    """

    peak: float
    epochs: int
    steps_per_epoch: int
    warmup_epochs: float = 5.0
    floor: float = 0.0

    def __call__(self, step: int) -> float:
        """The rate of optimizer step ``step``, counted from 0 over the whole run."""
        t = (step + 1) / self.steps_per_epoch
        if t < self.warmup_epochs:
            return self.peak * t / self.warmup_epochs
        phase = (t - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * phase)))
