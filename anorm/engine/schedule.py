"""The learning rate of every step. A schedule may remember losses; ``state_dict`` holds all that it remembers."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from anorm.config import settings

__all__ = ["Alrs", "Schedule", "Steps", "WarmupCosine", "create_schedule"]


class Schedule(ABC):
    """``schedule(step)``: the rate of optimizer step ``step``, counted from 0 over the whole run.

    ``epoch_ended`` is called once after each epoch's last step with the mean training loss of its steps, over all
    processes. ``state_dict`` is of plain numbers and is kept in the checkpoint.
    """

    @abstractmethod
    def __call__(self, step: int) -> float:
        """Return the rate of one step."""

    def epoch_ended(self, epoch: int, loss: float) -> None:
        """Learn of the mean loss of ``epoch``, counted from 0."""

    def state_dict(self) -> dict[str, float]:
        """Return what a resumed run needs besides the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict`` gave."""
        assert not state, state


@dataclass(frozen=True)
class WarmupCosine(Schedule):
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
        t = (step + 1) / self.steps_per_epoch
        if t < self.warmup_epochs:
            return self.peak * t / self.warmup_epochs
        phase = (t - self.warmup_epochs) / (self.epochs - self.warmup_epochs)
        return self.peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * phase)))


@dataclass(frozen=True)
class Steps(Schedule):
    """The peak times ``factor`` for every milestone (in epochs) that lies behind (He et al., 2016, section 3.4).

    With e = step / steps_per_epoch in epochs:

        rate = peak * factor ** (number of milestones <= e) * warm(step)

    A warm-up over W = warmup_steps iterations starts at the fraction f = warmup_from of the peak, as detection codes
    have it:  warm(step) = f + (1 - f) * step / W  while step < W, then 1. Without warmup_steps it is that of
    ``WarmupCosine``:  warm(step) = t / warmup_epochs  while t = (step + 1) / steps_per_epoch < warmup_epochs.
    """

    peak: float
    steps_per_epoch: int
    milestones: tuple[float, ...]
    factor: float = 0.1
    warmup_epochs: float = 0.0
    warmup_steps: int | None = None
    warmup_from: float = 0.0

    def __call__(self, step: int) -> float:
        # a milestone may be a broken number of epochs: of steps it is the nearest
        passed = sum(step >= round(milestone * self.steps_per_epoch) for milestone in self.milestones)
        rate = self.peak * self.factor**passed
        if self.warmup_steps is not None:
            fraction = self.warmup_from + (1 - self.warmup_from) * step / self.warmup_steps
            return rate * fraction if step < self.warmup_steps else rate
        t = (step + 1) / self.steps_per_epoch
        return rate * t / self.warmup_epochs if t < self.warmup_epochs else rate


@dataclass
class Alrs(Schedule):
    """Adaptive learning rate scheduler (Chen et al., ECCV Workshops 2022, "Bootstrap Generalization Ability from Loss
    Landscape Perspective"): the rate falls when the training loss does not.

    After each epoch, with L its mean training loss, L' that of the epoch before and d = L' - L:

        if d < tolerance and d / L' < tolerance:  every later rate is multiplied by factor
        L' <- L

    A loss that rises always lowers the rate; the first epoch never does. There is neither patience nor a least rate.
    The released code's last values are tolerance 0.01 and factor 0.97; earlier ones 0.02 and 0.9. During a linear
    warm-up, rate = peak * t / warmup_epochs as of ``WarmupCosine``, losses are not looked at. If a loss is not finite,
    the epoch is passed over: L' <- NaN would never lower the rate again.
    """

    peak: float
    steps_per_epoch: int
    tolerance: float = 0.01
    factor: float = 0.97
    warmup_epochs: float = 0.0
    scale: float = field(default=1.0, init=False)
    last_loss: float = field(default=math.inf, init=False)

    def __call__(self, step: int) -> float:
        t = (step + 1) / self.steps_per_epoch
        if t < self.warmup_epochs:
            return self.peak * t / self.warmup_epochs
        return self.peak * self.scale

    def epoch_ended(self, epoch: int, loss: float) -> None:
        if epoch < self.warmup_epochs or not math.isfinite(loss):
            return
        gained = self.last_loss - loss
        # gained < tolerance * L' is gained / L' < tolerance, also for a loss of 0 and for the first L', infinity
        if gained < self.tolerance and gained < self.tolerance * self.last_loss:
            self.scale *= self.factor
        self.last_loss = loss

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "last_loss": self.last_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.last_loss = state["scale"], state["last_loss"]


def create_schedule(asked: settings.Schedule, peak: float, epochs: int, steps_per_epoch: int) -> Schedule:
    """Return the schedule that ``asked.name`` names. peak: the rate that ``optim.lr`` comes to."""
    if asked.name == "cosine":
        return WarmupCosine(peak, epochs, steps_per_epoch, asked.warmup_epochs, asked.floor)
    given = {} if asked.factor is None else {"factor": asked.factor}
    if asked.name == "step":
        warmup = (asked.warmup_epochs, asked.warmup_steps, asked.warmup_from)
        return Steps(peak, steps_per_epoch, tuple(asked.milestones), given.get("factor", 0.1), *warmup)
    assert asked.name == "alrs", asked.name
    given |= {} if asked.tolerance is None else {"tolerance": asked.tolerance}
    return Alrs(peak, steps_per_epoch, warmup_epochs=asked.warmup_epochs, **given)
