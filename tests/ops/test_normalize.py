"""The public op: its gradients against plain autograd, its passes counted, its promises at the edges."""

import pytest
import torch

from anorm import algebra, ops
from anorm.ops import reference
from anorm.ops.activations import ACTIVATIONS, lookup

ACTS = [None, "relu", "relu6", "silu"]


def whiten(moments):
    """A law with every dependence: instance and batch statistics, both moments in every coefficient."""
    pooled = algebra.pool_batch(moments)
    first = algebra.standardize(pooled.mean, pooled.var, 1e-3)
    second = algebra.standardize(moments.mean, moments.var, 1e-3)
    return algebra.then(
        algebra.mix(first, second, torch.tensor(0.3)), torch.sigmoid(moments.var), moments.mean.tanh()
    )


def plain(x, law, act=None, residual=None):
    """The definition, for autograd to differentiate on its own."""
    mean = x.mean((2, 3))
    var = (x - mean[..., None, None]).square().mean((2, 3))
    c, s, b = (t[..., None, None] for t in law(algebra.Moments(mean, var, x.shape[2] * x.shape[3])))
    y = s * (x - c) + b
    return lookup(act).function(y if residual is None else y + residual)


def far_from_kinks(shape, seed=0):
    """Values whose normalized map stays 0.01 away from the kinks of ReLU and ReLU6 (gradcheck steps 1e-6)."""
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=torch.double, requires_grad=True)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_gradients_of_first_and_second_order(act, with_residual):
    with ops.use_backend("reference"):
        x, r = far_from_kinks((3, 4, 3, 2)), far_from_kinks((3, 4, 3, 2), 1)

        def function(x, r):
            return ops.normalize(x, whiten, act, r if with_residual else None)

        assert torch.autograd.gradcheck(function, (x, r))
        assert torch.autograd.gradgradcheck(function, (x, r), atol=1e-4)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("with_residual", [False, True])
def test_equals_plain_autograd(act, layout, with_residual):
    torch.manual_seed(0)
    x, r, dy = (torch.randn(5, 7, 4, 3, dtype=torch.double).to(memory_format=layout) for _ in range(3))
    inputs = [(x.clone().requires_grad_(), r.clone().requires_grad_()) for _ in range(2)]
    outputs = []
    for function, (x, r) in zip((ops.normalize, plain), inputs, strict=True):
        y = function(x, whiten, act, r if with_residual else None)
        y.backward(dy)
        outputs.append(y)
    torch.testing.assert_close(*outputs)  # double precision: default tolerance 1e-7 relative
    for own, expected in zip(*inputs, strict=True):
        torch.testing.assert_close(own.grad, expected.grad)
    assert outputs[0].is_contiguous(memory_format=layout)


def counting(monkeypatch):
    """Count the reference backend's passes."""
    calls = []
    for name in ("moments", "affine", "affine_backward", "moments_backward"):
        original = getattr(reference, name)
        spy = lambda *a, _name=name, _original=original: (calls.append(_name), _original(*a))[1]
        monkeypatch.setattr(reference, name, spy)
    return calls


def test_two_passes_each_way(monkeypatch):
    calls = counting(monkeypatch)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with ops.use_backend("reference"):
        ops.normalize(x, whiten, "relu").backward(torch.randn(2, 3, 4, 4))
    assert calls == ["moments", "affine", "affine_backward", "moments_backward"]


def test_a_law_without_needs_runs_no_reduction(monkeypatch):
    calls = counting(monkeypatch)
    c, s, b = torch.randn(3, 3)
    x, r, dy = torch.randn(3, 2, 3, 4, 4)
    x.requires_grad_(), r.requires_grad_()
    with ops.use_backend("reference"):
        y = ops.normalize(x, lambda _: algebra.Affine(c, s, b), "relu", r, needs="none")
        y.backward(dy)
    assert calls == ["affine", "moments_backward"]
    mask = dy * (y > 0)
    torch.testing.assert_close(x.grad, mask * s[:, None, None])
    torch.testing.assert_close(r.grad, mask)


def test_fixed_coefficients_still_learn():
    c, s, b = (t.requires_grad_() for t in torch.randn(3, 3, dtype=torch.double))
    x = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    law = lambda _, c=c, s=s, b=b: algebra.Affine(c, s, b)
    function = lambda x, c, s, b: ops.normalize(x, lambda _: algebra.Affine(c, s, b), "relu", needs="none")
    assert torch.autograd.gradcheck(function, (x, c, s, b))
    assert ops.normalize(x, law, needs="none").grad_fn is not None


def test_mean_only_reads_no_variance():
    def law(moments):
        assert moments.var is None
        return algebra.Affine(moments.mean, torch.sigmoid(moments.mean), moments.mean)

    x = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.normalize(x, law, needs="mean"), x)


def test_bf16_keeps_dtype_and_float32_coefficients():
    def law(moments):
        assert moments.mean.dtype == torch.float32
        return whiten(moments)

    x = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.normalize(x, law, "relu")
    assert y.dtype == torch.bfloat16
    y.backward(torch.randn_like(y))
    expected = plain(x.detach().double(), whiten, "relu")
    # one rounding of the result to bf16: 2^-9 relative, twice that allowed
    assert ((y.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6).all()


def test_infinite_gradients_reach_the_input():
    """A loss scaler finds an overflow only if it is still there."""
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    dy = torch.zeros(2, 3, 4, 4)
    dy[0, 1, 2, 3] = float("inf")
    ops.normalize(x, whiten).backward(dy)
    assert not x.grad.isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("act", ["relu", "relu6"])
def test_a_nan_in_the_input_reaches_output_and_gradient(act, backend):
    x = torch.randn(2, 3, 16, 16)
    x[0, 1, 2, 3] = float("nan")
    x.requires_grad_()
    with ops.use_backend(backend):
        y = ops.normalize(x, lambda m: algebra.standardize(m.mean, m.var, 1e-5), act)
        y.backward(torch.randn_like(y))
    assert y[0, 1].isnan().all() and x.grad[0, 1].isnan().all()
    assert y[1].isfinite().all() and x.grad[1].isfinite().all()


def test_an_empty_batch_passes_through():
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    y = ops.normalize(x, lambda m: algebra.standardize(m.mean, m.var, 1e-5), "relu")
    y.backward(torch.zeros_like(y))
    assert y.shape == x.grad.shape == (0, 3, 4, 4)


def test_checkpointing_equals_plain_running():
    from torch.utils.checkpoint import checkpoint

    x, dy = torch.randn(2, 3, 4, 5, 5, dtype=torch.double)
    grads = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        run(lambda x: ops.normalize(x.sin(), whiten, "relu"), leaf).backward(dy)
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_torch_func_grad():
    x = torch.randn(2, 3, 4, 4, dtype=torch.double)
    w = torch.randn(2, 3, 4, 4, dtype=torch.double)
    grad = torch.func.grad(lambda x: (ops.normalize(x, whiten, "relu") * w).sum())(x)
    expected = torch.func.grad(lambda x: (plain(x, whiten, "relu") * w).sum())(x)
    torch.testing.assert_close(grad, expected)


def test_variance_survives_a_large_mean():
    """Two passes: 1e-6 relative at mean/std = 1e4, where E[x^2] - E[x]^2 in float32 is off by a factor of 30."""
    torch.manual_seed(0)
    x = (torch.randn(4, 8, 32, 32, dtype=torch.double) + 1e4).float()
    _, var = reference.moments(x)
    expected = x.double().var((2, 3), correction=0)
    assert ((var - expected).abs() / expected).max() < 1e-6


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: ops.normalize(x[0], whiten), "N, C, H, W"),
        (lambda x: ops.normalize(x.long(), whiten), "floating-point"),
        (lambda x: ops.normalize(x, whiten, "rleu"), "did you mean relu"),
        (lambda x: ops.normalize(x, whiten, residual=x[:1]), "residual's shape"),
        (lambda x: ops.normalize(x, whiten, needs="var"), "none, mean, mean_var"),
        (lambda x: ops.set_backend("cudnn"), "auto, reference, cpu, triton"),
    ],
)
def test_errors_say_what_is_right(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(2, 3, 4, 4))


def test_the_table_of_activations_is_torchs():
    assert all(entry.name == name for name, entry in ACTIVATIONS.items())
    z = torch.tensor([float("nan"), -1.0, 3.0, 7.0])
    assert lookup("relu6").function(z)[1:].tolist() == [0, 3, 6] and lookup("relu").function(z)[0].isnan()
