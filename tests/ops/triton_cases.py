"""The Triton kernels against the float64 formula. test_triton.py runs this file: in the interpreter, and on a GPU.

Every test runs with uninitialised memory filled with NaN, so that a cell that no program writes shows.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from anorm import algebra, ops
from anorm.ops import reference, triton
from anorm.ops.triton import laws as triton_laws
from anorm.ops.triton import passes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
ACTS = ("none", "relu", "relu6")
# Triton 3.6, numpy
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
# odd sizes, prime channels, 1x1, one instance; the last two have reductions in several splits in both layouts
SHAPES = [(2, 7, 5, 3), (3, 67, 4, 4), (5, 24, 1, 1), (1, 3, 40, 37), (2, 40, 16, 12)]

# One rounding of the result, twice for bf16 in the interpreter, which truncates where a GPU rounds to nearest
# (half a unit in the last place is eps / 2; eps of bf16 is 2^-7). Sums of HW terms in float32 stay below 4 units.
EPS = {
    torch.float64: 4e-15,
    torch.float32: 1e-6,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8 * (1 + INTERPRETED),
}


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills with NaN
    yield
    torch.use_deterministic_algorithms(False)


def acc(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def feature_map(shape, dtype=torch.float32, layout="nchw", mean=0.5):
    return (torch.randn(shape, device=DEVICE) + mean).to(dtype).to(memory_format=LAYOUTS[layout])


def coefficients(shape, dtype, rows=(False, True, True)):
    """centre, scale, shift, each (N, C) or (C,), with scales of both signs."""
    n, c = shape[:2]
    return [torch.randn((n, c) if row else (c,), dtype=acc(dtype), device=DEVICE) for row in rows]


def spread(t):
    return t.double()[..., None, None]


def assert_near(result, exact, dtype, scale=None):
    """|error| <= a rounding of the result's dtype; ``scale`` bounds the terms of a sum that may cancel."""
    error = (result.double() - exact).abs()
    bound = EPS[dtype] * (exact.abs() + 1e-3 if scale is None else scale.double() + 1e-3)
    assert bool((error <= bound).all()), (
        f"error {error.max():.2e}, {(error / bound).max():.2f} times the bound"
    )


def test_the_shapes_reach_every_way_of_cutting():
    for layout in (True, False):
        plans = [passes.plan(n, c, h * w, layout) for n, c, h, w in SHAPES]
        assert {p.splits > 1 for p in plans} == {True, False}
        assert {p.align > 1 for p in plans} == {True, False}
        assert any(
            p.rows > p.block_r
            for p in (passes.plan(64, 256, 3136, layout), passes.plan(1, 64, 10**6, layout))
        )


@pytest.mark.parametrize("hw", [1, 49, 196, 3136, 12544, 10**6])
@pytest.mark.parametrize("c", [1, 3, 24, 64, 67, 2048])
def test_every_plan_covers_its_map(hw, c):
    for n in (1, 2, 256):
        for channels_last in (True, False):
            p = passes.plan(n, c, hw, channels_last)
            assert p.splits * p.rows >= hw > (p.splits - 1) * p.rows and p.rows % p.block_r == 0
            assert p.blocks * p.block_r >= hw
            assert p.splits <= 512 and p.block_r * p.block_c <= passes.TILE and p.warps in (1, 2, 4, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_moments(shape, layout, dtype):
    x = feature_map(shape, dtype, layout)
    mean, var = triton.moments(x)
    exact = x.double().flatten(2)
    precision = acc(dtype)
    assert mean.dtype == var.dtype == precision and mean.shape == var.shape == shape[:2]
    assert_near(mean, exact.mean(2), precision, exact.abs().mean(2))
    assert_near(var, exact.var(2, correction=0), precision)
    alone, nothing = triton.moments(x, var=False)
    assert nothing is None and torch.equal(alone, mean)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mean", [1e2, 1e4])
def test_variance_far_from_zero(layout, mean):
    x = feature_map((1, 5, 40, 37), layout=layout, mean=mean)
    exact = x.double().var((2, 3), correction=0)
    torch.testing.assert_close(triton.moments(x)[1].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_with_an_outlier_first(layout):
    x = feature_map((1, 5, 40, 37), layout=layout)
    x[:, :, 0, 0] = 1000.0
    exact = x.double().var((2, 3), correction=0)
    torch.testing.assert_close(triton.moments(x)[1].double(), exact, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_moments_of_constants_infinities_and_nans(layout):
    x = feature_map((1, 4, 40, 37), layout=layout)
    x[:, 0] = 0.1
    x[:, 1, 0, 0] = float("inf")
    x[:, 2, -1, -1] = float("-inf")
    x[:, 3, 20, 20] = float("nan")
    mean, var = triton.moments(x)
    assert 0 <= var[0, 0] < 1e-12
    assert mean[0, 1] == float("inf") and mean[0, 2] == float("-inf") and mean[0, 3].isnan()
    assert var[0, 1:].isnan().all()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_affine(layout, dtype, act):
    shape = (2, 24, 9, 8)
    x = feature_map(shape, dtype, layout)
    for rows, residual in (
        ((False, False, False), None),
        ((True, True, True), feature_map(shape, dtype, layout)),
        ((False, True, False), feature_map((2, 24, 8, 9), dtype).transpose(2, 3)),
    ):
        c, s, b = coefficients(shape, dtype, rows)
        y = triton.affine(x, c, s, b, residual, act)
        assert y.dtype == dtype and y.stride() == x.stride()
        added = 0 if residual is None else residual.double()
        exact = spread(s) * (x.double() - spread(c)) + spread(b) + added
        # roundings of each term
        size = (spread(s) * (x.double() - spread(c))).abs() + spread(b).abs() + abs(added)
        bound = size if acc(dtype) == dtype else exact.abs() + 1e-3 * size
        assert_near(y, {"none": exact, "relu": exact.relu(), "relu6": exact.clamp(0, 6)}[act], dtype, bound)


def mask_of(y, act):
    """Where the activation passes the gradient, told from what the forward pass wrote."""
    if act == "none":
        return torch.ones_like(y, dtype=torch.double)
    return (~(y <= 0) & ~(y >= 6) if act == "relu6" else ~(y <= 0)).double()


def gradients(shape, dtype):
    """Upstream gradients of every kind of stride: contiguous, transposed, expanded."""
    yield feature_map(shape, dtype, "nchw", 0)
    yield feature_map((shape[0], shape[1], shape[3], shape[2]), dtype, "nhwc", 0).transpose(2, 3)
    yield feature_map((*shape[:2], 1, 1), dtype, "nchw", 0).expand(shape)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_backward(layout, dtype, act):
    """All results of both backward passes, the mask recomputed from x and read from y."""
    shape = (2, 24, 9, 8)
    x = feature_map(shape, dtype, layout)
    residual = feature_map(shape, dtype, layout)
    c, s, b = coefficients(shape, dtype)
    mean, dvar2, dmean1 = coefficients(shape, dtype, (True, True, True))
    plain, added = triton.affine(x, c, s, b, None, act), triton.affine(x, c, s, b, residual, act)
    d = x.double() - spread(c)
    for dy in gradients(shape, dtype):
        for y, forward in ((None, plain), (added, added)):
            g = dy.double() * mask_of(forward, act)
            dscale, dshift, written = triton.affine_backward(dy, x, c, s, b, y, act)
            assert dscale.dtype == acc(dtype) and dscale.shape == dshift.shape == shape[:2]
            assert_near(dshift, g.sum((2, 3)), acc(dtype), g.abs().sum((2, 3)))
            assert_near(dscale, (g * d).sum((2, 3)), acc(dtype), (g * d).abs().sum((2, 3)))
            if y is None or act == "none":
                assert written is None
            else:
                assert torch.equal(written.double(), g) and written.stride() == x.stride()

        g = dy.double() * mask_of(plain, act)
        terms = [spread(s) * g, spread(dvar2) * (x.double() - spread(mean)), spread(dmean1)]
        for given, count in (((mean, dvar2, dmean1), 3), ((None, None, None), 1)):
            dx = triton.moments_backward(dy, x, c, s, b, *given, act)
            assert dx.dtype == dtype and dx.stride() == x.stride()
            size = sum(t.abs() for t in terms[:count])
            exact = sum(terms[:count])
            assert_near(dx, exact, dtype, size if acc(dtype) == dtype else exact.abs() + 1e-3 * size)
        alone = triton.moments_backward(dy, x, c, s, b, mean, None, dmean1, act)
        assert_near(alone, terms[0] + terms[2], dtype, terms[0].abs() + terms[2].abs())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_passes_agree_with_the_reference_in_every_shape(shape, layout):
    x, dy = feature_map(shape, layout=layout), feature_map(shape, layout=layout, mean=0)
    c, s, b = coefficients(shape, torch.float32)
    y = triton.affine(x, c, s, b, None, "none")
    assert_near(y, reference.affine(x.double(), c.double(), s.double(), b.double(), None, "none"), torch.float32,
                (spread(s) * (x.double() - spread(c))).abs() + spread(b).abs())  # fmt: skip
    dscale, dshift, _ = triton.affine_backward(dy, x, c, s, b, None, "none")
    d = dy.double() * (x.double() - spread(c))
    assert_near(dscale, d.sum((2, 3)), torch.float32, d.abs().sum((2, 3)))
    assert_near(dshift, dy.double().sum((2, 3)), torch.float32, dy.double().abs().sum((2, 3)))
    dx = triton.moments_backward(dy, x, c, s, b, s, s, b, "none")
    part = spread(s) * (x.double() - spread(s))
    exact = spread(s) * dy.double() + part + spread(b)
    assert_near(dx, exact, torch.float32, (spread(s) * dy.double()).abs() + part.abs() + spread(b).abs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_the_recomputed_mask_is_the_forward_mask(dtype, act):
    """Pre-activations that only round to 0 (float16's underflow) or to 6 close the gate, as y itself says."""
    z = torch.cat((torch.logspace(-12, 0, 500), 6 - torch.logspace(-5, 0, 500), torch.zeros(24)))
    z = torch.cat((z, -z)).to(DEVICE)
    x = torch.ones(1, 2048, 1, 1, device=DEVICE, dtype=dtype)
    c, s = torch.zeros(2048, device=DEVICE), torch.ones(2048, device=DEVICE)
    shift = z - 1
    y = triton.affine(x, c, s, shift, None, act)
    dx = triton.moments_backward(torch.ones_like(x), x, c, s, shift, None, None, None, act)
    assert torch.equal(dx.double(), mask_of(y, act))
    if act == "relu6" and not (INTERPRETED and dtype == torch.bfloat16):  # truncation never reaches 6
        assert ((y == 6) & (z.view_as(y) < 6)).any()


@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_nan_passes_and_infinities_do_not_stop_a_gradient(act):
    x = feature_map((1, 16, 3, 3))
    x[0, 3, 1, 1] = float("nan")
    c, s, b = torch.zeros(16, device=DEVICE), torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE)
    y = triton.affine(x, c, s, b, None, act)
    assert y[0, 3, 1, 1].isnan() and y.isnan().sum() == 1
    dy = torch.ones_like(x)
    dy[0, 5] = float("inf")
    x[0, 5] = 1.0
    dx = triton.moments_backward(dy, x, c, s, b, None, None, None, act)
    # as torch's threshold_backward; GradScaler sees it
    assert dx[0, 3, 1, 1] == 1 and (dx[0, 5] == float("inf")).all()
    assert triton.affine_backward(dy, x, c, s, b, None, act)[1][0, 5] == float("inf")


def test_sliced_and_expanded_maps():
    wide = feature_map((2, 16, 6, 10))
    maps = (
        wide[:, :, :, 2:7],
        wide[:, ::2],
        feature_map((2, 16, 1, 1)).expand(2, 16, 3, 5),
        wide.transpose(2, 3),
    )
    for x in maps:
        c, s, b = coefficients(x.shape, torch.float32)
        same = x.contiguous()
        assert torch.equal(triton.moments(x)[1], triton.moments(same)[1])
        assert torch.equal(
            triton.affine(x, c, s, b, None, "relu"), triton.affine(same, c, s, b, None, "relu")
        )
        dy = feature_map(x.shape)
        for a, e in zip(triton.affine_backward(dy, x, c, s, b, x, "relu"),
                        triton.affine_backward(dy, same, c, s, b, same, "relu"), strict=True):  # fmt: skip
            assert torch.equal(a, e)
        assert torch.equal(triton.moments_backward(dy, x, c, s, b, s, s, b, "relu"),
                           triton.moments_backward(dy, same, c, s, b, s, s, b, "relu"))  # fmt: skip


def test_coefficients_that_are_expanded_over_the_batch():
    """The autograd bridge hands a (C,) coefficient back as an expanded (N, C)."""
    x, dy = feature_map((3, 8, 4, 4)), feature_map((3, 8, 4, 4))
    short = coefficients(x.shape, torch.float32, (False, False, False))
    long = [t.expand(3, 8) for t in short]
    for function in (
        lambda c, s, b: triton.affine(x, c, s, b, None, "relu"),
        lambda c, s, b: triton.moments_backward(dy, x, c, s, b, None, None, None, "relu"),
        lambda c, s, b: triton.affine_backward(dy, x, c, s, b, None, "relu")[0],
    ):
        assert torch.equal(function(*short), function(*long))


def test_an_empty_batch():
    x = torch.empty(0, 8, 4, 4, device=DEVICE)
    c, s, b = coefficients(x.shape, torch.float32)
    assert triton.moments(x)[0].shape == (0, 8)
    assert triton.affine(x, c, s, b, x, "relu").shape == x.shape
    dscale, dshift, g = triton.affine_backward(x, x, c, s, b, x, "relu")
    assert dscale.shape == dshift.shape == (0, 8) and g.shape == x.shape
    assert triton.moments_backward(x, x, c, s, b, s, s, b, "relu").shape == x.shape


def test_runs_are_bitwise_equal():
    x, dy = feature_map((2, 24, 40, 37), layout="nhwc"), feature_map((2, 24, 40, 37))
    c, s, b = coefficients(x.shape, torch.float32)
    for function in (
        lambda: triton.moments(x),
        lambda: triton.affine_backward(dy, x, c, s, b, None, "relu")[:2],
    ):
        for first, second in zip(function(), function(), strict=True):
            assert torch.equal(first, second)


def test_the_operators_are_well_formed():
    x = feature_map((2, 4, 3, 3), layout="nhwc")
    c, s, b = coefficients(x.shape, torch.float32)
    o = torch.ops.anorm_triton
    for operator, arguments in (
        (o.moments, (x,)),
        (o.mean, (x,)),
        (o.affine, (x, c, s, b, None, "relu")),
        (o.affine, (x, c, s, b, x, "none")),
        (o.affine_backward, (x, x, c, s, b, "relu")),
        (o.affine_backward_residual, (x, x, c, s, b, x, "relu")),
        (o.moments_backward, (x, x, c, s, b, s, s, b, "relu")),
        (o.moments_backward, (x, x, c, s, b, None, None, None, "none")),
    ):
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


def batch_law(moments):
    """BN and an instance's own gate: coefficients of both shapes, gradients through both moments."""
    pooled = algebra.pool_batch(moments)
    return algebra.gate(algebra.standardize(pooled.mean, pooled.var, 1e-5), torch.sigmoid(moments.mean))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_layer_and_its_gradient(layout, with_residual):
    """Through the public op: equal to the reference backend in float64 (the exact result for these inputs)."""
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        torch.manual_seed(1)
        x = feature_map((3, 12, 7, 6), layout=layout).to(dtype).requires_grad_()
        r = feature_map((3, 12, 7, 6), layout=layout).to(dtype).requires_grad_() if with_residual else None
        dy = feature_map((3, 12, 7, 6), mean=0).to(dtype)
        with ops.use_backend(backend):
            y = ops.normalize(x, batch_law, "relu", r)
            y.backward(dy)
        results.append([y.detach(), x.grad] + ([r.grad] if with_residual else []))
    for result, exact in zip(*results, strict=True):
        # float32 through a whole layer
        torch.testing.assert_close(result.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_under_torch_compile(layout):
    """One graph, with the same bits as eager; the operators stay opaque."""

    def layer(x):
        return ops.normalize(x, batch_law, "relu")

    with ops.use_backend("triton"):
        pair = []
        for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
            torch.manual_seed(1)
            x = feature_map((2, 8, 5, 4), layout=layout).requires_grad_()
            y = function(x)
            y.backward(feature_map((2, 8, 5, 4), mean=0))
            pair.append((y.detach(), x.grad))
        for eager, compiled in zip(*pair, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-6)
            assert compiled.stride() == eager.stride()


# ---- coefficients of the fused laws: against float64 autograd through the definition ----------------------------------

# N, C, groups, K, HW
LAW_SHAPES = [
    (5, 12, 3, 4, 9),
    (70, 40, 8, 20, 49),
    (1, 16, 1, 10, 1),
    (3, 7, 7, 3, 196),
]
EPS_BN, EPS_RSD = 1e-5, 1e-3


def moments_like(n, c, mean=3.0):
    """Means, variances and the sums of a backward reduction, as the passes would give them."""
    draw = lambda *shape: torch.randn(*shape, device=DEVICE)
    return 2 * draw(n, c) + mean, torch.rand(n, c, device=DEVICE) + 0.3, draw(n, c), draw(n, c)


def exact(*tensors):
    return [t.double().requires_grad_() for t in tensors]


def backpropagate(centre, scale, shift, dscale, dshift):
    """The gradients that dscale = sum g (x - c) and dshift = sum g stand for; that of the centre is -scale dshift."""
    loss = (dscale.double() * scale).sum() + (dshift.double() * shift).sum()
    (loss - (scale.detach() * dshift.double() * centre).sum()).backward()


def assert_close(results, expected):
    for i, (result, value) in enumerate(zip(results, expected, strict=True)):
        error = (result.double() - value).norm() / value.norm().clamp(min=1e-9)
        assert error < 2e-5, f"result {i}: relative error {error:.1e}"  # float32 sums of cancelling terms


def through_moments(dvar2, dmean1, centre, mean):
    """dvar2 and dmean1 around ``centre`` -> around the cell's own mean, where ``moments_backward`` is exact."""
    return dvar2.expand(mean.shape), dmean1 + dvar2 * (mean - centre)


@pytest.mark.parametrize("n, c, groups, k, hw", LAW_SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_bn_coefficients(n, c, groups, k, hw, affine):
    mean, var, dscale, dshift = moments_like(n, c)
    weight = torch.randn(c, device=DEVICE) if affine else None
    centre, scale, rstd, unbiased = triton_laws.bn_coefficients(mean, var, weight, hw, EPS_BN)
    gradients = triton_laws.bn_coefficients_backward(dscale, dshift, scale, rstd, hw)

    m, v, w, b = exact(
        mean, var, torch.ones(c, device=DEVICE) if weight is None else weight, torch.zeros_like(centre)
    )
    pooled = algebra.pool_batch(algebra.Moments(m, v, hw))
    r = torch.rsqrt(pooled.var + EPS_BN)
    backpropagate(pooled.mean, w * r, b.expand(n, c), dscale, dshift)
    unbias = n * hw / (n * hw - 1) if n * hw > 1 else 1
    assert_close((centre, scale, rstd, unbiased), (pooled.mean, w * r, r, pooled.var * unbias))
    own = through_moments(*gradients[:2], centre, mean)
    assert_close((*own, *gradients[2:]), (2 * v.grad / hw, m.grad / hw, w.grad, b.grad))


@pytest.mark.parametrize("n, c, groups, k, hw", LAW_SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_gn_coefficients(n, c, groups, k, hw, affine):
    mean, var, dscale, dshift = moments_like(n, c)
    weight = torch.randn(c, device=DEVICE) if affine else None
    centre, scale, rstd = triton_laws.gn_coefficients(mean, var, weight, groups, EPS_BN)
    gradients = triton_laws.gn_coefficients_backward(dscale, dshift, scale, rstd, groups, hw)

    m, v, w, b = exact(
        mean, var, torch.ones(c, device=DEVICE) if weight is None else weight, mean.new_zeros(c)
    )
    pooled = algebra.pool_groups(algebra.Moments(m, v, hw), groups)
    r = torch.rsqrt(pooled.var + EPS_BN)
    backpropagate(pooled.mean, w * r, b.expand(n, c), dscale, dshift)
    assert_close((centre, scale, rstd), (pooled.mean, w * r, r))
    own = through_moments(*gradients[:2], centre, mean)
    assert_close((*own, *gradients[2:]), (2 * v.grad / hw, m.grad / hw, w.grad, b.grad))


def attention_network(c, k):
    draw = lambda *shape: torch.randn(*shape, device=DEVICE)
    return (
        1 + 0.1 * draw(k, c),
        0.1 * draw(k, c),
        0.3 * draw(k, c),
        torch.rand(k, device=DEVICE) + 0.5,
        2 * draw(k),
    )


def attention(mean, var, fc, gain, offset, hw):
    """-> (logits' mean, biased variance, hsigmoid of the standardized logits)."""
    a = (mean * torch.rsqrt(var * (hw / (hw - 1) if hw > 1 else 1) + EPS_RSD)) @ fc.T
    mu, spread = a.mean(0), a.var(0, correction=0)
    return mu, spread, F.relu6((a - mu) * torch.rsqrt(spread + EPS_BN) * gain + offset + 3) / 6


@pytest.mark.parametrize("n, c, groups, k, hw", LAW_SHAPES)
def test_an_coefficients(n, c, groups, k, hw):
    mean, var, dscale, dshift = moments_like(n, c)
    network = attention_network(c, k)
    out = triton_laws.an_coefficients(mean, var, *network, hw, EPS_BN, EPS_RSD, EPS_BN)
    centre, scale, shift, rstd, unbiased, q, gates, standardized, a_mean, a_unbiased, a_rstd = out
    gradients = triton_laws.an_coefficients_backward(
        dscale, dshift, mean, centre, scale, rstd, q, gates, standardized, a_rstd, *network, hw
    )

    m, v, weight, bias, fc, gain, offset = exact(mean, var, *network)
    pooled = algebra.pool_batch(algebra.Moments(m, v, hw))
    mu, spread, exact_gates = attention(m, v, fc, gain, offset, hw)
    s, b = (exact_gates @ weight) * torch.rsqrt(pooled.var + EPS_BN), exact_gates @ bias
    backpropagate(pooled.mean, s, b, dscale, dshift)
    unbias = n * hw / (n * hw - 1) if n * hw > 1 else 1
    assert_close(
        (centre, scale, shift, unbiased, gates), (pooled.mean, s, b, pooled.var * unbias, exact_gates)
    )
    assert_close((a_mean, a_unbiased), (mu, spread * (n / (n - 1) if n > 1 else 1)))
    parameters = (weight.grad, bias.grad, fc.grad, gain.grad, offset.grad)
    assert_close(gradients, (2 * v.grad / hw, m.grad / hw, *parameters))


def test_parameters_of_any_strides():
    """A view of every second column, as a parametrization may hand one over, is not read as if it were dense."""
    n, c, k, hw = 5, 12, 4, 9
    mean, var, _, _ = moments_like(n, c)
    network = attention_network(c, k)
    strided = tuple(torch.stack((p, torch.full_like(p, 7.0)), -1)[..., 0] for p in network)
    assert not any(p.is_contiguous() for p in strided)
    expected = triton_laws.an_coefficients(mean, var, *network, hw, EPS_BN, EPS_RSD, EPS_BN)
    found = triton_laws.an_coefficients(mean, var, *strided, hw, EPS_BN, EPS_RSD, EPS_BN)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
    for law, rest in (
        (triton_laws.bn_coefficients, (hw, EPS_BN)),
        (triton_laws.gn_coefficients, (3, EPS_BN)),
    ):
        weight = torch.rand(c, 2, device=DEVICE)[:, 0]
        for f, e in zip(
            law(mean, var, weight, *rest), law(mean, var, weight.contiguous(), *rest), strict=True
        ):
            assert torch.equal(f, e)


def test_the_coefficient_operators_are_well_formed():
    n, c, k, hw = 3, 8, 4, 9
    mean, var, dscale, dshift = moments_like(n, c)
    row, square, network = (
        torch.ones(c, device=DEVICE),
        torch.ones(n, k, device=DEVICE),
        attention_network(c, k),
    )
    short = torch.ones(k, device=DEVICE)
    for operator, arguments in (
        (triton_laws.bn_coefficients, (mean, var, None, hw, EPS_BN)),
        (triton_laws.bn_coefficients_backward, (dscale, dshift, row, row, hw)),
        (triton_laws.gn_coefficients, (mean, var, row, 2, EPS_BN)),
        (triton_laws.gn_coefficients_backward, (dscale, dshift, mean, var, 2, hw)),
        (triton_laws.an_coefficients, (mean, var, *network, hw, EPS_BN, EPS_RSD, EPS_BN)),
        (triton_laws.an_coefficients_backward,
         (dscale, dshift, mean, row, var, row, var, square, square, short, *network, hw)),
    ):  # fmt: skip
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
