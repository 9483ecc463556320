"""Any nn.Module as a norm: for layers outside the family (whitening, spatial attention, a user's own)."""

from __future__ import annotations

import importlib
import inspect

from torch import Tensor, nn

from anorm.norms.base import Norm
from anorm.ops.activations import lookup

__all__ = ["NORMS", "ModuleNorm"]


class ModuleNorm(Norm):
    """y = act(mask * target(x) + residual), with ``target`` any module from (N, C, H, W) to (N, C, H, W).

    Nothing is fused: the module runs as it is.

    Args:
        channels: C, the argument num_features, num_channels or channels of the module's constructor, else its first.
        act: activation after the sum, or None.
        target: dotted name of the class, e.g. ``torch.nn.BatchNorm2d``, or the class itself.
        options: further keyword arguments of the class.
    """

    def __init__(
        self, channels: int, act: str | None = None, *, target: str | type | None = None, **options
    ) -> None:
        super().__init__(channels, act)
        if target is None:
            raise ValueError("norm=module needs the class of the layer: norm.target=package.module.Class")
        if isinstance(target, str):
            target = _locate(target)
        try:
            self.module = _construct(target, channels, options)
        except TypeError as error:
            raise ValueError(f"norm.target: {target.__name__}({channels}, ...) failed: {error}") from error

    def check(self, x: Tensor) -> None:
        """The target has its own opinion."""

    def start_as(self, weight: Tensor, bias: Tensor) -> None:
        Norm.start_as(self.module, weight, bias)

    def reset_parameters(self) -> None:
        """All parameters are the target's."""

    def run(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        y = self.module(x)
        if y.shape != x.shape:
            raise ValueError(f"norm.target returned shape {tuple(y.shape)} for an input of {tuple(x.shape)}")
        if mask is not None:
            y = y * mask[:, :, None, None]
        if residual is not None:
            y = y + residual
        return lookup(self.act).function(y)

    def zero_init(self) -> None:
        if hasattr(self.module, "zero_init"):
            self.module.zero_init()
        elif isinstance(getattr(self.module, "weight", None), nn.Parameter):
            nn.init.zeros_(self.module.weight)
        else:
            raise ValueError(
                f"{type(self.module).__name__} has neither zero_init() nor a weight to start at zero"
            )


def _construct(target: type, channels: int, options: dict) -> nn.Module:
    named = [
        p for p in inspect.signature(target).parameters if p in ("num_features", "num_channels", "channels")
    ]
    return target(**{named[0]: channels}, **options) if named else target(channels, **options)


def _locate(dotted: str) -> type:
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"norm.target={dotted!r} cannot be imported ({error}); give package.module.Class"
        ) from error


NORMS = {"module": ModuleNorm}
