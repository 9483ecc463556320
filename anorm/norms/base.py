"""What every normalization is: a law between moments and an affine map, and what it declares about itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from anorm.algebra import Affine, Moments, gate, pool_batch, then, unbias
from anorm.ops import normalize, reference
from anorm.ops.activations import lookup
from anorm.ops.fused import FusedLaw, RunningLaw

__all__ = [
    "Choice",
    "Norm",
    "ParamNeeds",
    "Parts",
    "RunningNorm",
    "Site",
    "called_as_is",
    "checked_eps",
    "fully_connected",
    "outermost_norms",
    "without_autocast",
]

ROLES = ("stem", "reduce", "spatial", "expand", "shortcut", "transition", "final", "lateral", "output", "box", "mask")


@dataclass(frozen=True)
class Site:
    """Where a norm stands in a network; an architecture describes each of its norms with one.

    ``stage`` counts from 0 (the stem belongs to stage 0, the final norm to the last); ``role`` is one of ``ROLES``;
    ``block_norm`` is 1, 2, 3 within its block, 0 outside blocks; ``focus`` marks the place where the architecture's
    paper variant puts AN; ``text`` says whether the AN paper's text puts it there, where that is another place than the
    published networks' (None: the same); ``last`` the block's last norm, before the residual add; ``act`` the
    activation that follows.
    """

    channels: int
    stage: int
    stages: int
    role: str
    block_norm: int = 0
    focus: bool = False
    last: bool = False
    act: str | None = None
    text: bool | None = None

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

    beside_bn: tuple[str, ...] = ()
    """What the names of the state begin with that a batch norm lacks, in a law whose paper starts from a pretrained BN."""

    part = False
    """Whether the layer belongs to another law, which takes its ``law`` and does not call it."""

    def __init__(self, channels: int, act: str | None = None) -> None:
        nn.Module.__init__(self)  # not super(): a RunningNorm is one of torch's batch norms too
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
        """act(mask * N(x) + residual); x and residual (N, C, H, W), mask (N, C) (a dropout of whole channels).

        Given a ``torch.fx.Proxy``, the call of this module is what is recorded: a norm is a leaf for any tracer.
        """
        if not isinstance(x, Tensor):
            return self._recorded(x, residual, mask)
        if torch.jit.is_tracing():
            return self._traced(x, residual, mask)
        self.check(x)
        return self.run(x, residual, mask)

    def check(self, x: Tensor) -> None:
        """Raise ValueError for a map that the layer cannot take."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"{type(self).__name__} of {self.channels} channels got a shape {tuple(x.shape)}"
            )

    def run(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """What ``forward`` computes, for tensors that were checked."""
        if mask is None:
            return normalize(x, self.law, self.act, residual, self.needs(), self.fused(x))
        return normalize(x, lambda moments: gate(self.law(moments), mask), self.act, residual, self.needs())

    def _traced(self, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        """Under torch.jit.trace, where sizes are tensors: what is decided by them holds for every input of C channels
        that is not empty, so that the tracer's warnings would be wrong."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            self.check(x)
            return self.run(x, residual, mask)

    def __prepare_scriptable__(self):
        """What torch.jit.script calls first."""
        raise RuntimeError(
            f"torch.jit.script cannot compile {type(self).__name__}, whose law is ordinary Python: use "
            "torch.jit.trace(model, images) for TorchScript, torch.export.export or tools/export.py for a file that "
            "other programs load, torch.compile for speed"
        )

    def _recorded(self, x, *others):
        tracer = getattr(x, "tracer", None)
        if tracer is None:
            raise ValueError(f"{type(self).__name__} got a {type(x).__name__} where it takes a tensor (N, C, H, W)")
        while others and others[-1] is None:
            others = others[:-1]
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x, *others), {})

    def fused(self, x: Tensor) -> FusedLaw | RunningLaw | None:
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

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise this layer's own parameters and buffers anew; its children have their own such method.

        ``model.apply`` visits children first, so that a law that starts its networks in its own way has the last word.
        """
        if isinstance(getattr(self, "weight", None), Tensor):
            nn.init.ones_(self.weight)
        if isinstance(getattr(self, "bias", None), Tensor):
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def start_as(self, weight: Tensor, bias: Tensor) -> None:
        """Set a new layer to act like BN with this affine, weight and bias (C), as far as its law allows.

        In general: its own ``weight`` and ``bias`` where they have that shape.
        """
        for name, value in (("weight", weight), ("bias", bias)):
            own = getattr(self, name, None)
            if isinstance(own, Tensor) and own.shape == value.shape:
                own.copy_(value)

    def after_step(self, progress: float) -> None:
        """Called after every optimizer step, before EMA, with the share of training done (0 to 1)."""

    def extra_repr(self) -> str:
        return f"{self.channels}" + (f", act={self.act}" if self.act else "")

    def _make_affine(self, affine: bool) -> None:
        """weight (C) = 1 and bias (C) = 0, or neither."""
        self.affine = affine
        for name, value in (("weight", torch.ones), ("bias", torch.zeros)):
            self.register_parameter(name, nn.Parameter(value(self.channels)) if affine else None)


class RunningNorm(Norm, nn.BatchNorm2d):
    """A norm whose statistics include some taken over the batch, tracked for evaluation as in ``nn.BatchNorm2d``.

    running <- (1 - momentum) * running + momentum * batch, the variance unbiased when ``unbiased``; ``momentum=None``
    is the cumulative average (recalibration).

    The class is a ``torch.nn.BatchNorm2d``, since utilities look for those: whatever resets and averages running
    statistics (``torch.optim.swa_utils.update_bn``) works on every law. What rebuilds a batch norm as another layer, or
    folds it into a convolution, reads ``num_features`` and ``eps`` and knows BN's equation alone: these two raise
    ValueError, with what to do instead, where the result would be another function.

    Attributes:
        sync: pool over all processes, weighted by true counts.
        eval_stats: "running", or "batch" to standardize with the batch's own statistics in evaluation too.
        track_running_stats: as torch's; switched off later, training leaves the running statistics alone.
        epsilon: added to the variance, whatever the law (``eps`` is the same number, of a plain BN).
    """

    tracked = ("running_mean", "running_var", "num_batches_tracked")

    plain = False
    """Whether the law is BN's: (x - running_mean) / sqrt(running_var + eps) with an affine, in evaluation."""

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
        self.track_running_stats = True

    @property
    def eps(self) -> float:
        """``epsilon``, for utilities that fold a batch norm; see the class."""
        self._refuse(self._unlike_bn())
        return self.epsilon

    @eps.setter
    def eps(self, value: float) -> None:
        self.epsilon = checked_eps(value)

    @property
    def num_features(self) -> int:
        """``channels``, for utilities that rebuild a batch norm; see the class."""
        reason = self._unlike_bn()
        if reason is None and self.part:
            reason = "is part of another law, which does not call it"
        if reason is None and self.frozen:
            reason = "holds its statistics in training too, which would be forgotten"
        self._refuse(reason)
        return self.channels

    def __dir__(self) -> list[str]:
        """Without the two that may refuse: torch.jit.trace reads every attribute that a module lists."""
        return [name for name in super().__dir__() if name not in ("eps", "num_features")]

    def _unlike_bn(self) -> str | None:
        if not self.plain:
            return "does not compute batch normalization"
        if self.act is not None:
            return f"holds the {self.act} behind it, which would be lost"
        if self.eval_stats == "batch":
            return "takes each batch's own statistics in evaluation"
        return None

    def _refuse(self, reason: str | None) -> None:
        if reason is not None:
            raise ValueError(
                f"{type(self).__name__}({self.channels}) {reason}: it cannot be rebuilt as another batch norm, nor "
                "folded into a convolution by the names of its tensors. Instead of converting to SyncBatchNorm take "
                "anorm.set_sync(model), instead of freezing batch norms anorm.freeze_stats(model); tools/export.py "
                "folds what can be folded. (Its epsilon is .epsilon, its channels .channels.)"
            )

    def _make_buffers(self) -> None:
        self.register_buffer("running_mean", torch.zeros(self.channels))
        self.register_buffer("running_var", torch.full((self.channels,), self.initial_var))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def _make_no_buffers(self) -> None:
        self.tracked, self.track_running_stats = (), False
        for name in type(self).tracked:
            self.register_buffer(name, None)

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Forget the running statistics; frozen ones stay."""
        if not self.frozen:
            self._reset_buffers()

    def _reset_buffers(self) -> None:
        if self.tracked and self.running_mean is not None:
            self.running_mean.zero_()
            self.running_var.fill_(self.initial_var)
            self.num_batches_tracked.zero_()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self._reset_buffers()
        Norm.reset_parameters(self)

    @property
    def from_batch(self) -> bool:
        """Whether the present mode standardizes with the batch's statistics."""
        return not self.frozen and (
            self.training
            or self.eval_stats == "batch"
            or (not self.track_running_stats and bool(self.tracked) and self.running_mean is None)
        )

    @property
    def tracking(self) -> bool:
        """Whether the present mode takes the batch's statistics into the running ones."""
        return self.training and self.track_running_stats and not self.frozen

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
        if self.tracking and (isinstance(pooled.count, Tensor) or pooled.count > 0):
            var = pooled.var * unbias(pooled.count) if self.unbiased else pooled.var
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
        # a file without the counter (torch before 0.4.1; other programs): the layer's own stays, as in nn.BatchNorm2d
        own = self.num_batches_tracked if self.tracked else None
        if own is not None and own.device.type != "meta":
            state_dict.setdefault(prefix + "num_batches_tracked", own)
        elif own is not None:
            state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(0, dtype=torch.long))
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        affine = getattr(self, "affine", True)
        return (
            f"{super().extra_repr()}, eps={self.epsilon}, momentum={self.momentum}, affine={affine}, "
            f"track_running_stats={self.track_running_stats}"
        )


def checked_eps(eps: float) -> float:
    """``eps``; ValueError for a number below 0, whose square root would be NaN on a constant channel."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
        raise ValueError(f"eps={eps!r} must be a number of at least 0: it is added to a variance")
    return eps


def outermost_norms(model: nn.Module) -> list[tuple[str, Norm]]:
    """Norms that are no part of another law, with their names."""
    found: list[tuple[str, Norm]] = []
    for name, module in model.named_modules():
        if isinstance(module, Norm) and not any(name.startswith(f"{outer}.") or not outer for outer, _ in found):
            found.append((name, module))
    return found


def called_as_is(module: nn.Module, cls: type | None = None) -> bool:
    """Whether a call of ``module`` would run its class's forward and nothing else: neither hooks (its own, or those of
    all modules), nor a forward of the instance, nor, where ``cls`` is given, a class other than that (parametrizations,
    LoRA, quantization). Laws may then use its weights without calling it.
    """
    own = module.__dict__
    return not (
        (cls is not None and type(module) is not cls)
        or own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or _has_any_global_hook()
    )


def fully_connected(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer in x's dtype: laws compute in float32 (float64 for float64) also in a half-precision model.

    A layer that is more than an ``nn.Linear`` (``called_as_is``) is called, in its own dtype, on rows (N, features).
    """
    if called_as_is(layer, nn.Linear):
        return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))
    weight = getattr(layer, "weight", None)
    own = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else torch.float32
    y = layer(torch.atleast_2d(x).to(own)).to(x.dtype)
    return y[0] if x.dim() == 1 else y


def around(
    z: Tensor, scale: Tensor | None, shift: Tensor | None, act: str | None, residual: Tensor | None, mask: Tensor | None
) -> Tensor:
    """act(mask * (scale * z + shift) + residual) in plain PyTorch, for a law whose base norm had to be called: z is what
    it returned (N, C, H, W); scale, shift and mask (N, C) or None.
    """
    spread = lambda t: t[..., None, None]
    y = z if scale is None else z * spread(scale)
    y = y if shift is None else y + spread(shift)
    y = y if mask is None else y * spread(mask)
    y = y.to(z.dtype)
    return lookup(act).function(y if residual is None else y + residual)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context in which x's device computes in the precision of its operands. The meta device knows no autocast."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


def moments_of(x: Tensor, var: bool) -> Moments:
    """Moments of a map, differentiable, in plain PyTorch."""
    with without_autocast(x):
        return Moments(*reference.moments(x, var), x.shape[2] * x.shape[3])
