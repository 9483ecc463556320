"""Triton kernels of the four passes, both layouts in one source.

A feature map is read in tiles of BR positions (the dimension that the reductions run over) by BC channels:

    channels_last   x is (N, H*W, C); a tile lies in one instance and holds BC neighbouring channels
    contiguous      x is (N*C, H*W); a tile holds BC neighbouring planes, of any instances

``_place`` maps a program to its tile; everything after it is the same for both. Sums over tiles are kept per tile
cell and reduced once at the end. Where one program per (instance, channel block) would leave the GPU empty, H*W is cut
into splits; each writes a partial result, and a second small kernel merges them in a fixed order. No atomics: the
results are bitwise equal from run to run. The elementwise passes walk the map in reverse, because its end is what the
reduction before them left in the L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "affine_backward_kernel",
    "affine_kernel",
    "merge_moments_kernel",
    "merge_sums_kernel",
    "moments_backward_kernel",
    "moments_kernel",
]


@triton.jit
def _place(pid, N, C, HW, RB, CHANNELS_LAST: tl.constexpr, BC: tl.constexpr):
    """Program -> (block of positions, n, c, channel is there, offset of the tile, offsets of its channels, of a row).

    RB is the number of position blocks. n is a scalar in channels_last, else a vector like c. Neighbouring programs
    read neighbouring memory. Only the tile's offset needs 64 bits.
    """
    block = tl.arange(0, BC)
    if CHANNELS_LAST:
        blocks = tl.cdiv(C, BC)
        c = pid % blocks * BC + block
        rb = pid // blocks % RB
        n = pid // blocks // RB
        return rb, n, c, c < C, n.to(tl.int64) * HW * C, c, C
    else:
        rb = pid % RB
        first = pid // RB * BC
        plane = first + block
        return rb, plane // C, plane % C, plane < N * C, first.to(tl.int64) * HW, block * HW, 1


@triton.jit
def _lengths(C, HW, CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr):
    """The length of the dense dimension arrives divided by ALIGN, so that the compiler knows it is a multiple."""
    if CHANNELS_LAST:
        return C * ALIGN, HW
    else:
        return C, HW * ALIGN


@triton.jit
def _passes(g, z, ACT: tl.constexpr):
    """g where the activation passes the gradient at z, else 0; a NaN in z passes it, as in torch."""
    if ACT == "relu":
        g = tl.where(z <= 0, 0.0, g)
    if ACT == "relu6":
        g = tl.where((z <= 0) | (z >= 6), 0.0, g)
    return g


@triton.jit
def moments_kernel(
    x, mean, offset, var, N, C, HW, SPLITS, ROWS,
    CHANNELS_LAST: tl.constexpr, WHOLE: tl.constexpr, VAR: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(Eq. 1) mean, var (SPLITS, N, C): moments of the ROWS positions of each split, ROWS a multiple of BR.

    One pass. Deviations are taken from the first tile's mean: unlike E[x^2] - E[x]^2 this does not cancel where
    |mean| >> std, and unlike the first element it is no outlier. A shift that is not finite is replaced by 0, so an
    inf gives mean = inf and var = nan, as in torch. Where a map has several splits (not WHOLE), a split's mean is left
    in two parts, mean + offset: their sum, rounded, would lose the digits that the merge needs.
    """
    C, HW = _lengths(C, HW, CHANNELS_LAST, ALIGN)
    split, n, c, there, origin, columns, step = _place(tl.program_id(0), N, C, HW, SPLITS, CHANNELS_LAST, BC)
    acc = mean.dtype.element_ty
    tile = x + origin + columns[None, :]
    start = split * ROWS
    stop = tl.minimum(start + ROWS, HW)

    r = start + tl.arange(0, BR)
    inside = (r < HW)[:, None] & there[None, :]
    value = tl.load(tile + r[:, None] * step, mask=inside, other=0.0).to(acc)
    shift = tl.sum(value, 0) / tl.minimum(stop - start, BR).to(acc)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)
    d = tl.where(inside, value - shift[None, :], 0.0)
    total = d
    square = d * d
    for begin in tl.range(start + BR, stop, BR, loop_unroll_factor=2):  # two tiles of loads in flight
        r = begin + tl.arange(0, BR)
        inside = (r < HW)[:, None] & there[None, :]
        value = tl.load(tile + r[:, None] * step, mask=inside, other=0.0).to(acc)
        d = tl.where(inside, value - shift[None, :], 0.0)
        total += d
        square += d * d

    count = (stop - start).to(acc)
    rest = tl.sum(total, 0) / count
    out = (split * N + n) * C + c
    if WHOLE:
        tl.store(mean + out, shift + rest, mask=there)
    else:
        tl.store(mean + out, shift, mask=there)
        tl.store(offset + out, rest, mask=there)
    if VAR:
        biased = tl.sum(square, 0) / count - rest * rest
        # rounding of a constant plane; NaN stays
        tl.store(var + out, tl.where(biased < 0, 0.0, biased), mask=there)


@triton.jit
def merge_moments_kernel(
    part_mean, part_offset, part_var, mean, var, NC, HW, SPLITS, ROWS,
    VAR: tl.constexpr, SP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """(Eq. 1) (SPLITS, NC) moments of splits -> (NC,), relative to split 0 and in two passes: nothing cancels."""
    cell = tl.program_id(0) * BC + tl.arange(0, BC)
    there = cell < NC
    split = tl.arange(0, SP)
    acc = mean.dtype.element_ty
    inside = (split < SPLITS)[:, None] & there[None, :]
    at = split[:, None] * NC + cell[None, :]
    weight = (tl.maximum(tl.minimum(HW - split * ROWS, ROWS), 0).to(acc) / HW)[:, None]
    first = tl.load(part_mean + cell, mask=there, other=0.0)
    # exact: the means are close to each other
    d = tl.load(part_mean + at, mask=inside, other=0.0) - first[None, :]
    d = tl.where(inside, d + tl.load(part_offset + at, mask=inside, other=0.0), 0.0)
    rest = tl.sum(d * weight, 0)
    tl.store(mean + cell, first + rest, mask=there)
    if VAR:
        between = tl.where(inside, d - rest[None, :], 0.0)
        within = tl.load(part_var + at, mask=inside, other=0.0)
        tl.store(var + cell, tl.sum((within + between * between) * weight, 0), mask=there)


@triton.jit
def merge_sums_kernel(part_a, part_b, a, b, NC, SPLITS, SP: tl.constexpr, BC: tl.constexpr):
    """(Eq. 3) (SPLITS, NC) partial sums -> (NC,), two at a time."""
    cell = tl.program_id(0) * BC + tl.arange(0, BC)
    there = cell < NC
    split = tl.arange(0, SP)
    inside = (split < SPLITS)[:, None] & there[None, :]
    at = split[:, None] * NC + cell[None, :]
    tl.store(a + cell, tl.sum(tl.load(part_a + at, mask=inside, other=0.0), 0), mask=there)
    tl.store(b + cell, tl.sum(tl.load(part_b + at, mask=inside, other=0.0), 0), mask=there)


@triton.jit
def affine_kernel(
    x, centre, scale, shift, residual, y, N, C, HW, BLOCKS, centre_step, scale_step, shift_step,
    CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(Eq. 2) y = act(scale * (x - centre) + shift [+ residual]); a step of 0 repeats a (C,) coefficient over the batch."""
    C, HW = _lengths(C, HW, CHANNELS_LAST, ALIGN)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    block, n, c, there, origin, columns, step = _place(pid, N, C, HW, BLOCKS, CHANNELS_LAST, BC)
    acc = scale.dtype.element_ty
    m = tl.load(centre + n * centre_step + c, mask=there, other=0.0)[None, :]
    s = tl.load(scale + n * scale_step + c, mask=there, other=0.0)[None, :]
    b = tl.load(shift + n * shift_step + c, mask=there, other=0.0)[None, :]
    r = block * BR + tl.arange(0, BR)
    inside = (r < HW)[:, None] & there[None, :]
    at = columns[None, :] + r[:, None] * step
    z = tl.fma(s, tl.load(x + origin + at, mask=inside, other=0.0).to(acc) - m, b)
    if RESIDUAL:
        z += tl.load(residual + origin + at, mask=inside, other=0.0).to(acc)
    if ACT == "relu":
        z = tl.where(z <= 0, 0.0, z)  # a comparison, not a maximum: NaN goes through
    if ACT == "relu6":
        z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    tl.store(y + origin + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def affine_backward_kernel(
    dy, x, centre, scale, shift, y, g_out, dscale, dshift, N, C, HW, SPLITS, ROWS, centre_step, scale_step, shift_step,
    CHANNELS_LAST: tl.constexpr, FROM_Y: tl.constexpr, ACT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(Eq. 3, 4) dshift = sum g, dscale = sum g * (x - centre), (SPLITS, N, C), with g = dy * act'.

    The mask comes from y (FROM_Y; g is then written to g_out), or else from scale * (x - centre) + shift, rounded to
    x's dtype exactly as the forward rounds it.
    """
    C, HW = _lengths(C, HW, CHANNELS_LAST, ALIGN)
    split, n, c, there, origin, columns, step = _place(tl.program_id(0), N, C, HW, SPLITS, CHANNELS_LAST, BC)
    acc = dscale.dtype.element_ty
    m = tl.load(centre + n * centre_step + c, mask=there, other=0.0)[None, :]
    s = tl.load(scale + n * scale_step + c, mask=there, other=0.0)[None, :]
    b = tl.load(shift + n * shift_step + c, mask=there, other=0.0)[None, :]
    sum_g = tl.zeros((BR, BC), acc)
    sum_gd = tl.zeros((BR, BC), acc)
    start = split * ROWS
    stop = tl.minimum(start + ROWS, HW)
    for begin in range(start, stop, BR):
        r = begin + tl.arange(0, BR)
        inside = (r < HW)[:, None] & there[None, :]
        at = columns[None, :] + r[:, None] * step
        g = tl.load(dy + origin + at, mask=inside, other=0.0).to(acc)
        d = tl.load(x + origin + at, mask=inside, other=0.0).to(acc) - m
        if FROM_Y:
            g = _passes(g, tl.load(y + origin + at, mask=inside, other=0.0).to(acc), ACT)
            tl.store(g_out + origin + at, g.to(g_out.dtype.element_ty), mask=inside)
        else:
            g = _passes(g, tl.fma(s, d, b).to(x.dtype.element_ty).to(acc), ACT)
        sum_g += g
        sum_gd += g * d
    out = (split * N + n) * C + c
    tl.store(dscale + out, tl.sum(sum_gd, 0), mask=there)
    tl.store(dshift + out, tl.sum(sum_g, 0), mask=there)


@triton.jit
def moments_backward_kernel(
    dy, x, centre, scale, shift, mean, dvar2, dmean1, dx, N, C, HW, BLOCKS,
    centre_step, scale_step, shift_step, mean_step, dvar2_step, dmean1_step,
    CHANNELS_LAST: tl.constexpr, MEAN: tl.constexpr, VAR: tl.constexpr, ACT: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """(Eq. 5) dx = scale * g [+ dvar2 * (x - mean)] [+ dmean1], with g = dy * act' as in ``affine_backward_kernel``."""
    C, HW = _lengths(C, HW, CHANNELS_LAST, ALIGN)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    block, n, c, there, origin, columns, step = _place(pid, N, C, HW, BLOCKS, CHANNELS_LAST, BC)
    acc = scale.dtype.element_ty
    s = tl.load(scale + n * scale_step + c, mask=there, other=0.0)[None, :]
    r = block * BR + tl.arange(0, BR)
    inside = (r < HW)[:, None] & there[None, :]
    at = columns[None, :] + r[:, None] * step
    g = tl.load(dy + origin + at, mask=inside, other=0.0).to(acc)
    if VAR or ACT != "none":
        value = tl.load(x + origin + at, mask=inside, other=0.0).to(acc)
    if ACT != "none":
        m = tl.load(centre + n * centre_step + c, mask=there, other=0.0)[None, :]
        b = tl.load(shift + n * shift_step + c, mask=there, other=0.0)[None, :]
        g = _passes(g, tl.fma(s, value - m, b).to(x.dtype.element_ty).to(acc), ACT)
    out = s * g
    if MEAN:
        out += tl.load(dmean1 + n * dmean1_step + c, mask=there, other=0.0)[None, :]
    if VAR:
        d = value - tl.load(mean + n * mean_step + c, mask=there, other=0.0)[None, :]
        out = tl.fma(tl.load(dvar2 + n * dvar2_step + c, mask=there, other=0.0)[None, :], d, out)
    tl.store(dx + origin + at, out.to(dx.dtype.element_ty), mask=inside)
