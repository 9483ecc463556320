"""The activations a norm can end with: one table.

``fused`` ones run inside the elementwise pass of every backend and their backward needs only the sign of the
pre-activation, which the kernels recompute; the others are applied to the pass's result by torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, ops

from anorm.words import nearest

__all__ = ["ACTIVATIONS", "Activation", "lookup", "masked"]


class Activation(NamedTuple):
    name: str
    function: Callable[[Tensor], Tensor]
    fused: bool


ACTIVATIONS = {
    entry.name: entry
    for entry in (
        Activation("none", lambda z: z, True),
        Activation("relu", F.relu, True),
        Activation("relu6", F.relu6, True),
        Activation("leaky_relu", F.leaky_relu, False),
        Activation("silu", F.silu, False),
        Activation("gelu", F.gelu, False),
        Activation("hardswish", F.hardswish, False),
        Activation("sigmoid", F.sigmoid, False),
        Activation("tanh", F.tanh, False),
    )
}


def lookup(act: str | None) -> Activation:
    """The table's entry for a name; None is "none"."""
    name = act or "none"
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}{nearest(name, ACTIVATIONS)}")
    return ACTIVATIONS[name]


def masked(act: str, grad: Tensor, z: Tensor) -> Tensor:
    """grad * act'(z) for the fused activations; z may be the activation's input or its output.

    A comparison with NaN is false, so that the gradient passes there.
    """
    if act == "relu":
        return ops.aten.threshold_backward(grad, z, 0)
    if act == "relu6":
        # torch's own drops it at a NaN where it is vectorised
        return torch.where((z <= 0) | (z >= 6), 0.0, grad)
    assert act == "none", act
    return grad
