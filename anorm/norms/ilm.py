"""Instance-Level Meta Normalization (Jia, Chen and Chen, CVPR 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.algebra import Moments, pool_groups, standardize, unbias
from anorm.norms.base import Norm, ParamNeeds, Parts, checked_eps, fully_connected
from anorm.norms.group import resolve_groups

__all__ = ["NORMS", "InstanceLevelMetaNorm"]

KEY_GROUP = 16
"""Channels whose statistics make one key (published)."""


class InstanceLevelMetaNorm(Norm):
    """y = omega * x_hat + b, x_hat an instance's standardization, omega and b predicted from the instance.

    Keys are mean and variance of G groups of C/G channels, (N, G); a small network (a shared encoder, two
    decoders, no biases) makes of them, one value a group repeated for its channels,

        omega = sigmoid(D_w relu(U key_var)) + weight        b = tanh(D_b relu(U key_mean)) + bias

    so that the layer starts at a scale of about 1.5 (sigmoid(0) + 1), as the authors' code does;
    ``initial_weight=0.5`` starts it near 1. With decoders of zero it is its base norm with weight + 0.5.
    Statistics are the instance's in training and evaluation.

    Args:
        channels: C.
        act: activation after the norm, or None.
        base: how x_hat is standardized: "gn" (published), "ln" or "in".
        groups: of the base "gn": a number, or "auto": the largest divisor of C up to 32.
        key_group_size: channels of a key; "auto" is the largest divisor of C up to the published 16. (The
            authors' code builds only multiples of 32 channels; this rule is equal to theirs there and holds
            for every C.)
        hidden: width of the encoder; "auto" is the authors': G // 16 from G = 16 on ("gn") or 17 on ("ln",
            "in"), else 2.
        variance: of x_hat and of the keys: "unbiased" (authors' code; a cell of one value keeps 0, where the
            code gives NaN) or "biased", as in every other norm here.
        eps: added to the variance of x_hat.
        initial_weight: of ``weight``.

    State: ``weight``, ``bias`` (C); ``encoder.weight``, ``weight_decoder.weight``, ``bias_decoder.weight`` in
    torch's default initialisation. Raises ValueError when an explicit number does not divide C.
    """

    elsewhere = ("gn", {})

    def __init__(
        self,
        channels: int,
        act: str | None = None,
        base: str = "gn",
        groups: int | str = "auto",
        key_group_size: int | str = "auto",
        hidden: int | str = "auto",
        variance: str = "unbiased",
        eps: float = 1e-5,
        initial_weight: float = 1.0,
    ) -> None:
        super().__init__(channels, act)
        if base not in ("gn", "ln", "in"):
            raise ValueError(f"base={base!r} is none of gn, ln, in: ILM stands on statistics of the instance")
        if base != "gn" and groups != "auto":
            raise ValueError(f"groups={groups!r} is an option of base=gn, and the base is {base}")
        if variance not in ("unbiased", "biased"):
            raise ValueError(f"variance={variance!r} is neither 'unbiased' nor 'biased'")
        self.base, self.variance, self.eps = base, variance, checked_eps(eps)
        self.initial_weight = float(initial_weight)
        self.groups = {"gn": resolve_groups(groups, channels), "ln": 1, "in": channels}[base]
        self.keys = _number_of_keys(key_group_size, channels)
        if hidden == "auto":
            hidden = self.keys // 16 if self.keys >= (16 if base == "gn" else 17) else 2
        if not isinstance(hidden, int) or hidden < 1:
            raise ValueError(f"hidden={hidden!r} is neither auto nor a positive number")
        self.weight = nn.Parameter(torch.full((channels,), self.initial_weight))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.encoder = nn.Linear(self.keys, hidden, bias=False)
        self.weight_decoder = nn.Linear(hidden, self.keys, bias=False)
        self.bias_decoder = nn.Linear(hidden, self.keys, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, self.initial_weight)

    def parts(self, moments: Moments) -> Parts:
        mean, var = self._statistics(moments, self.groups)
        key_mean, key_var = self._statistics(moments, self.keys)
        omega = torch.sigmoid(self._decode(self.weight_decoder, key_var)) + self.weight
        b = torch.tanh(self._decode(self.bias_decoder, key_mean)) + self.bias
        return Parts(standardize(mean, var, self.eps), omega, b)

    def _statistics(self, moments: Moments, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of the groups, repeated for every channel (N, C)."""
        mean, var, count = pool_groups(moments, groups)
        return mean, var * unbias(count) if self.variance == "unbiased" else var

    def _decode(self, decoder: nn.Linear, key: Tensor) -> Tensor:
        size = self.channels // self.keys
        code = F.relu(fully_connected(self.encoder, key[:, ::size]))
        return fully_connected(decoder, code).repeat_interleave(size, 1)

    def zero_init(self) -> None:
        """Decoders 0 and weight = -1/2: omega = sigmoid(0) - 1/2 = 0 and b = bias."""
        nn.init.zeros_(self.weight_decoder.weight)
        nn.init.zeros_(self.bias_decoder.weight)
        nn.init.constant_(self.weight, -0.5)

    def param_needs(self) -> dict[str, ParamNeeds]:
        network = ("encoder.weight", "weight_decoder.weight", "bias_decoder.weight")
        return super().param_needs() | dict.fromkeys(network, ParamNeeds("attention"))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, base={self.base}, groups={self.groups}, keys={self.keys}"


def _number_of_keys(size: int | str, channels: int) -> int:
    if size == "auto":
        size = resolve_groups("auto", channels, at_most=KEY_GROUP)
    elif not isinstance(size, int) or size < 1 or channels % size:
        raise ValueError(f"key_group_size={size!r} does not divide {channels} channels; use auto")
    return channels // size


NORMS = {"ilm": InstanceLevelMetaNorm}
