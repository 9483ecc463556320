"""The hot laws on a GPU: moments -> coefficients, and back, in one to three launches each way (float32 only).

    bn, bn_backward      BN over the batch               an, an_backward      AN over BN (rsd, A2 with BN, hsigmoid)
    gn, gn_backward      GN; LN and IN are its two ends

All take ``mean`` and ``var`` (N, C) of ``triton.moments``. A backward takes the sums of ``triton.affine_backward`` and
returns what ``triton.moments_backward`` takes, dvar2 = 2 dvar / count and dmean1 = dmean / count (each (C,) or
(N, C)), and the gradients of the law's parameters, in float32; ``count`` is H * W. The gradient of the centre is
accounted for. Parameters may have any floating dtype.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from anorm.ops.triton import operator

__all__ = ["an", "an_backward", "bn", "bn_backward", "gn", "gn_backward"]

_ROWS, _COLUMNS = 32, 16  # a tile of an (N, C) tensor: narrow, so that few channels still make several programs
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@cache
def _kernels():
    from anorm.ops import triton_coefficients  # on first use: importing anorm needs torch alone

    return triton_coefficients


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _power(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _checked(*cells: Tensor) -> list[Tensor]:
    assert all(t.dtype == torch.float32 for t in cells), "the fused coefficients are float32: use the law itself"
    return [t.contiguous() for t in cells]


def _new(like: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _bn_impl(mean: Tensor, var: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = _checked(mean, var)
    n, c = mean.shape
    out = _new(mean, (c,), (c,), (c,))
    with torch.cuda.device_of(mean):
        _kernels().bn_kernel[(_blocks(c, _COLUMNS),)](
            mean, var, weight, *out, n, c, eps, BN=_ROWS, BC=_COLUMNS, **_OPTIONS
        )
    return out


def _bn_backward_impl(
    dscale: Tensor, dshift: Tensor, mean: Tensor, mu: Tensor, var: Tensor, scale: Tensor, count: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dscale, dshift, mean = _checked(dscale, dshift, mean)
    n, c = mean.shape
    out = _new(mean, (c,), (n, c), (c,), (c,))
    with torch.cuda.device_of(mean):
        _kernels().bn_backward_kernel[(_blocks(c, _COLUMNS),)](
            dscale, dshift, mean, mu, var, scale, *out, n, c, float(count), eps, BN=_ROWS, BC=_COLUMNS, **_OPTIONS
        )
    return out


def _group_tile(n: int, c: int, groups: int) -> tuple[tuple[int], dict[str, int | bool]]:
    width = _power(c // groups)
    height = max(1, min(_power(groups), 1024 // width))
    return (n * _blocks(groups, height),), {"BG": height, "BD": width, **_OPTIONS}


def _gn_impl(mean: Tensor, var: Tensor, weight: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    mean, var = _checked(mean, var)
    n, c = mean.shape
    out = _new(mean, (n, c), (n, c))
    grid, tile = _group_tile(n, c, groups)
    if n:
        with torch.cuda.device_of(mean):
            _kernels().gn_kernel[grid](mean, var, weight, *out, groups, c // groups, eps, **tile)
    return out


def _gn_backward_impl(
    dscale: Tensor, dshift: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, centre: Tensor,
    groups: int, count: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dscale, dshift, mean, var = _checked(dscale, dshift, mean, var)
    n, c = mean.shape
    dvar2, dmean1, dweight_n, dweight, dbias = _new(mean, (n, c), (n, c), (n, c), (c,), (c,))
    if not n:
        return dvar2, dmean1, dweight.zero_(), dbias.zero_()
    grid, tile = _group_tile(n, c, groups)
    with torch.cuda.device_of(mean):
        _kernels().gn_backward_kernel[grid](
            dscale, dshift, mean, var, weight, centre, dvar2, dmean1, dweight_n, groups, c // groups, float(count),
            eps, **tile,
        )  # fmt: skip
        _kernels().gn_parameters_kernel[(_blocks(c, _COLUMNS),)](
            dweight_n, dshift, dweight, dbias, n, c, BN=_ROWS, BC=_COLUMNS, **_OPTIONS
        )
    return dvar2, dmean1, dweight, dbias


def _an_tile(k: int) -> dict[str, int | bool]:
    return {"BN": _ROWS, "BC": _COLUMNS, "KP": max(16, _power(k)), **_OPTIONS}


def _unbias(count: int) -> float:
    """n / (n - 1), which turns the biased variance into the unbiased one; one value has variance 0 either way."""
    return count / (count - 1) if count > 1 else 1.0


def _an_impl(
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, fc: Tensor, att_weight: Tensor, att_bias: Tensor,
    base_var: Tensor | None, att_mean: Tensor | None, att_var: Tensor | None,
    count: int, eps: float, eps_rsd: float, att_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    mean, var = _checked(mean, var)
    n, c = mean.shape
    k = fc.shape[0]
    pooled, mixed = base_var is None, att_mean is None
    mu_out, var_out = _new(mean, (c,), (c,)) if pooled else _new(mean, (0,), (0,))
    att_mean_out, att_var_out = _new(mean, (k,), (k,)) if mixed else _new(mean, (0,), (0,))
    a, normal, gates, scale, shift = _new(mean, (n, k), (n, k), (n, k), (n, c), (n, c))
    pools = _blocks(c, _COLUMNS) if pooled else 0
    if n:
        with torch.cuda.device_of(mean):
            _kernels().an_project_kernel[(pools + _blocks(n, _ROWS),)](
                mean, var, fc, mu_out, var_out, a, n, c, k, _unbias(count), eps_rsd, pools, **_an_tile(k)
            )
            _kernels().an_attention_kernel[(k,)](
                a, att_weight, att_bias, att_mean_out if mixed else att_mean, att_var_out if mixed else att_var,
                normal, gates, n, k, att_eps, BATCH=mixed, NP=_power(n), **_OPTIONS,
            )  # fmt: skip
            _kernels().an_mix_kernel[(_blocks(n, _ROWS), _blocks(c, _COLUMNS))](
                gates, weight, bias, var_out if pooled else base_var, scale, shift, n, c, k, eps, **_an_tile(k)
            )
    return scale, shift, mu_out, var_out, att_mean_out, att_var_out, normal, gates


def _an_backward_impl(
    dscale: Tensor, dshift: Tensor, mean: Tensor, var: Tensor, mu: Tensor, base_var: Tensor, scale: Tensor,
    normal: Tensor, gates: Tensor, att_var: Tensor,
    weight: Tensor, bias: Tensor, fc: Tensor, att_weight: Tensor,
    pooled: bool, mixed: bool, count: int, eps: float, eps_rsd: float, att_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dscale, dshift, mean, var, scale = _checked(dscale, dshift, mean, var, scale)
    n, c = mean.shape
    k = fc.shape[0]
    dvar2, dmean1, dweight, dbias, dfc, datt_weight, datt_bias = out = _new(
        mean, (n, c), (n, c), (k, c), (k, c), (k, c), (k,), (k,)
    )
    if not n:
        return dvar2, dmean1, *(t.zero_() for t in out[2:])
    dmu, dvar, dz, da = _new(mean, (c,), (c,), (n, k), (n, k))
    columns = _blocks(c, _COLUMNS)
    with torch.cuda.device_of(mean):
        _kernels().an_mix_backward_kernel[(columns + _blocks(n, _ROWS),)](
            dscale, dshift, gates, scale, weight, bias, base_var, dweight, dbias, dmu, dvar, dz, n, c, k, eps, columns,
            **_an_tile(k),
        )  # fmt: skip
        _kernels().an_attention_backward_kernel[(k,)](
            dz, normal, att_weight, att_var, da, datt_weight, datt_bias, n, k, att_eps,
            BATCH=mixed, NP=_power(n), **_OPTIONS,
        )  # fmt: skip
        _kernels().an_backward_kernel[(columns,)](
            mean, var, mu, dmu, dvar, da, fc, dvar2, dmean1, dfc, n, c, k, float(count), _unbias(count), eps_rsd,
            BATCH=pooled, **_an_tile(k),
        )  # fmt: skip
    return out


def _cells(mean: Tensor, *counts: int) -> tuple[Tensor, ...]:
    n, c = mean.shape
    return _new(mean, *((n, c) if of_batch else (c,) for of_batch in counts))


def _an_fake(mean, var, weight, bias, fc, att_weight, att_bias, base_var, att_mean, *rest):
    (n, c), k = mean.shape, fc.shape[0]
    pooled, mixed = (c,) if base_var is None else (0,), (k,) if att_mean is None else (0,)
    return _new(mean, (n, c), (n, c), pooled, pooled, mixed, mixed, (n, k), (n, k))


def _an_backward_fake(dscale, dshift, mean, var, mu, base_var, scale, normal, gates, *rest):
    (n, c), k = mean.shape, gates.shape[1]
    return _new(mean, (n, c), (n, c), (k, c), (k, c), (k, c), (k,), (k,))


_bn = operator(
    "bn", "(Tensor mean, Tensor var, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)",
    _bn_impl, lambda mean, *rest: _cells(mean, 0, 0, 0),
)  # fmt: skip
_bn_backward = operator(
    "bn_backward",
    "(Tensor dscale, Tensor dshift, Tensor mean, Tensor mu, Tensor var, Tensor scale, int count, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _bn_backward_impl, lambda dscale, *rest: _cells(dscale, 0, 1, 0, 0),
)  # fmt: skip
_gn = operator(
    "gn", "(Tensor mean, Tensor var, Tensor? weight, int groups, float eps) -> (Tensor, Tensor)",
    _gn_impl, lambda mean, *rest: _cells(mean, 1, 1),
)  # fmt: skip
_gn_backward = operator(
    "gn_backward",
    "(Tensor dscale, Tensor dshift, Tensor mean, Tensor var, Tensor? weight, Tensor centre, int groups, int count,"
    " float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _gn_backward_impl, lambda dscale, *rest: _cells(dscale, 1, 1, 0, 0),
)  # fmt: skip
_an = operator(
    "an",
    "(Tensor mean, Tensor var, Tensor weight, Tensor bias, Tensor fc, Tensor att_weight, Tensor att_bias,"
    " Tensor? base_var, Tensor? att_mean, Tensor? att_var, int count, float eps, float eps_rsd, float att_eps)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _an_impl, _an_fake,
)  # fmt: skip
_an_backward = operator(
    "an_backward",
    "(Tensor dscale, Tensor dshift, Tensor mean, Tensor var, Tensor mu, Tensor base_var, Tensor scale, Tensor normal,"
    " Tensor gates, Tensor att_var, Tensor weight, Tensor bias, Tensor fc, Tensor att_weight, bool pooled, bool mixed,"
    " int count, float eps, float eps_rsd, float att_eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _an_backward_impl, _an_backward_fake,
)  # fmt: skip


def bn(mean: Tensor, var: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(mu, pooled variance, scale), (C,): centre = mu, scale = weight / sqrt(variance + eps), shift = the bias."""
    return _bn(mean, var, weight, eps)


def bn_backward(
    dscale: Tensor, dshift: Tensor, mean: Tensor, mu: Tensor, var: Tensor, scale: Tensor, count: int, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dvar2 (C,), dmean1 (N, C), dweight (C,), dbias (C,)); mu, var, scale as ``bn`` returned them."""
    return _bn_backward(dscale, dshift, mean, mu, var, scale, count, eps)


def gn(mean: Tensor, var: Tensor, weight: Tensor | None, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(centre, scale), (N, C); the shift is the bias."""
    return _gn(mean, var, weight, groups, eps)


def gn_backward(
    dscale: Tensor, dshift: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, centre: Tensor,
    groups: int, count: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dvar2 (N, C), dmean1 (N, C), dweight (C,), dbias (C,)); centre as ``gn`` returned it."""
    return _gn_backward(dscale, dshift, mean, var, weight, centre, groups, count, eps)


def an(
    mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, fc: Tensor, att_weight: Tensor, att_bias: Tensor,
    base_var: Tensor | None, att_mean: Tensor | None, att_var: Tensor | None,
    count: int, eps: float, eps_rsd: float, att_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """AN over BN: weight, bias, fc (K, C), att_weight, att_bias (K).

        a = (mean / sqrt(var count / (count - 1) + eps_rsd)) fc^T
        gates = hsigmoid(att_weight (a - att_mean) / sqrt(att_var + att_eps) + att_bias)          (N, K)
        scale = (gates weight) / sqrt(base_var + eps),    shift = gates bias,    centre = mu      (N, C), (N, C), (C,)

    base_var None: mu and base_var are pooled from this batch; else the running variance is given (and the centre is the
    running mean). att_mean and att_var None: statistics of a over this batch. Returns (scale, shift, mu, base_var,
    att_mean, att_var, normal, gates); statistics that were given come back empty; all variances are biased.
    """
    return _an(mean, var, weight, bias, fc, att_weight, att_bias, base_var, att_mean, att_var,
               count, eps, eps_rsd, att_eps)  # fmt: skip


def an_backward(
    dscale: Tensor, dshift: Tensor, mean: Tensor, var: Tensor, mu: Tensor, base_var: Tensor, scale: Tensor,
    normal: Tensor, gates: Tensor, att_var: Tensor,
    weight: Tensor, bias: Tensor, fc: Tensor, att_weight: Tensor,
    pooled: bool, mixed: bool, count: int, eps: float, eps_rsd: float, att_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(dvar2, dmean1 (N, C), dweight, dbias, dfc (K, C), datt_weight, datt_bias (K)).

    mu, base_var, att_var are what the forward used; ``pooled`` and ``mixed`` say whether the batch's own statistics
    were taken for the base and for the attention.
    """
    return _an_backward(dscale, dshift, mean, var, mu, base_var, scale, normal, gates, att_var,
                        weight, bias, fc, att_weight, pooled, mixed, count, eps, eps_rsd, att_eps)  # fmt: skip
