"""One public op: ``normalize``. Two passes over the feature map with a small function, the law, between them.

    moments(x) -> law -> act(scale * (x - centre) + shift [+ residual])

The equations and their backward are in README.md beside this file. Backends: ``reference`` (plain PyTorch, always
there), ``cpu`` (C++), ``triton`` (GPU); ``auto`` takes the fastest that works for a tensor's device.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from anorm.algebra import Affine, Moments
from anorm.ops import reference
from anorm.ops.activations import lookup
from anorm.ops.autograd import fixed_affine, moments_and_slots, slotted_affine
from anorm.ops.fused import FusedLaw, RunningLaw, forward, normalize_fused

__all__ = ["BACKENDS", "normalize", "resolve", "set_backend", "use_backend", "why_not"]

BACKENDS = ("auto", "reference", "cpu", "triton")
NEEDS = ("none", "mean", "mean_var")

_log = logging.getLogger(__name__)
_chosen = "auto"


def normalize(
    x: Tensor,
    law: Callable[[Moments | None], Affine],
    act: str | None = None,
    residual: Tensor | None = None,
    needs: str = "mean_var",
    fused: FusedLaw | RunningLaw | None = None,
) -> Tensor:
    """y = act(scale * (x - centre) + shift [+ residual]) with (centre, scale, shift) = law(moments of x).

    Args:
        x: feature map (N, C, H, W), any floating dtype, contiguous or channels_last (the result has its layout).
        law: differentiable function from ``Moments`` (mean and biased variance over H x W, (N, C), float32, float64
            for float64; count = H*W) to ``Affine`` (each coefficient (C,) or (N, C)). Runs with autocast off.
        act: None or a name of ``anorm.ops.activations.ACTIVATIONS``.
        residual: added before the activation; the shape of x.
        needs: "mean_var", "mean" (``var`` is None, the reduction reads x once for the mean alone) or "none" (the law
            gets None: no reduction pass runs, and backward is scale * dy).
        fused: the same law as the compiled backends compute it in one call, where they do (``anorm.ops.fused``).

    Backward is one reduction over (dy, x), the law's own backward on small tensors, and one elementwise pass.
    Gradients of gradients and forward-mode derivatives work (through the reference formulas), and so do torch.export,
    torch.jit.trace and both ONNX exporters. Raises ValueError for a shape, dtype or name that does not fit.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"expected a floating-point feature map (N, C, H, W), got {x.dtype} of shape {tuple(x.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"the residual's shape {tuple(residual.shape)} differs from the input's {tuple(x.shape)}"
        )
    if needs not in NEEDS:
        raise ValueError(f"needs={needs!r} is none of {', '.join(NEEDS)}")
    activation = lookup(act)
    inner = activation.name if activation.fused else "none"
    if residual is not None and residual.dtype != x.dtype:
        common = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(common), residual.to(common)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):  # meta knows no autocast
        with torch.autocast(x.device.type, enabled=False):
            y = _run(x, law, inner, residual, needs, fused)
    else:
        y = _run(x, law, inner, residual, needs, fused)
    return y if activation.fused else activation.function(y)


def _run(
    x: Tensor, law: Callable, act: str, residual: Tensor | None, needs: str, fused: FusedLaw | RunningLaw | None
) -> Tensor:
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or _forward_mode():
        return _plain(x, law, act, residual, needs)
    if not torch.compiler.is_compiling() and x.numel() == 0 and x.shape[0]:  # maps of no pixels are no instances
        none = (0, x.shape[1], 1, 1)
        residual = None if residual is None else residual.reshape(none)
        return _run(x.reshape(none), law, act, residual, needs, None).reshape(x.shape)
    backend = resolve(x.device.type)
    if _traced():
        fused = None
    elif fused is not None and not hasattr(backend.laws_for(x.dtype), fused.name):
        fused = None
    if isinstance(fused, FusedLaw):
        if fused.torchs is not None and residual is None and backend.prefers_torch(x):
            return lookup(act).function(fused.torchs(x))
        if torch.is_grad_enabled():
            return normalize_fused(x, fused, act, residual, backend)
        return forward(x, fused, act, residual, backend, fused.parameters)[0]
    if not torch.is_grad_enabled() and not _traced():
        return _without_gradient(x, law, act, residual, needs, backend, fused)
    if needs == "none":
        return fixed_affine(x, *_dense(law(None)), residual, act, backend)
    mask_from_x = act if residual is None else "none"
    mean, var, slots = moments_and_slots(x, needs == "mean_var", mask_from_x, backend)
    coefficients = _dense(law(Moments(mean, var, x.shape[2] * x.shape[3])))
    return slotted_affine(x, *coefficients, slots, residual, act, backend)


def _without_gradient(
    x: Tensor,
    law: Callable,
    act: str,
    residual: Tensor | None,
    needs: str,
    backend: ModuleType,
    running: RunningLaw | None,
) -> Tensor:
    """Two passes with the law between them, and no node of autograd's around either."""
    if needs == "none":
        return backend.affine(x, *_dense(law(None)), residual, act)
    mean, var = backend.moments(x, needs == "mean_var")
    count = x.shape[2] * x.shape[3]
    if running is None:
        coefficients = law(Moments(mean, var, count))
    else:
        coefficients = running.coefficients(backend.laws_for(x.dtype), mean, var, count)
    return backend.affine(x, *_dense(coefficients), residual, act)


def _traced() -> bool:
    """Whether torch.compile or torch.func looks into what is called: they take the law as it is written."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def _forward_mode() -> bool:
    """Whether tangents may travel with the tensors (jvp, jacfwd, hessian): kernels and bridge know none."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def _dense(affine: Affine) -> tuple[Tensor, ...]:
    """Kernels index coefficients as dense (C,) or (N, C) arrays."""
    return tuple(coefficient.contiguous() for coefficient in affine)


def _plain(x: Tensor, law: Callable, act: str, residual: Tensor | None, needs: str) -> Tensor:
    """The same formula in standard operators only, for torch.export, torch.jit.trace, ONNX and forward mode."""
    m = None
    if needs != "none":
        mean, var = reference.moments(x, needs == "mean_var")
        m = Moments(mean, var, x.shape[2] * x.shape[3])
    return reference.affine(x, *law(m), residual, act)


_modules: dict[str, ModuleType] = {"reference": reference}


def _module(name: str) -> ModuleType:
    if name not in _modules:
        _modules[name] = importlib.import_module(f"anorm.ops.{name}")
    return _modules[name]


@cache
def _fastest(device: str) -> str:
    """What "auto" means for a device; the choice and its reason are logged once."""
    name = {"cpu": "cpu", "cuda": "triton"}.get(device)
    if name is None:
        return "reference"
    reason = why_not(name)
    if reason is None:
        _log.info("backend for %s tensors: %s", device, name)
        return name
    _log.info("backend for %s tensors: reference (%s is not usable: %s)", device, name, reason)
    return "reference"


def _auto(device: str) -> str:
    """``_fastest``, which torch.compile calls while it traces, and keeps the answer."""
    return _fastest(device)


# What torch.compiler.assume_constant_result does; the function itself would import all of torch.compile with anorm.
_auto._dynamo_marked_constant = True


def why_not(name: str) -> str | None:
    """None where a backend ("reference", "cpu", "triton") can be used here, else the reason in words."""
    return _module(name).available()


def resolve(device: str) -> ModuleType:
    """The module that runs the passes for a device type ("cpu", "cuda") under the present choice."""
    return _modules[_auto(device) if _chosen == "auto" else _chosen]


def set_backend(name: str) -> None:
    """Choose the backend for everything that runs from now on.

    Raises ValueError for an unknown name, RuntimeError (with the reason) for one that cannot run here: a backend
    that was asked for by name is never replaced in silence.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; choose from {', '.join(BACKENDS)}")
    if name != "auto" and (reason := why_not(name)) is not None:
        raise RuntimeError(f"backend {name!r} cannot be used here: {reason}")
    _chosen = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """``set_backend`` for the length of a with block. A compiled layer follows it from torch 2.12 on."""
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)
