"""The four passes on a GPU: launches of the Triton kernels in ``kernels.py``, behind torch.library operators.

The operators are opaque to torch.compile and carry no autograd formula: autograd.py supplies it from outside. Both
dense layouts run; channels_last is the fast one (128-byte rows of channels for any map size, where a contiguous 7x7
or 14x14 plane starts at an address that allows 2- or 8-byte loads only).

Results are bitwise equal from run to run on one GPU: the way a reduction is split depends on the shape alone.
With TRITON_INTERPRET=1 in the environment, set before Triton is imported, the kernels run on CPU tensors in Triton's
interpreter, slowly: for tests.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from anorm.ops.triton.library import operator, power

__all__ = ["affine", "affine_backward", "moments", "moments_backward", "prefers_torch"]

TILE = 4096  # cells of a tile: 16 a thread, two 16-byte loads of 2-byte numbers
FILL = 512  # programs that fill a large GPU: about 4 on each of its 132 to 148 processors
LONG = 8  # tiles that one program reduces where there is work for more programs
MAX_SPLITS = 64  # unless more are needed to reach FILL

class Plan(NamedTuple):
    """How a shape is cut into tiles."""

    channels_last: bool
    sizes: tuple[int, int, int]  # N, C, HW, the dense one divided by align
    align: int
    block_r: int  # positions of a tile
    block_c: int  # channels of a tile
    channel_blocks: int
    blocks: int  # position blocks, of block_r
    splits: int  # of the positions in a reduction, of rows
    rows: int
    warps: int


def prefers_torch(x: Tensor) -> bool:
    """Nothing was measured here for which torch's own function would be the faster one."""
    return False


@lru_cache(maxsize=4096)
def plan(n: int, c: int, hw: int, channels_last: bool) -> Plan:
    """A function of the shape alone: that keeps the order of every sum, and so every bit, reproducible."""
    align = _divisor(c if channels_last else hw)
    tile = TILE if align >= 4 else TILE // 2  # narrow loads need more registers a cell
    if channels_last:
        block_c = min(64, power(c))
        block_r = min(tile // block_c, max(16, power(hw)))
        channel_blocks = n * -(-c // block_c)
    else:
        block_r = max(16, power(hw)) if hw <= 64 else min((256, 128, 64), key=lambda b: -(-hw // b) * b)
        block_c = tile // block_r
        channel_blocks = -(-n * c // block_c)
    blocks = -(-hw // block_r)
    wanted = min(blocks, max(-(-FILL // channel_blocks), min(-(-blocks // LONG), MAX_SPLITS)))
    rows = -(-blocks // wanted) * block_r
    sizes = (n, c // align, hw) if channels_last else (n, c, hw // align)
    warps = max(1, 8 * block_r * block_c // tile)
    return Plan(
        channels_last, sizes, align, block_r, block_c, channel_blocks, blocks, -(-hw // rows), rows, warps
    )


def _divisor(value: int) -> int:
    """The largest power of two, up to 16, that divides value."""
    return min(16, value & -value)


def _plan(x: Tensor) -> Plan:
    n, c, h, w = x.shape
    assert c * h * w < 2**31, "offsets within an instance are 32-bit"
    planar = h * w > 1 and x.is_contiguous()
    assert planar or x.is_contiguous(memory_format=torch.channels_last)
    return plan(n, c, h * w, not planar)


def _dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels_last, else (a slice, an expanded map) a copy."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)


def _like(t: Tensor, x: Tensor) -> Tensor:
    """t in the memory layout of x: a gradient may arrive with any strides, expanded ones too."""
    return t if t.stride() == x.stride() and t.dtype == x.dtype else torch.empty_like(x).copy_(t)


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _cells(x: Tensor, splits: int = 1) -> Tensor:
    return x.new_empty((splits, *x.shape[:2]) if splits > 1 else x.shape[:2], dtype=_acc(x))


def _rows(coefficient: Tensor) -> tuple[Tensor, int]:
    """(coefficient, its step over the batch): 0 for (C,) and for a row that is expanded over the batch."""
    if coefficient.stride(-1) != 1:
        coefficient = coefficient.contiguous()
    return coefficient, coefficient.stride(0) if coefficient.dim() == 2 else 0


def _coefficients(*coefficients: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    pairs = [(None, 0) if t is None else _rows(t) for t in coefficients]
    return [t for t, _ in pairs], [step for _, step in pairs]


def _tile(p: Plan) -> dict[str, int | bool]:
    """The arguments that every pass shares. FMA fusion is said explicitly: its default differs between versions."""
    return {
        "CHANNELS_LAST": p.channels_last,
        "BR": p.block_r,
        "BC": p.block_c,
        "ALIGN": p.align,
        "num_warps": p.warps,
        "enable_fp_fusion": True,
    }


@cache
def _kernels():
    from anorm.ops.triton import kernels  # on first use: importing anorm needs torch alone

    return kernels


def _merge_tile(splits: int, cells: int) -> tuple[tuple[int], dict[str, int | bool]]:
    sp = power(splits)
    bc = max(16, min(128, 2048 // sp))
    return (-(-cells // bc),), {"SP": sp, "BC": bc, "num_warps": 4, "enable_fp_fusion": True}


def _statistics(x: Tensor, var: bool) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        empty = x.new_full(x.shape[:2], float("nan"), dtype=_acc(x))
        return empty, empty.clone()
    x = _dense(x)
    p = _plan(x)
    nothing = x.new_empty(0, dtype=_acc(x))
    mean, variance = _cells(x), _cells(x) if var else nothing
    whole = p.splits == 1
    parts = (mean, nothing, variance) if whole else tuple(_cells(x, p.splits) for _ in range(3))
    with torch.cuda.device_of(x):
        grid = (p.channel_blocks * p.splits,)
        _kernels().moments_kernel[grid](
            x, *parts, *p.sizes, p.splits, p.rows, WHOLE=whole, VAR=var, **_tile(p)
        )
        if not whole:
            grid, tile = _merge_tile(p.splits, mean.numel())
            _kernels().merge_moments_kernel[grid](
                *parts,
                mean,
                variance,
                mean.numel(),
                x.shape[2] * x.shape[3],
                p.splits,
                p.rows,
                VAR=var,
                **tile,
            )
    return mean, variance


def _moments_impl(x: Tensor) -> tuple[Tensor, Tensor]:
    return _statistics(x, True)


def _mean_impl(x: Tensor) -> Tensor:
    return _statistics(x, False)[0]


def _affine_impl(
    x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Tensor:
    x = _dense(x)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    p = _plan(x)
    residual = None if residual is None else _like(residual, x)
    tensors, steps = _coefficients(centre, scale, shift)
    with torch.cuda.device_of(x):
        _kernels().affine_kernel[(p.channel_blocks * p.blocks,)](
            x, *tensors, residual, y, *p.sizes, p.blocks, *steps,
            RESIDUAL=residual is not None, ACT=act, **_tile(p),
        )  # fmt: skip
    return y


def _reduce(
    dy: Tensor,
    x: Tensor,
    centre: Tensor,
    scale: Tensor,
    shift: Tensor,
    y: Tensor | None,
    g: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        zero = x.new_zeros(x.shape[:2], dtype=_acc(x))
        return zero, zero.clone()
    x = _dense(x)
    p = _plan(x)
    tensors, steps = _coefficients(centre, scale, shift)
    dscale, dshift = _cells(x), _cells(x)
    parts = (dscale, dshift) if p.splits == 1 else (_cells(x, p.splits), _cells(x, p.splits))
    with torch.cuda.device_of(x):
        _kernels().affine_backward_kernel[(p.channel_blocks * p.splits,)](
            _like(dy, x), x, *tensors, y, g, *parts, *p.sizes, p.splits, p.rows, *steps,
            FROM_Y=y is not None, ACT=act, **_tile(p),
        )  # fmt: skip
        if p.splits > 1:
            grid, tile = _merge_tile(p.splits, dscale.numel())
            _kernels().merge_sums_kernel[grid](*parts, dscale, dshift, dscale.numel(), p.splits, **tile)
    return dscale, dshift


def _affine_backward_impl(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, act: str
) -> tuple[Tensor, Tensor]:
    return _reduce(dy, x, centre, scale, shift, None, None, act)


def _affine_backward_residual_impl(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, y: Tensor, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    x = _dense(x)
    g = torch.empty_like(x)
    return *_reduce(dy, x, centre, scale, shift, _like(y, x), g, act), g


def _moments_backward_impl(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor,
    mean: Tensor | None, dvar2: Tensor | None, dmean1: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    x = _dense(x)
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    p = _plan(x)
    tensors, steps = _coefficients(centre, scale, shift, mean, dvar2, dmean1)
    with torch.cuda.device_of(x):
        _kernels().moments_backward_kernel[(p.channel_blocks * p.blocks,)](
            _like(dy, x), x, *tensors, dx, *p.sizes, p.blocks, *steps,
            MEAN=dmean1 is not None, VAR=dvar2 is not None, ACT=act, **_tile(p),
        )  # fmt: skip
    return dx


_moments_op = operator(
    "moments", "(Tensor x) -> (Tensor, Tensor)", _moments_impl, lambda x: (_cells(x), _cells(x))
)
_mean_op = operator("mean", "(Tensor x) -> Tensor", _mean_impl, _cells)
_affine_op = operator(
    "affine",
    "(Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor? residual, str act) -> Tensor",
    _affine_impl,
    lambda x, *rest: torch.empty_like(_dense(x)),
)
_affine_backward_op = operator(
    "affine_backward",
    "(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, str act) -> (Tensor, Tensor)",
    _affine_backward_impl,
    lambda dy, x, *rest: (_cells(x), _cells(x)),
)
_affine_backward_residual_op = operator(
    "affine_backward_residual",
    "(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor y, str act) -> (Tensor, Tensor, Tensor)",
    _affine_backward_residual_impl,
    lambda dy, x, *rest: (_cells(x), _cells(x), torch.empty_like(_dense(x))),
)
_moments_backward_op = operator(
    "moments_backward",
    "(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor? mean, Tensor? dvar2, Tensor? dmean1, "
    "str act) -> Tensor",
    _moments_backward_impl,
    lambda dy, x, *rest: torch.empty_like(_dense(x)),
)


def moments(x: Tensor, var: bool = True) -> tuple[Tensor, Tensor | None]:
    """(Eq. 1) mean and biased variance over H x W, (N, C) each; the variance is None where it is not wanted."""
    return _moments_op(x) if var else (_mean_op(x), None)


def affine(
    x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Tensor:
    """(Eq. 2) y = act(scale * (x - centre) + shift [+ residual]), in x's dtype and layout."""
    return _affine_op(x, centre, scale, shift, residual, act)


def affine_backward(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, y: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(Eq. 3, 4) (dscale, dshift, g): sums over H x W, (N, C); g is returned where it was masked by a given y."""
    if y is None or act == "none":
        return *_affine_backward_op(dy, x, centre, scale, shift, act), None
    return _affine_backward_residual_op(dy, x, centre, scale, shift, y, act)


def moments_backward(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor,
    mean: Tensor | None, dvar2: Tensor | None, dmean1: Tensor | None, act: str,
) -> Tensor:  # fmt: skip
    """(Eq. 5) dx = scale * g + dvar2 * (x - mean) + dmean1, with dvar2 = 2 dvar / HW and dmean1 = dmean / HW."""
    return _moments_backward_op(dy, x, centre, scale, shift, mean, dvar2, dmean1, act)
