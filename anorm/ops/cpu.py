"""The C++ backend for CPU tensors: the four passes, and the coefficients of BN, GN, AN over BN and SN in one call each.

The passes are the backend's interface (see ``reference.py`` for their definition). The coefficient operators replace a
law and its autograd for training mode, so that a layer is six calls:

    mean, var = moments(x)                                   forward
    centre, scale, ..., = an_coefficients(mean, var, ...)
    y = affine(x, centre, scale, shift, residual, act)
    dscale, dshift, g = affine_backward(dy, x, centre, scale, shift, y, act)          backward
    dvar2, dmean1, ... = an_coefficients_backward(dscale, dshift, ...)
    dx = moments_backward(dy or g, x, centre, scale, shift, about, dvar2, dmean1, act)

(``about`` is what dvar2 multiplies x's distance from: the centre for BN and GN, the instance's mean for AN and SN.)
Everything between the passes has the statistics' dtype (float32; float64 for float64 maps); parameters of another dtype are
converted, and parameter gradients come in the statistics' dtype and the parameter's shape. Results are the same for
any number of threads. Operators are functional, their kernels live in the compiled library (``cpu_build.py``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from anorm.ops import cpu_build

__all__ = [
    "ANCoefficients",
    "SNCoefficients",
    "affine",
    "affine_backward",
    "an_coefficients",
    "an_coefficients_backward",
    "available",
    "bn_coefficients",
    "bn_coefficients_backward",
    "build",
    "gn_coefficients",
    "gn_coefficients_backward",
    "instruction_set",
    "laws",
    "moments",
    "moments_backward",
    "prefers_torch",
    "sn_coefficients",
    "sn_coefficients_backward",
]

SMALL = 64
"""H * W up to which ``prefers_torch`` holds."""

_ACTS = {"none": 0, "relu": 1, "relu6": 2}

_log = logging.getLogger(__name__)

# ---- building ------------------------------------------------------------------------------------------------------


def build(rebuild: bool = False) -> str:
    """Compile the kernels if the cache does not hold them, load them, and return the library's path.

    Raises cpu_build.BuildError with the reason where that is not possible.
    """
    path = cpu_build.compiled_library(
        rebuild, lambda: _log.warning("compiling the C++ kernels, once (a minute or two)")
    )
    _load(str(path))
    return str(path)


@cache
def _load(path: str) -> None:
    torch.ops.load_library(path)


@cache
def available() -> str | None:
    """None if the kernels are loaded (built now if need be), else the reason in words. The answer is kept."""
    try:
        build()
    except (cpu_build.BuildError, OSError) as error:  # OSError: the loader refused the library
        return str(error)
    return None


def instruction_set() -> str:
    """The kernels in use: "avx512", "avx2" or "baseline" (ANORM_CPU_ISA may ask for a narrower one than there is)."""
    return torch.ops.anorm_cpu.instruction_set()


# ---- operators: schemas and shapes here, kernels in C++ ------------------------------------------------------------

_library = torch.library.Library("anorm_cpu", "DEF")
_library.define("instruction_set() -> str")


def _operator(schema: str, fake: Callable):
    """Define an operator whose CPU kernel the compiled library brings; its shape function is ``fake``."""
    name = _library.define(schema)
    torch.library.register_fake(f"anorm_cpu::{name}", fake, lib=_library)
    return getattr(torch.ops.anorm_cpu, name).default


def _map(x: Tensor) -> Tensor:
    """Shape, dtype and layout of a map made for x; of one that is not dense, as the kernels would make it dense."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def _cells(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _channels(cells: Tensor) -> Tensor:
    return cells.new_empty(cells.shape[1:])


def _dense(parameter: Tensor, cells: Tensor) -> Tensor:
    return torch.empty(parameter.shape, dtype=cells.dtype, device=cells.device)


_moments = _operator("moments(Tensor x) -> (Tensor mean, Tensor var)", lambda x: (_cells(x), _cells(x)))
_mean = _operator("mean(Tensor x) -> Tensor", _cells)
_affine = _operator(
    "affine(Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor? residual, int act) -> Tensor",
    lambda x, *_: _map(x),
)
_affine_backward = _operator(
    "affine_backward(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, int act)"
    " -> (Tensor dscale, Tensor dshift)",
    lambda dy, x, *_: (_cells(x), _cells(x)),
)
_affine_backward_residual = _operator(
    "affine_backward_residual(Tensor dy, Tensor x, Tensor centre, Tensor y, int act)"
    " -> (Tensor dscale, Tensor dshift, Tensor g)",
    lambda dy, x, *_: (_cells(x), _cells(x), _map(x)),
)
_moments_backward = _operator(
    "moments_backward(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor? mean, Tensor? dvar2,"
    " Tensor? dmean1, int act) -> Tensor",
    lambda dy, x, *_: _map(x),
)
_bn = _operator(
    "bn_coefficients(Tensor mean, Tensor var, Tensor? weight, int hw, float eps)"
    " -> (Tensor centre, Tensor scale, Tensor rstd, Tensor unbiased)",
    lambda mean, *_: tuple(_channels(mean) for _ in range(4)),
)
_bn_backward = _operator(
    "bn_coefficients_backward(Tensor dscale, Tensor dshift, Tensor scale, Tensor rstd, int hw)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dweight, Tensor dbias)",
    lambda dscale, *_: tuple(_channels(dscale) for _ in range(4)),
)
_gn = _operator(
    "gn_coefficients(Tensor mean, Tensor var, Tensor? weight, int groups, float eps)"
    " -> (Tensor centre, Tensor scale, Tensor rstd)",
    lambda mean, *_: tuple(_cells(mean) for _ in range(3)),
)
_gn_backward = _operator(
    "gn_coefficients_backward(Tensor dscale, Tensor dshift, Tensor scale, Tensor rstd, int groups, int hw)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dweight, Tensor dbias)",
    lambda dscale, *_: (_cells(dscale), _cells(dscale), _channels(dscale), _channels(dscale)),
)


def _an_fake(mean, var, mix_weight, mix_bias, fc, gain, offset, hw, eps, descriptor_eps, attention_eps):
    k, per_instance = gain.numel(), lambda: mean.new_empty(mean.shape[0], gain.numel())
    channels, cells = [_channels(mean) for _ in range(3)], [_cells(mean) for _ in range(3)]
    centre, rstd, unbiased = channels
    scale, shift, descriptor_scale = cells
    small = (mean.new_empty(k) for _ in range(3))
    return centre, scale, shift, rstd, unbiased, descriptor_scale, per_instance(), per_instance(), *small


def _an_backward_fake(dscale, dshift, mean, centre, scale, rstd, descriptor_scale, attention, standardized,
                      attention_rstd, mix_weight, mix_bias, fc, gain, offset, hw):  # fmt: skip
    parameters = (mix_weight, mix_bias, fc, gain, offset)
    return _cells(mean), _cells(mean), *(_dense(p, mean) for p in parameters)


_an = _operator(
    "an_coefficients(Tensor mean, Tensor var, Tensor mix_weight, Tensor mix_bias, Tensor fc, Tensor gain,"
    " Tensor offset, int hw, float eps, float descriptor_eps, float attention_eps)"
    " -> (Tensor centre, Tensor scale, Tensor shift, Tensor rstd, Tensor unbiased, Tensor descriptor_scale,"
    " Tensor attention, Tensor standardized, Tensor attention_mean, Tensor attention_unbiased, Tensor attention_rstd)",
    _an_fake,
)
_an_backward = _operator(
    "an_coefficients_backward(Tensor dscale, Tensor dshift, Tensor mean, Tensor centre, Tensor scale, Tensor rstd,"
    " Tensor descriptor_scale, Tensor attention, Tensor standardized, Tensor attention_rstd, Tensor mix_weight,"
    " Tensor mix_bias, Tensor fc, Tensor gain, Tensor offset, int hw)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dmix_weight, Tensor dmix_bias, Tensor dfc, Tensor dgain, Tensor doffset)",
    _an_backward_fake,
)


def _sn_fake(mean, var, weight, mean_weight, var_weight, unbias, eps):
    cells, channels = [_cells(mean) for _ in range(3)], [_channels(mean) for _ in range(2)]
    instances, shares = (
        [mean.new_empty(mean.shape[0]) for _ in range(2)],
        [mean.new_empty(3) for _ in range(2)],
    )
    return *cells, *instances, *channels, *shares


_sn = _operator(
    "sn_coefficients(Tensor mean, Tensor var, Tensor? weight, Tensor mean_weight, Tensor var_weight, float unbias,"
    " float eps) -> (Tensor centre, Tensor scale, Tensor rstd, Tensor layer_mean, Tensor layer_var, Tensor batch_mean,"
    " Tensor batch_var, Tensor of_means, Tensor of_vars)",
    _sn_fake,
)
_sn_backward = _operator(
    "sn_coefficients_backward(Tensor dscale, Tensor dshift, Tensor mean, Tensor var, Tensor scale, Tensor rstd,"
    " Tensor layer_mean, Tensor layer_var, Tensor batch_mean, Tensor batch_var, Tensor of_means, Tensor of_vars, int hw,"
    " float unbias)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dweight, Tensor dbias, Tensor dmean_weight, Tensor dvar_weight)",
    lambda dscale, dshift, mean, *_: (
        *(_cells(mean) for _ in range(2)), *(_channels(mean) for _ in range(2)), *(mean.new_empty(3) for _ in range(2)),
    ),
)  # fmt: skip

_LAWS = SimpleNamespace(
    bn_coefficients=_bn,
    bn_coefficients_backward=_bn_backward,
    gn_coefficients=_gn,
    gn_coefficients_backward=_gn_backward,
    an_coefficients=_an,
    an_coefficients_backward=_an_backward,
    sn_coefficients=_sn,
    sn_coefficients_backward=_sn_backward,
)


def laws(dtype: torch.dtype) -> SimpleNamespace:
    """The coefficient operators for maps of a dtype (any), as ``hot.py`` calls them."""
    return _LAWS


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
    """Mean and biased variance over H x W, (N, C) each; the variance to 1e-6 up to a mean of 1e4 deviations."""
    return _moments(x) if var else (_mean(x), None)


def affine(
    x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Tensor:
    """y = act(scale * (x - centre) + shift [+ residual]), in x's dtype and layout; act: none, relu or relu6."""
    return _affine(x, centre, scale, shift, residual, _ACTS[act])


def affine_backward(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, y: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dscale, dshift, g): sums over H x W of g * (x - centre) and of g = dy * act'.

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
    """dx = scale * g + dvar2 * (x - mean) + dmean1, g = dy * act' with the mask recomputed from x.

    dvar2 may be None (then mean is not read), or dvar2 and dmean1 both. mean, dvar2, dmean1: (C,) or (N, C).
    """
    return _moments_backward(dy, x, centre, scale, shift, mean, dvar2, dmean1, _ACTS[act])


# ---- coefficients of the hot laws, training mode -------------------------------------------------------------------


def bn_coefficients(
    mean: Tensor, var: Tensor, weight: Tensor | None, hw: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """BN from instance moments (N, C): (centre, scale, rstd, unbiased), each (C,).

    centre = mu = E_n[m], var = E_n[v] + E_n[(m - mu)^2], rstd = (var + eps)^(-1/2), scale = weight * rstd (the shift is
    the bias itself); unbiased = var M/(M-1) with M = N HW is what the running variance takes in (var itself if M = 1).
    """
    return _bn(mean, var, weight, hw, eps)


def bn_coefficients_backward(
    dscale: Tensor, dshift: Tensor, scale: Tensor, rstd: Tensor, hw: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dvar2, dmean1, dweight, dbias), each (C,): dx = scale * g + dvar2 * (x - centre) + dmean1."""
    return _bn_backward(dscale, dshift, scale, rstd, hw)


def gn_coefficients(
    mean: Tensor, var: Tensor, weight: Tensor | None, groups: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """GN from instance moments (N, C): (centre, scale, rstd), each (N, C); groups = 1 is LN over (C, H, W), C is IN.

    The moments of a group pool those of its C/groups channels as BN's pool those of the batch.
    """
    return _gn(mean, var, weight, groups, eps)


def gn_coefficients_backward(
    dscale: Tensor, dshift: Tensor, scale: Tensor, rstd: Tensor, groups: int, hw: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dvar2 (N, C), dmean1 (N, C), dweight (C,), dbias (C,)): dx = scale * g + dvar2 * (x - centre) + dmean1."""
    return _gn_backward(dscale, dshift, scale, rstd, groups, hw)


class ANCoefficients(NamedTuple):
    """What ``an_coefficients`` returns: three coefficients, what running statistics take in, and what backward reads."""

    centre: Tensor  # (C,) mu
    scale: Tensor  # (N, C) rstd * (attention @ mix_weight)
    shift: Tensor  # (N, C) attention @ mix_bias
    rstd: Tensor  # (C,)
    unbiased: Tensor  # (C,) for the running variance, as in bn_coefficients
    descriptor_scale: Tensor  # (N, C) q
    attention: Tensor  # (N, K) lambda
    standardized: Tensor  # (N, K) the attention BN's output before its affine part
    attention_mean: Tensor  # (K,) for the attention BN's running mean
    attention_unbiased: Tensor  # (K,) for its running variance: var N/(N-1) (var itself if N = 1)
    attention_rstd: Tensor  # (K,)


def an_coefficients(
    mean: Tensor,
    var: Tensor,
    mix_weight: Tensor,
    mix_bias: Tensor,
    fc: Tensor,
    gain: Tensor,
    offset: Tensor,
    hw: int,
    eps: float = 1e-5,
    descriptor_eps: float = 1e-3,
    attention_eps: float = 1e-5,
) -> ANCoefficients:
    """AN over BN in its published form (Li, Sun, Wu 2020; descriptor and constants as the authors' code has them).

    BN's mu and rstd as in ``bn_coefficients``;  descriptor m * q with q = (v HW/(HW-1) + descriptor_eps)^(-1/2), the
    factor 1 at HW = 1;  attention = hsigmoid(gain * BN_N(descriptor @ fc^T) + offset), the BN over the N instances,
    hsigmoid(z) = clip(z + 3, 0, 6) / 6.  mix_weight, mix_bias and fc hold K x C values (fc may be (K, C, 1, 1)), gain
    and offset, the attention BN's weight and bias, K.
    """
    return ANCoefficients(
        *_an(mean, var, mix_weight, mix_bias, fc, gain, offset, hw, eps, descriptor_eps, attention_eps)
    )


def an_coefficients_backward(
    dscale: Tensor,
    dshift: Tensor,
    mean: Tensor,
    saved: ANCoefficients,
    mix_weight: Tensor,
    mix_bias: Tensor,
    fc: Tensor,
    gain: Tensor,
    offset: Tensor,
    hw: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dvar2 (N, C), dmean1 (N, C), dmix_weight, dmix_bias, dfc, dgain, doffset).

    dx = scale * g + dvar2 * (x - mean) + dmean1, with the instances' mean.
    """
    s = saved
    return _an_backward(
        dscale, dshift, mean, s.centre, s.scale, s.rstd, s.descriptor_scale, s.attention, s.standardized,
        s.attention_rstd, mix_weight, mix_bias, fc, gain, offset, hw,
    )  # fmt: skip


class SNCoefficients(NamedTuple):
    """What ``sn_coefficients`` returns: coefficients, what running statistics take in, and what backward reads."""

    centre: Tensor  # (N, C) the mixed mean
    scale: Tensor  # (N, C) weight * rstd (the shift is the bias itself)
    rstd: Tensor  # (N, C)
    layer_mean: Tensor  # (N,)
    layer_var: Tensor  # (N,)
    batch_mean: Tensor  # (C,) for the running mean
    batch_var: Tensor  # (C,) for the running variance, as it is
    of_means: Tensor  # (3,) the means' shares: softmax over IN, LN, BN
    of_vars: Tensor  # (3,) the variances'


def sn_coefficients(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    mean_weight: Tensor,
    var_weight: Tensor,
    unbias: float,
    eps: float,
) -> SNCoefficients:
    """SN over IN, LN and BN (Luo et al. 2019, eq. 3): centre = sum_k w_k mu_k, rstd = (sum_k w'_k var_k + eps)^(-1/2).

    w and w' are the softmax of mean_weight and var_weight (3,). The instance's variance is ``unbias`` times var, and
    those of LN and BN are pooled from it.
    """
    return SNCoefficients(*_sn(mean, var, weight, mean_weight, var_weight, unbias, eps))


def sn_coefficients_backward(
    dscale: Tensor, dshift: Tensor, mean: Tensor, var: Tensor, saved: SNCoefficients, hw: int, unbias: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dvar2 (N, C), dmean1 (N, C), dweight (C,), dbias (C,), dmean_weight (3,), dvar_weight (3,)).

    dx = scale * g + dvar2 * (x - mean) + dmean1, with the instances' mean.
    """
    return _sn_backward(dscale, dshift, mean, var, *saved[1:], hw, unbias)
