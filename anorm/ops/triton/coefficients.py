"""Coefficients of the fused laws as Triton kernels: BN, GN, AN over BN, forward and backward, one to three launches each.

In plain PyTorch the (N, C) part of AN is some hundred kernels of a few microseconds; on a fast GPU that is more time
than its passes take. What goes in and out is said in laws.py. Everything is float32 (products too: no TF32);
no atomics: every sum has one owner and a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "an_attention_backward_kernel",
    "an_attention_kernel",
    "an_backward_kernel",
    "an_mix_backward_kernel",
    "an_mix_kernel",
    "an_project_kernel",
    "bn_backward_kernel",
    "bn_kernel",
    "gn_backward_kernel",
    "gn_kernel",
    "sum_batch_kernel",
]


@triton.jit
def _column(at, C, there, N, n0, BN: tl.constexpr):
    """-> (offsets, mask) of the rows n0.. of a block of columns of an (N, C) tensor."""
    n = n0 + tl.arange(0, BN)
    return n[:, None] * C + at[None, :], (n < N)[:, None] & there[None, :]


@triton.jit
def _pool_batch(mean, var, c, there, N, C, BN: tl.constexpr, BC: tl.constexpr):
    """mu = E_n[m_n], E_n[v_n] + E_n[(m_n - mu)^2], summed relative to the first instance."""
    first = tl.load(mean + c, mask=there, other=0.0)
    total = tl.zeros((BN, BC), tl.float32)
    for n0 in range(0, N, BN):
        at, inside = _column(c, C, there, N, n0, BN)
        total += tl.where(inside, tl.load(mean + at, mask=inside, other=0.0) - first[None, :], 0.0)
    mu = first + tl.sum(total, 0) / N
    total = tl.zeros((BN, BC), tl.float32)
    for n0 in range(0, N, BN):
        at, inside = _column(c, C, there, N, n0, BN)
        d = tl.where(inside, tl.load(mean + at, mask=inside, other=0.0) - mu[None, :], 0.0)
        total += tl.load(var + at, mask=inside, other=0.0) + d * d
    return mu, tl.sum(total, 0) / N


@triton.jit
def _store_batch(mu, pooled, c, there, centre, rstd, unbiased, unbias, eps):
    r = tl.rsqrt(pooled + eps)
    tl.store(centre + c, mu, mask=there)
    tl.store(rstd + c, r, mask=there)
    tl.store(unbiased + c, pooled * unbias, mask=there)
    return r


@triton.jit
def bn_kernel(
    mean, var, weight, centre, scale, rstd, unbiased, N, C, unbias, eps, BN: tl.constexpr, BC: tl.constexpr
):
    """(Eq. 6) BN's coefficients."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    mu, pooled = _pool_batch(mean, var, c, there, N, C, BN, BC)
    s = _store_batch(mu, pooled, c, there, centre, rstd, unbiased, unbias, eps)
    if weight is not None:
        s *= tl.load(weight + c, mask=there, other=0.0).to(tl.float32)
    tl.store(scale + c, s, mask=there)


@triton.jit
def _sum_batch(a, b, c, there, N, C, BN: tl.constexpr, BC: tl.constexpr):
    """Sums over the batch of two (N, C) tensors."""
    first = tl.zeros((BN, BC), tl.float32)
    second = tl.zeros((BN, BC), tl.float32)
    for n0 in range(0, N, BN):
        at, inside = _column(c, C, there, N, n0, BN)
        first += tl.load(a + at, mask=inside, other=0.0)
        second += tl.load(b + at, mask=inside, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def bn_backward_kernel(
    dscale,
    dshift,
    scale,
    rstd,
    dvar2,
    dmean1,
    dweight,
    dbias,
    N,
    C,
    count,
    BN: tl.constexpr,
    BC: tl.constexpr,
):
    """(Eq. 7) dvar = -r^2/2 s sum_n ds, dmu = -s sum_n db, over count = N HW values a channel."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    ds, db = _sum_batch(dscale, dshift, c, there, N, C, BN, BC)
    s = tl.load(scale + c, mask=there, other=0.0)
    r = tl.load(rstd + c, mask=there, other=0.0)
    tl.store(dvar2 + c, -r * r * s * ds / count, mask=there)
    tl.store(dmean1 + c, -s * db / count, mask=there)
    tl.store(dweight + c, r * ds, mask=there)
    tl.store(dbias + c, db, mask=there)


@triton.jit
def sum_batch_kernel(a, b, a_out, b_out, N, C, BN: tl.constexpr, BC: tl.constexpr):
    """(Eq. 10) Sums over the batch of two (N, C) tensors."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    first, second = _sum_batch(a, b, c, there, N, C, BN, BC)
    tl.store(a_out + c, first, mask=there)
    tl.store(b_out + c, second, mask=there)


@triton.jit
def _group_cells(G, D, BG: tl.constexpr, BD: tl.constexpr):
    """Program -> (channels (BG, BD), their offsets, which are there): BG groups of D channels of one instance."""
    blocks = tl.cdiv(G, BG)
    pid = tl.program_id(0)
    g = pid % blocks * BG + tl.arange(0, BG)
    d = tl.arange(0, BD)
    c = g[:, None] * D + d[None, :]
    return c, pid // blocks * G * D + c, (g < G)[:, None] & (d < D)[None, :]


@triton.jit
def gn_kernel(mean, var, weight, centre, scale, rstd, G, D, eps, BG: tl.constexpr, BD: tl.constexpr):
    """(Eq. 8) GN's coefficients."""
    c, at, there = _group_cells(G, D, BG, BD)
    m = tl.load(mean + at, mask=there, other=0.0)
    first = tl.sum(tl.where(tl.arange(0, BD)[None, :] == 0, m, 0.0), 1)[:, None]
    mu = first + tl.sum(tl.where(there, m - first, 0.0), 1)[:, None] / D
    d = tl.where(there, m - mu, 0.0)
    pooled = tl.sum(tl.load(var + at, mask=there, other=0.0) + d * d, 1)[:, None] / D
    every = tl.zeros((BG, BD), tl.float32)
    s = tl.rsqrt(pooled + eps) + every
    tl.store(centre + at, mu + every, mask=there)
    tl.store(rstd + at, s, mask=there)
    if weight is not None:
        s *= tl.load(weight + c, mask=there, other=0.0).to(tl.float32)
    tl.store(scale + at, s, mask=there)


@triton.jit
def gn_backward_kernel(
    dscale, dshift, scale, rstd, dvar2, dmean1, dweight_n, G, D, count, BG: tl.constexpr, BD: tl.constexpr
):
    """(Eq. 9, 10) As for the batch, over count = HW D values a group; dweight_n is each instance's part of the weight's gradient."""
    _, at, there = _group_cells(G, D, BG, BD)
    s = tl.load(scale + at, mask=there, other=0.0)
    r = tl.load(rstd + at, mask=there, other=0.0)
    ds = tl.load(dscale + at, mask=there, other=0.0)
    db = tl.load(dshift + at, mask=there, other=0.0)
    tl.store(dweight_n + at, r * ds, mask=there)
    tl.store(dvar2 + at, -r * r * tl.sum(s * ds, 1)[:, None] / count, mask=there)
    tl.store(dmean1 + at, -tl.sum(s * db, 1)[:, None] / count + tl.zeros((BG, BD), tl.float32), mask=there)


@triton.jit
def _pool_and_store(
    pid, mean, var, centre, rstd, unbiased, N, C, unbias, eps, BN: tl.constexpr, BC: tl.constexpr
):
    c = pid * BC + tl.arange(0, BC)
    mu, pooled = _pool_batch(mean, var, c, c < C, N, C, BN, BC)
    _store_batch(mu, pooled, c, c < C, centre, rstd, unbiased, unbias, eps)


@triton.jit
def _project(
    pid, mean, var, fc, descriptor_scale, logits, N, C, K, unbias, eps,
    BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    n0 = pid * BN
    n = n0 + tl.arange(0, BN)
    k = tl.arange(0, KP)
    total = tl.zeros((BN, KP), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        at, inside = _column(c, C, c < C, N, n0, BN)
        q = tl.rsqrt(unbias * tl.load(var + at, mask=inside, other=0.0) + eps)
        tl.store(descriptor_scale + at, q, mask=inside)
        d = tl.load(mean + at, mask=inside, other=0.0) * q
        known = (k < K)[None, :] & (c < C)[:, None]
        f = tl.load(fc + k[None, :] * C + c[:, None], mask=known, other=0.0).to(tl.float32)
        total += tl.dot(d, f, input_precision="ieee")
    tl.store(logits + n[:, None] * K + k[None, :], total, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def an_project_kernel(
    mean, var, fc, centre, rstd, unbiased, descriptor_scale, logits, N, C, K, unbias_batch, eps, unbias, descriptor_eps,
    POOLS, BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """(Eq. 6, 11) The first POOLS programs pool the statistics of BC channels each, the others project BN descriptors each."""
    pid = tl.program_id(0)
    if pid < POOLS:
        _pool_and_store(pid, mean, var, centre, rstd, unbiased, N, C, unbias_batch, eps, BN, BC)
    else:
        _project(
            pid - POOLS, mean, var, fc, descriptor_scale, logits, N, C, K, unbias, descriptor_eps, BN, BC, KP
        )


@triton.jit
def an_attention_kernel(
    logits, gain, offset, mean_out, unbiased_out, rstd_out, standardized, attention, N, K, unbias, eps,
    NP: tl.constexpr,
):  # fmt: skip
    """(Eq. 12) One program a component: standardize its logits over the N instances, hsigmoid."""
    k = tl.program_id(0)
    n = tl.arange(0, NP)
    there = n < N
    value = tl.load(logits + n * K + k, mask=there, other=0.0)
    first = tl.load(logits + k)
    mean = first + tl.sum(tl.where(there, value - first, 0.0), 0) / N
    d = tl.where(there, value - mean, 0.0)
    var = tl.sum(d * d, 0) / N
    r = tl.rsqrt(var + eps)
    tl.store(mean_out + k, mean)
    tl.store(unbiased_out + k, var * unbias)
    tl.store(rstd_out + k, r)
    h = (value - mean) * r
    z = h * tl.load(gain + k).to(tl.float32) + tl.load(offset + k).to(tl.float32) + 3.0
    tl.store(standardized + n * K + k, h, mask=there)
    tl.store(attention + n * K + k, tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z)) / 6.0, mask=there)


@triton.jit
def an_mix_kernel(
    attention,
    mix_weight,
    mix_bias,
    rstd,
    scale,
    shift,
    N,
    C,
    K,
    BN: tl.constexpr,
    BC: tl.constexpr,
    KP: tl.constexpr,
):
    """(Eq. 13) """
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    k = tl.arange(0, KP)
    g = tl.load(attention + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    mixture = k[:, None] * C + c[None, :]
    known = (k < K)[:, None] & (c < C)[None, :]
    w = tl.load(mix_weight + mixture, mask=known, other=0.0).to(tl.float32)
    b = tl.load(mix_bias + mixture, mask=known, other=0.0).to(tl.float32)
    r = tl.load(rstd + c, mask=c < C, other=0.0)[None, :]
    at, there = _column(c, C, c < C, N, n0, BN)
    tl.store(scale + at, tl.dot(g, w, input_precision="ieee") * r, mask=there)
    tl.store(shift + at, tl.dot(g, b, input_precision="ieee"), mask=there)


@triton.jit
def _mixtures_backward(
    pid, dscale, dshift, scale, rstd, attention, dmix_weight, dmix_bias, dvar2, dmean1, N, C, K, count,
    BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Gradients of the mixtures (K, C), and of the batch statistics as in ``bn_backward_kernel``, for BC channels."""
    c = pid * BC + tl.arange(0, BC)
    there = c < C
    k = tl.arange(0, KP)
    dw = tl.zeros((KP, BC), tl.float32)
    db = tl.zeros((KP, BC), tl.float32)
    of_var = tl.zeros((BN, BC), tl.float32)
    of_mean = tl.zeros((BN, BC), tl.float32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        at, inside = _column(c, C, there, N, n0, BN)
        g = tl.load(
            attention + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0
        )
        of_scale = tl.load(dscale + at, mask=inside, other=0.0)
        of_shift = tl.load(dshift + at, mask=inside, other=0.0)
        s = tl.load(scale + at, mask=inside, other=0.0)
        dw += tl.dot(g, of_scale, input_precision="ieee")
        db += tl.dot(g, of_shift, input_precision="ieee")
        of_var += s * of_scale
        of_mean += s * of_shift
    r = tl.load(rstd + c, mask=there, other=0.0)
    mixture = k[:, None] * C + c[None, :]
    known = (k < K)[:, None] & there[None, :]
    tl.store(dmix_weight + mixture, dw * r[None, :], mask=known)
    tl.store(dmix_bias + mixture, db, mask=known)
    tl.store(dvar2 + c, -r * r * tl.sum(of_var, 0) / count, mask=there)
    tl.store(dmean1 + c, -tl.sum(of_mean, 0) / count, mask=there)


@triton.jit
def _gates_backward(
    pid, dscale, dshift, rstd, attention, mix_weight, mix_bias, dgates, N, C, K,
    BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Gradient before the hsigmoid, (N, K), for BN instances."""
    n0 = pid * BN
    n = n0 + tl.arange(0, BN)
    k = tl.arange(0, KP)
    total = tl.zeros((BN, KP), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        at, inside = _column(c, C, c < C, N, n0, BN)
        mixture = k[None, :] * C + c[:, None]
        known = (k < K)[None, :] & (c < C)[:, None]
        w = tl.load(mix_weight + mixture, mask=known, other=0.0).to(tl.float32)
        b = tl.load(mix_bias + mixture, mask=known, other=0.0).to(tl.float32)
        r = tl.load(rstd + c, mask=c < C, other=0.0)[None, :]
        total += tl.dot(tl.load(dscale + at, mask=inside, other=0.0) * r, w, input_precision="ieee")
        total += tl.dot(tl.load(dshift + at, mask=inside, other=0.0), b, input_precision="ieee")
    cells = n[:, None] * K + k[None, :]
    there = (n < N)[:, None] & (k < K)[None, :]
    g = tl.load(attention + cells, mask=there, other=0.0)
    tl.store(dgates + cells, tl.where((g <= 0) | (g >= 1), 0.0, total / 6.0), mask=there)


@triton.jit
def an_mix_backward_kernel(
    dscale, dshift, scale, rstd, attention, mix_weight, mix_bias, dmix_weight, dmix_bias, dvar2, dmean1, dgates,
    N, C, K, count, POOLS, BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """(Eq. 7, 14, 16) The first POOLS programs take BC channels each, the others BN instances each."""
    pid = tl.program_id(0)
    if pid < POOLS:
        _mixtures_backward(
            pid, dscale, dshift, scale, rstd, attention, dmix_weight, dmix_bias, dvar2, dmean1, N, C, K, count,
            BN, BC, KP,
        )  # fmt: skip
    else:
        _gates_backward(
            pid - POOLS, dscale, dshift, rstd, attention, mix_weight, mix_bias, dgates, N, C, K, BN, BC, KP
        )


@triton.jit
def an_attention_backward_kernel(
    dgates, standardized, gain, rstd, dlogits, dgain, doffset, N, K, NP: tl.constexpr
):
    """(Eq. 15) One program a component: through gain, offset and the standardization over the N instances."""
    k = tl.program_id(0)
    n = tl.arange(0, NP)
    there = n < N
    g = tl.load(dgates + n * K + k, mask=there, other=0.0)
    h = tl.load(standardized + n * K + k, mask=there, other=0.0)
    total = tl.sum(g, 0)
    product = tl.sum(g * h, 0)
    tl.store(dgain + k, product)
    tl.store(doffset + k, total)
    r = tl.load(rstd + k) * tl.load(gain + k).to(tl.float32)
    tl.store(dlogits + n * K + k, (g - (total + h * product) / N) * r, mask=there)


@triton.jit
def an_backward_kernel(
    mean, centre, descriptor_scale, batch_dvar2, batch_dmean1, dlogits, fc, dvar2, dmean1, dfc,
    N, C, K, count, unbias, BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """(Eq. 16) The batch statistics' part and the descriptor's part of dvar2 and dmean1 (N, C), count = HW; dfc (K, C)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    k = tl.arange(0, KP)
    mixture = k[:, None] * C + c[None, :]
    known = (k < K)[:, None] & there[None, :]
    f = tl.load(fc + mixture, mask=known, other=0.0).to(tl.float32)
    mu = tl.load(centre + c, mask=there, other=0.0)[None, :]
    of_var = tl.load(batch_dvar2 + c, mask=there, other=0.0)[None, :]
    of_mean = tl.load(batch_dmean1 + c, mask=there, other=0.0)[None, :]
    total = tl.zeros((KP, BC), tl.float32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        at, inside = _column(c, C, there, N, n0, BN)
        m = tl.load(mean + at, mask=inside, other=0.0)
        q = tl.load(descriptor_scale + at, mask=inside, other=0.0)
        g = tl.load(
            dlogits + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0
        )
        dq = tl.dot(g, f, input_precision="ieee") * q / count
        tl.store(dvar2 + at, of_var - unbias * dq * m * q * q, mask=inside)
        tl.store(dmean1 + at, dq + of_var * (m - mu) + of_mean, mask=inside)
        total += tl.dot(tl.trans(g), m * q, input_precision="ieee")
    tl.store(dfc + mixture, total, mask=known)
