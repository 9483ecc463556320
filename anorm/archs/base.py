"""What the architectures share: the type of their norm argument, their feature description, their initialisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from anorm.norms.base import Site

__all__ = ["FeatureInfo", "MakeNorm", "he_init"]

MakeNorm = Callable[[Site], nn.Module]
"""Called once for each norm of a network."""


class FeatureInfo(NamedTuple):
    """Channels of a stage's feature map and its stride with respect to the image."""

    channels: int
    stride: int


def he_init(model: nn.Module) -> None:
    """He initialisation of every convolution: normal, fan-out, gain for ReLU (He et al., ICCV 2015)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
