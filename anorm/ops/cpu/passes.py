"""The four passes on a CPU: operators of the C++ library (``reference.py`` defines the passes).

What lies between the passes has the statistics' dtype: float32, and float64 for float64 maps. Results are the same for
any number of threads. Operators are functional; their kernels live in a library that holds them for several
instruction sets and chooses when it is loaded, so one build serves every machine of its architecture.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anorm.ops.cpu.library import operator

__all__ = ["affine", "affine_backward", "moments", "moments_backward", "prefers_torch"]

SMALL = 64
"""H * W up to which ``prefers_torch`` holds."""

_ACTS = {"none": 0, "relu": 1, "relu6": 2}


def _map(x: Tensor) -> Tensor:
    """Shape, dtype and layout of a map made for x; of one that is not dense, as the kernels would make it dense."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def _cells(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


_moments = operator("moments(Tensor x) -> (Tensor mean, Tensor var)", lambda x: (_cells(x), _cells(x)))
_mean = operator("mean(Tensor x) -> Tensor", _cells)
_affine = operator(
    "affine(Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor? residual, int act) -> Tensor",
    lambda x, *_: _map(x),
)
_affine_backward = operator(
    "affine_backward(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, int act)"
    " -> (Tensor dscale, Tensor dshift)",
    lambda dy, x, *_: (_cells(x), _cells(x)),
)
_affine_backward_residual = operator(
    "affine_backward_residual(Tensor dy, Tensor x, Tensor centre, Tensor y, int act)"
    " -> (Tensor dscale, Tensor dshift, Tensor g)",
    lambda dy, x, *_: (_cells(x), _cells(x), _map(x)),
)
_moments_backward = operator(
    "moments_backward(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor? mean, Tensor? dvar2,"
    " Tensor? dmean1, int act) -> Tensor",
    lambda dy, x, *_: _map(x),
)


def prefers_torch(x: Tensor) -> bool:
    """Whether one function of torch, where a law has one, beats six calls here: small contiguous maps (benchmarks/).

    Its group_norm refuses single values; other dtypes were not measured.
    """
    small = 1 < x.shape[2] * x.shape[3] <= SMALL and x.numel() > 0
    return small and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()


# ---- the four passes -----------------------------------------------------------------------------------------------
# x (N, C, H, W): float32, float64, bfloat16 or float16; contiguous, channels_last, or else made so. Coefficients (C,)
# or (N, C) of any strides. dy, y and the residual: any strides. ValueError for a shape or dtype that does not fit.


def moments(x: Tensor, var: bool = True) -> tuple[Tensor, Tensor | None]:
    """(Eq. 1) Mean and biased variance over H x W, (N, C) each; the variance to 1e-6 up to a mean of 1e4 deviations."""
    return _moments(x) if var else (_mean(x), None)


def affine(
    x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Tensor:
    """(Eq. 2) y = act(scale * (x - centre) + shift [+ residual]), in x's dtype and layout; act: none, relu or relu6."""
    return _affine(x, centre, scale, shift, residual, _ACTS[act])


def affine_backward(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, y: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(Eq. 3, 4) (dscale, dshift, g): sums over H x W of g * (x - centre) and of g = dy * act'.

    Without y the mask is recomputed from x and g is None; with y (a residual was added before the activation) the
    mask is read off y, and g, the residual's gradient, is returned.
    """
    if y is None or act == "none":
        return *_affine_backward(dy, x, centre, scale, shift, _ACTS[act]), None
    return _affine_backward_residual(dy, x, centre, y, _ACTS[act])


def moments_backward(
    dy: Tensor,
    x: Tensor,
    centre: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    dvar2: Tensor | None,
    dmean1: Tensor | None,
    act: str,
) -> Tensor:
    """(Eq. 5) dx = scale * g + dvar2 * (x - mean) + dmean1, g = dy * act' with the mask recomputed from x.

    dvar2 may be None (then mean is not read), or dvar2 and dmean1 both. mean, dvar2, dmean1: (C,) or (N, C).
    """
    return _moments_backward(dy, x, centre, scale, shift, mean, dvar2, dmean1, _ACTS[act])
