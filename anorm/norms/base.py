"""What every normalization is: a law between moments and an affine map, and what it declares about itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.algebra import Affine, Moments, gate, pool_batch, then
from anorm.ops import normalize
from anorm.ops.activations import lookup
from anorm.ops.hot import HotLaw

__all__ = ["Choice", "Norm", "ParamNeeds", "Parts", "RunningNorm", "Site", "fully_connected"]

ROLES = ("stem", "reduce", "spatial", "expand", "shortcut", "transition", "final", "lateral", "output", "box", "mask")


@dataclass(frozen=True)
class Site:
    """Where a norm stands in a network; an architecture describes each of its norms with one.

    ``stage`` counts from 0 (the stem belongs to stage 0, the final norm to the last); ``role`` is one of ``ROLES``;
    ``block_norm`` is 1, 2, 3 within its block, 0 outside blocks; ``focus`` marks the place where the architecture's
    paper variant puts AN; ``last`` the block's last norm, before the residual add; ``act`` the activation that follows.
    """

    channels: int
    stage: int
    stages: int
    role: str
    block_norm: int = 0
    focus: bool = False
    last: bool = False
    act: str | None = None

    def __post_init__(self) -> None:
        assert self.role in ROLES, self.role
        assert 0 <= self.stage < self.stages, (self.stage, self.stages)


@dataclass(frozen=True)
class ParamNeeds:
    """What a parameter asks of the optimizer. ``role`` is what ``freeze`` and ``optim.decay_norm`` speak of."""

    role: str
    decay: bool = True
    lr_scale: float = 1.0
    clip: float | None = None


class Choice(NamedTuple):
    """Numbers by which a law weighs what it puts together, for a person to look at.

    ``kind`` is "mixture", weights (N, K) of K affine maps; "shares", parts of one over named alternatives, (K,); or
    "gates", a factor for each channel, (N, C) or (C,), or for the layer, (1,). ``limit`` is the largest possible value,
    None where there is none; the least is 0 then too.
    """

    kind: str
    values: Tensor
    names: tuple[str, ...] = ()
    limit: float | None = 1.0


class Parts(NamedTuple):
    """A law taken apart: it is ``then(standardized, gamma, beta)``; gamma and beta (C,), (N, C) or None.

    ``choices``: by name, what the law decided on the way.
    """

    standardized: Affine
    gamma: Tensor | None
    beta: Tensor | None
    choices: dict[str, Choice] = {}  # never written to


class Norm(nn.Module):
    """A normalization layer over (N, C, H, W): y = act(mask * N(x) + residual).

    A subclass is a law: ``law(moments)`` returns the affine map as a differentiable function of the moments, or
    ``parts(moments)`` returns it in its parts, and ``needs`` says which moments it reads. Everything else (passes,
    gradients, kernels, activation) is shared.

    Args:
        channels: C.
        act: activation after the norm (and after the residual), or None.
    """

    elsewhere: tuple[str, dict] = ("bn", {})
    """Name and options of the law for the sites where a placement does not put this one."""

    site: Site | None = None
    """Where the layer stands, once a placement has put it there."""

    def __init__(self, channels: int, act: str | None = None) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"{type(self).__name__} needs at least one channel, got {channels}")
        lookup(act)
        self.channels = channels
        self.act = act
        self.frozen = False

    @classmethod
    def at(cls, site: Site, **options) -> Norm:
        """The layer for a site of a network: where options given per stage are looked up.

        An option whose default depends on the site is an argument here, None for that default: a
        configuration then holds None and not what a layer by itself would take.
        """
        return cls(site.channels, act=site.act, **options)

    @classmethod
    def belongs(cls, site: Site) -> bool:
        """Whether the published placement of this law includes the site."""
        return True

    @property
    def learning(self) -> bool:
        """In training and not frozen: statistics of the batch are used and tracked."""
        return self.training and not self.frozen

    def needs(self) -> str:
        """The moments that ``law`` reads in the present mode: "none", "mean" or "mean_var"."""
        return "mean_var"

    def law(self, moments: Moments | None) -> Affine:
        """Moments -> coefficients (centre, scale, shift), each (C,) or (N, C)."""
        parts = self.parts(moments)
        if parts is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a law nor its parts")
        return then(*parts[:3])

    def parts(self, moments: Moments | None) -> Parts | None:
        """The law in its parts, also for tools that look inside; None where it does not tell them."""
        return None

    def forward(self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """act(mask * N(x) + residual); x and residual (N, C, H, W), mask (N, C) (a dropout of whole channels)."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__} of {self.channels} channels got a shape {tuple(x.shape)}"
            )
        if mask is None:
            return normalize(x, self.law, self.act, residual, self.needs(), self.hot(x))
        return normalize(x, lambda moments: gate(self.law(moments), mask), self.act, residual, self.needs())

    def hot(self, x: Tensor) -> HotLaw | None:
        """This law as the compiled backends compute it in one call, where they can for the present mode and x."""
        return None

    def zero_init(self) -> None:
        """Start as the zero function (the last norm of a residual branch: the block starts as its shortcut)."""
        nn.init.zeros_(self.weight)

    def param_needs(self) -> dict[str, ParamNeeds]:
        """Every parameter below this layer, by its name within it. The outermost layer's word counts."""
        return {name: ParamNeeds("norm") for name, _ in self.named_parameters()}

    def stat_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Running statistics, by name within this layer: what evaluation depends on and ranks must agree on."""
        for prefix, module in self.named_modules():
            if isinstance(module, RunningNorm):
                for name in module.tracked:
                    yield f"{prefix}.{name}" if prefix else name, getattr(module, name)

    def freeze_stats(self, frozen: bool = True) -> None:
        """Standardize with the running statistics in training too and leave them as they are (or undo that)."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.frozen = frozen

    def reset_stats(self) -> None:
        """Forget the running statistics."""
        for module in self.modules():
            if isinstance(module, RunningNorm):
                module.reset_running_stats()

    def after_step(self, progress: float) -> None:
        """Called after every optimizer step, before EMA, with the share of training done (0 to 1)."""

    def extra_repr(self) -> str:
        return f"{self.channels}" + (f", act={self.act}" if self.act else "")

    def _make_affine(self, affine: bool) -> None:
        """weight (C) = 1 and bias (C) = 0, or neither."""
        for name, value in (("weight", torch.ones), ("bias", torch.zeros)):
            self.register_parameter(name, nn.Parameter(value(self.channels)) if affine else None)


class RunningNorm(Norm):
    """A norm whose statistics include some taken over the batch, tracked for evaluation as in ``nn.BatchNorm2d``.

    running <- (1 - momentum) * running + momentum * batch, the variance unbiased when ``unbiased``; ``momentum=None``
    is the cumulative average (recalibration).

    Attributes:
        sync: pool over all processes, weighted by true counts.
        eval_stats: "running", or "batch" to standardize with the batch's own statistics in evaluation too.
    """

    tracked = ("running_mean", "running_var", "num_batches_tracked")

    def __init__(
        self,
        channels: int,
        act: str | None,
        eps: float,
        momentum: float | None,
        initial_var: float = 1.0,
        unbiased: bool = True,
    ) -> None:
        super().__init__(channels, act)
        self.eps = eps
        self.momentum = momentum
        self.initial_var = initial_var
        self.unbiased = unbiased
        self.sync = False
        self.eval_stats = "running"

    def _make_buffers(self) -> None:
        self.register_buffer("running_mean", torch.zeros(self.channels))
        self.register_buffer("running_var", torch.full((self.channels,), self.initial_var))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def reset_running_stats(self) -> None:
        if not self.tracked:
            return
        self.running_mean.zero_()
        self.running_var.fill_(self.initial_var)
        self.num_batches_tracked.zero_()

    @property
    def from_batch(self) -> bool:
        """Whether the present mode standardizes with the batch's statistics."""
        return self.learning or (self.eval_stats == "batch" and not self.frozen)

    def batch_statistics(self, moments: Moments | None) -> tuple[Tensor, Tensor]:
        """Mean and variance over the batch (C,): of this batch in training (tracked there), else the running ones."""
        if not self.from_batch:
            return self.running_mean, self.running_var
        # processes evaluate unequal numbers of batches
        pooled = pool_batch(moments, self.sync and self.learning)
        if self.learning and not isinstance(pooled.count, Tensor) and pooled.count == 1:
            raise ValueError(
                f"{type(self).__name__}({self.channels}) cannot train on one value per channel: use a batch of at "
                "least 2 per process (batch_size=2), or a norm without batch statistics (norm=gn, norm=an_gn; for "
                "AN over BN also norm.attention=a1)"
            )
        if self.learning and (isinstance(pooled.count, Tensor) or pooled.count > 0):
            var = pooled.var * (pooled.count / (pooled.count - 1)) if self.unbiased else pooled.var
            self.track(pooled.mean, var)
        return pooled.mean, pooled.var

    def track(self, mean: Tensor, var: Tensor) -> None:
        """Take a batch's statistics (C,) into the running ones."""
        mean, var = mean.detach(), var.detach()
        self.num_batches_tracked.add_(1)
        if self.momentum is None:
            rate = 1.0 / self.num_batches_tracked.to(self.running_mean.dtype)
        else:
            rate = self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(var.to(self.running_var.dtype), rate)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # checkpoints from before torch 0.4.1 have no counter; nn.BatchNorm2d fills it in too
        if self.tracked:
            state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(0, dtype=torch.long))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def fully_connected(layer: nn.Linear, x: Tensor) -> Tensor:
    """The layer in x's dtype: laws compute in float32 (float64 for float64) also in a half-precision model."""
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
