"""Exponential moving average of a network: weights and float statistics."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Ema:
    """average <- decay * average + (1 - decay) * model, for parameters and floating buffers; integers are copied.

    The decay warms up as min(decay, (1 + steps) / (10 + steps)), so that the start is forgotten. A norm's own
    limits (``after_step``) hold for the average as well. torch's AveragedModel averages or copies all buffers alike.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.steps = decay, 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, progress: float) -> None:
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        self.steps += 1
        averages, values = [], []
        for average, value in zip(_state(self.model), _state(model), strict=True):
            if average.is_floating_point():
                averages.append(average)
                values.append(value.detach())
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, 1 - decay)
        after_step(self.model, progress)


def _state(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def after_step(model: nn.Module, progress: float) -> None:
    """Let norms do what they must after an optimizer step (limits of gates, radii of schedules). progress: from 0 to 1."""
    for module in model.modules():
        if hasattr(module, "after_step"):
            module.after_step(progress)
