"""Coefficients of the laws that matter most on a GPU, forward and backward, in one to three launches each.

Signatures, shapes and meaning are those of ``cpu/laws.py``; statistics are float32 here (a float64 map goes through
the law itself). All take the moments (N, C) and the sums dscale, dshift (N, C) of the passes; parameters may have any
floating dtype, their gradients are float32. What a backward returns goes into
``moments_backward(dy, x, centre, scale, shift, mean, dvar2, dmean1, act)``, with ``mean`` = the moments' mean for AN
and = ``centre`` for BN and GN, whose dvar2 and dmean1 are then the same for every cell that shares statistics.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from anorm.ops.triton.library import operator, power

__all__ = [
    "an_coefficients",
    "an_coefficients_backward",
    "bn_coefficients",
    "bn_coefficients_backward",
    "gn_coefficients",
    "gn_coefficients_backward",
]

# a tile of an (N, C) tensor: narrow, so that few channels still make several programs
_ROWS, _COLUMNS = 32, 16
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


@cache
def _kernels():
    from anorm.ops.triton import coefficients  # on first use: importing anorm needs torch alone

    return coefficients


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _dense(*statistics: Tensor) -> list[Tensor]:
    assert all(t.dtype == torch.float32 for t in statistics), "statistics are float32"
    return [t.contiguous() for t in statistics]


def _rows(*parameters: Tensor | None) -> list[Tensor | None]:
    """Parameters as the kernels index them."""
    return [p if p is None else p.contiguous() for p in parameters]


def _new(like: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _unbias(count: int) -> float:
    """n / (n - 1): biased variance -> unbiased; a single value has variance 0 either way."""
    return count / (count - 1) if count > 1 else 1.0


_BATCH_TILE = {"BN": _ROWS, "BC": _COLUMNS, **_OPTIONS}


def _group_tile(n: int, c: int, groups: int) -> tuple[tuple[int], dict[str, int | bool]]:
    width = power(c // groups)
    height = max(1, min(power(groups), 1024 // width))
    return (n * _blocks(groups, height),), {"BG": height, "BD": width, **_OPTIONS}


def _mix_tile(k: int) -> dict[str, int | bool]:
    return {"KP": max(16, power(k)), **_BATCH_TILE}


def _bn(mean: Tensor, var: Tensor, weight: Tensor | None, hw: int, eps: float) -> tuple[Tensor, ...]:
    (mean, var), (weight,) = _dense(mean, var), _rows(weight)
    n, c = mean.shape
    out = _new(mean, (c,), (c,), (c,), (c,))
    with torch.cuda.device_of(mean):
        _kernels().bn_kernel[(_blocks(c, _COLUMNS),)](
            mean, var, weight, *out, n, c, _unbias(n * hw), eps, **_BATCH_TILE
        )
    return out


def _bn_backward(dscale: Tensor, dshift: Tensor, scale: Tensor, rstd: Tensor, hw: int) -> tuple[Tensor, ...]:
    dscale, dshift = _dense(dscale, dshift)
    n, c = dscale.shape
    out = _new(dscale, (c,), (c,), (c,), (c,))
    with torch.cuda.device_of(dscale):
        _kernels().bn_backward_kernel[(_blocks(c, _COLUMNS),)](
            dscale, dshift, scale, rstd, *out, n, c, float(n * hw), **_BATCH_TILE
        )
    return out


def _gn(mean: Tensor, var: Tensor, weight: Tensor | None, groups: int, eps: float) -> tuple[Tensor, ...]:
    (mean, var), (weight,) = _dense(mean, var), _rows(weight)
    n, c = mean.shape
    out = _new(mean, (n, c), (n, c), (n, c))
    if n:
        grid, tile = _group_tile(n, c, groups)
        with torch.cuda.device_of(mean):
            _kernels().gn_kernel[grid](mean, var, weight, *out, groups, c // groups, eps, **tile)
    return out


def _gn_backward(
    dscale: Tensor, dshift: Tensor, scale: Tensor, rstd: Tensor, groups: int, hw: int
) -> tuple[Tensor, ...]:
    dscale, dshift = _dense(dscale, dshift)
    n, c = dscale.shape
    dvar2, dmean1, dweight_n, dweight, dbias = _new(dscale, (n, c), (n, c), (n, c), (c,), (c,))
    with torch.cuda.device_of(dscale):
        if n:
            grid, tile = _group_tile(n, c, groups)
            _kernels().gn_backward_kernel[grid](
                dscale, dshift, scale, rstd, dvar2, dmean1, dweight_n, groups, c // groups,
                float(hw * (c // groups)), **tile,
            )  # fmt: skip
        _kernels().sum_batch_kernel[(_blocks(c, _COLUMNS),)](
            dweight_n, dshift, dweight, dbias, n, c, **_BATCH_TILE
        )
    return dvar2, dmean1, dweight, dbias


def _an(
    mean: Tensor, var: Tensor, mix_weight: Tensor, mix_bias: Tensor, fc: Tensor, gain: Tensor, offset: Tensor,
    hw: int, eps: float, descriptor_eps: float, attention_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    mean, var = _dense(mean, var)
    mix_weight, mix_bias, fc, gain, offset = _rows(mix_weight, mix_bias, fc, gain, offset)
    (n, c), k = mean.shape, gain.numel()
    (
        centre,
        scale,
        shift,
        rstd,
        unbiased,
        descriptor_scale,
        attention,
        standardized,
        a_mean,
        a_unbiased,
        a_rstd,
    ) = out = _new(mean, (c,), (n, c), (n, c), (c,), (c,), (n, c), (n, k), (n, k), (k,), (k,), (k,))
    (logits,) = _new(mean, (n, k))
    pools = _blocks(c, _COLUMNS)
    with torch.cuda.device_of(mean):
        _kernels().an_project_kernel[(pools + _blocks(n, _ROWS),)](
            mean, var, fc, centre, rstd, unbiased, descriptor_scale, logits, n, c, k, _unbias(n * hw), eps,
            _unbias(hw), descriptor_eps, pools, **_mix_tile(k),
        )  # fmt: skip
        if n:
            _kernels().an_attention_kernel[(k,)](
                logits, gain, offset, a_mean, a_unbiased, a_rstd, standardized, attention, n, k, _unbias(n),
                attention_eps, NP=power(n), **_OPTIONS,
            )  # fmt: skip
            _kernels().an_mix_kernel[(_blocks(n, _ROWS), pools)](
                attention, mix_weight, mix_bias, rstd, scale, shift, n, c, k, **_mix_tile(k)
            )
    return out


def _an_backward(
    dscale: Tensor, dshift: Tensor, mean: Tensor, centre: Tensor, scale: Tensor, rstd: Tensor,
    descriptor_scale: Tensor, attention: Tensor, standardized: Tensor, attention_rstd: Tensor,
    mix_weight: Tensor, mix_bias: Tensor, fc: Tensor, gain: Tensor, offset: Tensor, hw: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    dscale, dshift, mean = _dense(dscale, dshift, mean)
    mix_weight, mix_bias, fc, gain, offset = _rows(mix_weight, mix_bias, fc, gain, offset)
    (n, c), k = mean.shape, gain.numel()
    dvar2, dmean1, dmix_weight, dmix_bias, dfc, dgain, doffset = out = _new(
        mean, (n, c), (n, c), (k, c), (k, c), (k, c), (k,), (k,)
    )
    if not n:
        return dvar2, dmean1, *(t.zero_() for t in out[2:])
    batch_dvar2, batch_dmean1, dgates, dlogits = _new(mean, (c,), (c,), (n, k), (n, k))
    columns = _blocks(c, _COLUMNS)
    with torch.cuda.device_of(mean):
        _kernels().an_mix_backward_kernel[(columns + _blocks(n, _ROWS),)](
            dscale, dshift, scale, rstd, attention, mix_weight, mix_bias, dmix_weight, dmix_bias, batch_dvar2,
            batch_dmean1, dgates, n, c, k, float(n * hw), columns, **_mix_tile(k),
        )  # fmt: skip
        _kernels().an_attention_backward_kernel[(k,)](
            dgates,
            standardized,
            gain,
            attention_rstd,
            dlogits,
            dgain,
            doffset,
            n,
            k,
            NP=power(n),
            **_OPTIONS,
        )
        _kernels().an_backward_kernel[(columns,)](
            mean, centre, descriptor_scale, batch_dvar2, batch_dmean1, dlogits, fc, dvar2, dmean1, dfc, n, c, k,
            float(hw), _unbias(hw), **_mix_tile(k),
        )  # fmt: skip
    return out


def _shaped(shapes: str, offset: int | None = None):
    """A shape function from the outputs' shapes, spelled in N, C (of the first argument) and K (of argument
    ``offset``)."""

    def fake(*arguments):
        sizes = dict(zip("NC", arguments[0].shape, strict=True))
        if offset is not None:
            sizes["K"] = arguments[offset].shape[0]
        return _new(arguments[0], *(tuple(sizes[letter] for letter in shape) for shape in shapes.split()))

    return fake


bn_coefficients = operator(
    "bn_coefficients",
    "(Tensor mean, Tensor var, Tensor? weight, int hw, float eps)"
    " -> (Tensor centre, Tensor scale, Tensor rstd, Tensor unbiased)",
    _bn,
    _shaped("C C C C"),
)
bn_coefficients_backward = operator(
    "bn_coefficients_backward",
    "(Tensor dscale, Tensor dshift, Tensor scale, Tensor rstd, int hw)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dweight, Tensor dbias)",
    _bn_backward,
    _shaped("C C C C"),
)
gn_coefficients = operator(
    "gn_coefficients",
    "(Tensor mean, Tensor var, Tensor? weight, int groups, float eps) -> (Tensor centre, Tensor scale, Tensor rstd)",
    _gn,
    _shaped("NC NC NC"),
)
gn_coefficients_backward = operator(
    "gn_coefficients_backward",
    "(Tensor dscale, Tensor dshift, Tensor scale, Tensor rstd, int groups, int hw)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dweight, Tensor dbias)",
    _gn_backward,
    _shaped("NC NC C C"),
)
an_coefficients = operator(
    "an_coefficients",
    "(Tensor mean, Tensor var, Tensor mix_weight, Tensor mix_bias, Tensor fc, Tensor gain, Tensor offset, int hw,"
    " float eps, float descriptor_eps, float attention_eps)"
    " -> (Tensor centre, Tensor scale, Tensor shift, Tensor rstd, Tensor unbiased, Tensor descriptor_scale,"
    " Tensor attention, Tensor standardized, Tensor attention_mean, Tensor attention_unbiased, Tensor attention_rstd)",
    _an,
    _shaped("C NC NC C C NC NK NK K K K", offset=6),
)
an_coefficients_backward = operator(
    "an_coefficients_backward",
    "(Tensor dscale, Tensor dshift, Tensor mean, Tensor centre, Tensor scale, Tensor rstd, Tensor descriptor_scale,"
    " Tensor attention, Tensor standardized, Tensor attention_rstd, Tensor mix_weight, Tensor mix_bias, Tensor fc,"
    " Tensor gain, Tensor offset, int hw)"
    " -> (Tensor dvar2, Tensor dmean1, Tensor dmix_weight, Tensor dmix_bias, Tensor dfc, Tensor dgain, Tensor doffset)",
    _an_backward,
    _shaped("NC NC KC KC KC K K", offset=14),
)
