"""Coefficients of the hot laws as Triton kernels: BN, GN, AN over BN, forward and backward, one to three launches each.

In plain PyTorch the (N, C) part of AN is some hundred kernels of a few microseconds; on a fast GPU that is more time
than its passes take. A forward maps moments to coefficients of y = scale * (x - centre) + shift; a backward maps the
sums of ``affine_backward``, dscale and dshift (N, C), to what ``moments_backward`` adds to dx and to the parameters'
gradients. No atomics: every sum has one owner and a fixed order.
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
    "gn_parameters_kernel",
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
def bn_kernel(mean, var, weight, mu_out, var_out, scale_out, N, C, eps, BN: tl.constexpr, BC: tl.constexpr):
    """mu, pooled variance and scale = weight / sqrt(variance + eps), (C,)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    mu, pooled = _pool_batch(mean, var, c, there, N, C, BN, BC)
    scale = tl.rsqrt(pooled + eps)
    if weight is not None:
        scale *= tl.load(weight + c, mask=there, other=0.0).to(tl.float32)
    tl.store(mu_out + c, mu, mask=there)
    tl.store(var_out + c, pooled, mask=there)
    tl.store(scale_out + c, scale, mask=there)


@triton.jit
def bn_backward_kernel(
    dscale, dshift, mean, mu, var, scale, dvar2, dmean1, dweight, dbias, N, C, count, eps,
    BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dvar2 (C,), dmean1 (N, C), dweight, dbias (C,)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    of_scale = tl.zeros((BN, BC), tl.float32)
    of_shift = tl.zeros((BN, BC), tl.float32)
    for n0 in range(0, N, BN):
        at, inside = _column(c, C, there, N, n0, BN)
        of_scale += tl.load(dscale + at, mask=inside, other=0.0)
        of_shift += tl.load(dshift + at, mask=inside, other=0.0)
    ds = tl.sum(of_scale, 0)
    db = tl.sum(of_shift, 0)
    s = tl.load(scale + c, mask=there, other=0.0)
    m = tl.load(mu + c, mask=there, other=0.0)
    r = tl.rsqrt(tl.load(var + c, mask=there, other=1.0) + eps)
    dv = -0.5 * r * r * s * ds / N
    dm = -s * db / N
    tl.store(dweight + c, ds * r, mask=there)
    tl.store(dbias + c, db, mask=there)
    tl.store(dvar2 + c, 2.0 * dv / count, mask=there)
    for n0 in range(0, N, BN):
        at, inside = _column(c, C, there, N, n0, BN)
        d = tl.load(mean + at, mask=inside, other=0.0) - m[None, :]
        tl.store(dmean1 + at, (dm[None, :] + 2.0 * dv[None, :] * d) / count, mask=inside)


@triton.jit
def _group_cells(G, D, BG: tl.constexpr, BD: tl.constexpr):
    """Program -> (n, channels (BG, BD), which are there): BG groups of D channels of one instance."""
    blocks = tl.cdiv(G, BG)
    pid = tl.program_id(0)
    g = pid % blocks * BG + tl.arange(0, BG)
    d = tl.arange(0, BD)
    return pid // blocks, g[:, None] * D + d[None, :], (g < G)[:, None] & (d < D)[None, :]


@triton.jit
def gn_kernel(mean, var, weight, centre, scale, G, D, eps, BG: tl.constexpr, BD: tl.constexpr):
    """centre = mu of the group, scale = weight / sqrt(variance of the group + eps), (N, C)."""
    n, c, there = _group_cells(G, D, BG, BD)
    at = n * G * D + c
    m = tl.load(mean + at, mask=there, other=0.0)
    first = tl.sum(tl.where(tl.arange(0, BD)[None, :] == 0, m, 0.0), 1)[:, None]
    mu = first + tl.sum(tl.where(there, m - first, 0.0), 1)[:, None] / D
    d = tl.where(there, m - mu, 0.0)
    pooled = tl.sum(tl.load(var + at, mask=there, other=0.0) + d * d, 1)[:, None] / D
    s = tl.rsqrt(pooled + eps) + tl.zeros((BG, BD), tl.float32)
    if weight is not None:
        s *= tl.load(weight + c, mask=there, other=0.0).to(tl.float32)
    tl.store(centre + at, mu + tl.zeros((BG, BD), tl.float32), mask=there)
    tl.store(scale + at, s, mask=there)


@triton.jit
def gn_backward_kernel(
    dscale, dshift, mean, var, weight, centre, dvar2, dmean1, dweight_n, G, D, count, eps,
    BG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dvar2, dmean1 (N, C), and each instance's part of the weight's gradient, dscale / sqrt(variance + eps)."""
    n, c, there = _group_cells(G, D, BG, BD)
    at = n * G * D + c
    mu = tl.load(centre + at, mask=there, other=0.0)
    d = tl.load(mean + at, mask=there, other=0.0) - mu
    pooled = tl.sum(tl.load(var + at, mask=there, other=0.0) + d * d, 1)[:, None] / D
    r = tl.rsqrt(pooled + eps)
    dr = tl.load(dscale + at, mask=there, other=0.0)
    tl.store(dweight_n + at, dr * r, mask=there)
    db = tl.load(dshift + at, mask=there, other=0.0)
    if weight is not None:
        w = tl.load(weight + c, mask=there, other=0.0).to(tl.float32)
        dr *= w
        db *= w
    count *= D
    dv = -0.5 * r * r * r * tl.sum(dr, 1)[:, None]
    dm = -r * tl.sum(db, 1)[:, None]
    tl.store(dvar2 + at, 2.0 * dv / count + tl.zeros((BG, BD), tl.float32), mask=there)
    tl.store(dmean1 + at, (dm + 2.0 * dv * d) / count, mask=there)


@triton.jit
def gn_parameters_kernel(dweight_n, dshift, dweight, dbias, N, C, BN: tl.constexpr, BC: tl.constexpr):
    """Sums over the batch, (C,)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    first = tl.zeros((BN, BC), tl.float32)
    second = tl.zeros((BN, BC), tl.float32)
    for n0 in range(0, N, BN):
        at, inside = _column(c, C, there, N, n0, BN)
        first += tl.load(dweight_n + at, mask=inside, other=0.0)
        second += tl.load(dshift + at, mask=inside, other=0.0)
    tl.store(dweight + c, tl.sum(first, 0), mask=there)
    tl.store(dbias + c, tl.sum(second, 0), mask=there)


@triton.jit
def an_project_kernel(
    mean, var, fc, mu_out, var_out, a, N, C, K, unbias, eps_rsd, POOLS,
    BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The first POOLS programs pool the statistics of BC channels each; the others project the descriptor
    d = mean / sqrt(unbias * var + eps_rsd) of BN instances: a = d fc^T, (N, K)."""
    pid = tl.program_id(0)
    if pid < POOLS:
        c = pid * BC + tl.arange(0, BC)
        mu, pooled = _pool_batch(mean, var, c, c < C, N, C, BN, BC)
        tl.store(mu_out + c, mu, mask=c < C)
        tl.store(var_out + c, pooled, mask=c < C)
    else:
        n0 = (pid - POOLS) * BN
        n = n0 + tl.arange(0, BN)
        k = tl.arange(0, KP)
        total = tl.zeros((BN, KP), tl.float32)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            at, inside = _column(c, C, c < C, N, n0, BN)
            rs = tl.rsqrt(unbias * tl.load(var + at, mask=inside, other=0.0) + eps_rsd)
            d = tl.load(mean + at, mask=inside, other=0.0) * rs
            weights = (k < K)[None, :] & (c < C)[:, None]
            f = tl.load(fc + k[None, :] * C + c[:, None], mask=weights, other=0.0).to(tl.float32)
            total += tl.dot(d, f, input_precision="ieee")
        tl.store(a + n[:, None] * K + k[None, :], total, mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def an_attention_kernel(
    a, weight, bias, mean_out, var_out, normal, gates, N, K, eps, BATCH: tl.constexpr, NP: tl.constexpr
):
    """One program an output k: BN over the N instances, hsigmoid. BATCH False: mean_out and var_out are given.

    normal = (a - mean) / sqrt(var + eps), gates = min(max(weight * normal + bias + 3, 0), 6) / 6, (N, K).
    """
    k = tl.program_id(0)
    n = tl.arange(0, NP)
    there = n < N
    value = tl.load(a + n * K + k, mask=there, other=0.0)
    if BATCH:
        first = tl.load(a + k)
        mean = first + tl.sum(tl.where(there, value - first, 0.0), 0) / N
        d = tl.where(there, value - mean, 0.0)
        var = tl.sum(d * d, 0) / N
        tl.store(mean_out + k, mean)
        tl.store(var_out + k, var)
    else:
        mean = tl.load(mean_out + k).to(tl.float32)
        var = tl.load(var_out + k).to(tl.float32)
    h = (value - mean) * tl.rsqrt(var + eps)
    z = h * tl.load(weight + k).to(tl.float32) + tl.load(bias + k).to(tl.float32) + 3.0
    z = tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))
    tl.store(normal + n * K + k, h, mask=there)
    tl.store(gates + n * K + k, z / 6.0, mask=there)


@triton.jit
def an_mix_kernel(
    gates, weight, bias, var, scale, shift, N, C, K, eps, BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr
):
    """scale = (gates weight) / sqrt(var + eps), shift = gates bias, (N, C)."""
    n0 = tl.program_id(0) * BN
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    k = tl.arange(0, KP)
    n = n0 + tl.arange(0, BN)
    g = tl.load(gates + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
    mixture = k[:, None] * C + c[None, :]
    inside = (k < K)[:, None] & (c < C)[None, :]
    r = tl.rsqrt(tl.load(var + c, mask=c < C, other=1.0).to(tl.float32) + eps)[None, :]
    at, there = _column(c, C, c < C, N, n0, BN)
    w = tl.load(weight + mixture, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale + at, tl.dot(g, w, input_precision="ieee") * r, mask=there)
    b = tl.load(bias + mixture, mask=inside, other=0.0).to(tl.float32)
    tl.store(shift + at, tl.dot(g, b, input_precision="ieee"), mask=there)


@triton.jit
def an_mix_backward_kernel(
    dscale, dshift, gates, scale, weight, bias, var, dweight, dbias, dmu, dvar, dz, N, C, K, eps, POOLS,
    BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The first POOLS programs: gradients of the mixture (K, C) and of the pooled statistics (C,) for BC channels each;
    the others: dz = hsigmoid' * (gradient of the gates), (N, K), for BN instances each."""
    pid = tl.program_id(0)
    k = tl.arange(0, KP)
    if pid < POOLS:
        c = pid * BC + tl.arange(0, BC)
        there = c < C
        r = tl.rsqrt(tl.load(var + c, mask=there, other=1.0).to(tl.float32) + eps)
        dw = tl.zeros((KP, BC), tl.float32)
        db = tl.zeros((KP, BC), tl.float32)
        of_var = tl.zeros((BN, BC), tl.float32)
        of_mu = tl.zeros((BN, BC), tl.float32)
        for n0 in range(0, N, BN):
            n = n0 + tl.arange(0, BN)
            at, inside = _column(c, C, there, N, n0, BN)
            g = tl.load(gates + n[None, :] * K + k[:, None], mask=(n < N)[None, :] & (k < K)[:, None], other=0.0)
            ds = tl.load(dscale + at, mask=inside, other=0.0)
            dh = tl.load(dshift + at, mask=inside, other=0.0)
            s = tl.load(scale + at, mask=inside, other=0.0)
            dw += tl.dot(g, ds, input_precision="ieee")
            db += tl.dot(g, dh, input_precision="ieee")
            of_var += s * ds
            of_mu += s * dh
        mixture = k[:, None] * C + c[None, :]
        inside = (k < K)[:, None] & there[None, :]
        tl.store(dweight + mixture, dw * r[None, :], mask=inside)
        tl.store(dbias + mixture, db, mask=inside)
        tl.store(dvar + c, -0.5 * r * r * tl.sum(of_var, 0), mask=there)
        tl.store(dmu + c, -tl.sum(of_mu, 0), mask=there)
    else:
        n0 = (pid - POOLS) * BN
        n = n0 + tl.arange(0, BN)
        total = tl.zeros((BN, KP), tl.float32)
        for c0 in range(0, C, BC):
            c = c0 + tl.arange(0, BC)
            at, inside = _column(c, C, c < C, N, n0, BN)
            r = tl.rsqrt(tl.load(var + c, mask=c < C, other=1.0).to(tl.float32) + eps)
            mixture = k[None, :] * C + c[:, None]
            known = (k < K)[None, :] & (c < C)[:, None]
            w = tl.load(weight + mixture, mask=known, other=0.0).to(tl.float32)
            b = tl.load(bias + mixture, mask=known, other=0.0).to(tl.float32)
            total += tl.dot(tl.load(dscale + at, mask=inside, other=0.0) * r[None, :], w, input_precision="ieee")
            total += tl.dot(tl.load(dshift + at, mask=inside, other=0.0), b, input_precision="ieee")
        cells = n[:, None] * K + k[None, :]
        there = (n < N)[:, None] & (k < K)[None, :]
        g = tl.load(gates + cells, mask=there, other=0.0)
        tl.store(dz + cells, tl.where((g <= 0) | (g >= 1), 0.0, total / 6.0), mask=there)


@triton.jit
def an_attention_backward_kernel(
    dz, normal, weight, var, da, dweight, dbias, N, K, eps, BATCH: tl.constexpr, NP: tl.constexpr
):
    """One program an output k: through the affine and the BN over the N instances, to da (N, K)."""
    k = tl.program_id(0)
    n = tl.arange(0, NP)
    there = n < N
    g = tl.load(dz + n * K + k, mask=there, other=0.0)
    h = tl.load(normal + n * K + k, mask=there, other=0.0)
    db = tl.sum(g, 0)
    dw = tl.sum(g * h, 0)
    tl.store(dweight + k, dw)
    tl.store(dbias + k, db)
    if BATCH:
        g = g - (db + h * dw) / N
    r = tl.rsqrt(tl.load(var + k).to(tl.float32) + eps) * tl.load(weight + k).to(tl.float32)
    tl.store(da + n * K + k, g * r, mask=there)


@triton.jit
def an_backward_kernel(
    mean, var, mu, dmu, dvar, da, fc, dvar2, dmean1, dfc, N, C, K, count, unbias, eps_rsd, BATCH: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """dvar2, dmean1 (N, C) through descriptor and (BATCH) pooled statistics; the projection's gradient dfc (K, C)."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    there = c < C
    k = tl.arange(0, KP)
    mixture = k[:, None] * C + c[None, :]
    known = (k < K)[:, None] & there[None, :]
    f = tl.load(fc + mixture, mask=known, other=0.0).to(tl.float32)
    if BATCH:
        centre = tl.load(mu + c, mask=there, other=0.0)[None, :]
        dm_pooled = tl.load(dmu + c, mask=there, other=0.0)[None, :] / N
        dv_pooled = tl.load(dvar + c, mask=there, other=0.0)[None, :] / N
    total = tl.zeros((KP, BC), tl.float32)
    for n0 in range(0, N, BN):
        n = n0 + tl.arange(0, BN)
        at, inside = _column(c, C, there, N, n0, BN)
        m = tl.load(mean + at, mask=inside, other=0.0)
        rs = tl.rsqrt(unbias * tl.load(var + at, mask=inside, other=0.0) + eps_rsd)
        g = tl.load(da + n[:, None] * K + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        dd = tl.dot(g, f, input_precision="ieee")
        dm = dd * rs
        dv = -0.5 * unbias * dm * m * rs * rs
        if BATCH:
            dm += dm_pooled + 2.0 * dv_pooled * (m - centre)
            dv += dv_pooled
        tl.store(dvar2 + at, 2.0 * dv / count, mask=inside)
        tl.store(dmean1 + at, dm / count, mask=inside)
        total += tl.dot(tl.trans(g), m * rs, input_precision="ieee")
    tl.store(dfc + mixture, total, mask=known)
