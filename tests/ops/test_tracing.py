"""Layers under torch.jit.trace, the old ONNX exporter, torch.jit.script and forward-mode differentiation."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import anorm
from anorm import ops

LAWS = [law for law in anorm.list_norms() if law not in ("module", "none")]
C = 16

# torch's word on TorchScript, which its own forward-mode formulas are written in
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.* is deprecated:FutureWarning", "ignore:.*torch.jit.* is deprecated:DeprecationWarning"
)


def layer(law, act="relu", **options):
    torch.manual_seed(0)
    options |= {"dropout": 0.0} if law == "afn_as_released" else {}
    made = anorm.create_norm(law, C, act=act, **options)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.rand_like(p) * (p.dim() > 0))
        made(torch.randn(4, C, 6, 5) * 2 + 1)  # running statistics of their own
    return made


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("law", LAWS)
def test_a_traced_layer_is_saved_loaded_and_equal(law, training):
    """Also on maps of another size and another number of them; in training it tracks statistics as the layer does."""
    own = layer(law).train(training)
    twin = copy.deepcopy(own)
    x = torch.randn(4, C, 6, 5)
    with torch.no_grad(), ops.use_backend("reference"):  # equal means that nothing but the tracing differs
        traced = torch.jit.trace(twin, (x, torch.randn_like(x)), check_trace=False)
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        twin.load_state_dict(own.state_dict())
        loaded.load_state_dict(own.state_dict())
        for shape in ((4, C, 6, 5), (3, C, 8, 9), (5, C, 7, 4)):
            x, r = torch.randn(2, *shape)
            torch.testing.assert_close(loaded(x, r), own(x, r))
    for name, value in own.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("law", ["bn", "an", "sn", "se", "gn"])
def test_a_traced_layer_learns(law):
    own = layer(law).double()
    twin = copy.deepcopy(own)
    x = torch.randn(4, C, 6, 5, dtype=torch.double)
    traced = torch.jit.trace(twin, x, check_trace=False)
    twin.load_state_dict(own.state_dict())  # the tracing was a forward pass
    gradients = []
    for module in (own, traced):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in module.parameters())])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("law", ["bn", "an", "sn", "se", "gn", "in"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_old_onnx_exporter(law):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    own = layer(law).eval()
    file = io.BytesIO()
    axes = {"x": {0: "n", 2: "h", 3: "w"}, "y": {0: "n", 2: "h", 3: "w"}}
    torch.onnx.export(
        own, (torch.randn(2, C, 6, 5),), file, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes
    )
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in ((2, C, 6, 5), (3, C, 9, 4)):
        x = torch.randn(shape)
        (found,) = session.run(None, {"x": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), own(x), rtol=1e-4, atol=2e-5)


def test_scripting_says_what_can_be_done():
    for module in (layer("an"), nn.Sequential(nn.Conv2d(3, C, 1), layer("bn"))):
        with pytest.raises(RuntimeError, match="torch.jit.trace.*torch.export"):
            torch.jit.script(module)


# ---- forward mode ----------------------------------------------------------------------------------------------------


def definition(module, x):
    """The formula for torch's own operators alone, on the layer's law."""
    mean = x.mean((2, 3))
    var = (x - mean[..., None, None]).square().mean((2, 3))
    c, s, b = (t[..., None, None] for t in module.law(anorm.algebra.Moments(mean, var, x.shape[2] * x.shape[3])))
    return torch.relu(s * (x - c) + b)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("law", LAWS)
def test_jvp(law, training):
    """With dual numbers, where a layer in training tracks its statistics, as torch's own do."""
    own, twin = (layer(law).double().train(training) for _ in range(2))
    x, t = torch.randn(2, 4, C, 3, 2, dtype=torch.double)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(own(forward_ad.make_dual(x, t)))
        expected = forward_ad.unpack_dual(definition(twin, forward_ad.make_dual(x, t)))
    torch.testing.assert_close(found.primal, expected.primal)
    torch.testing.assert_close(found.tangent, expected.tangent)
    torch.testing.assert_close(own.state_dict(), twin.state_dict())


def functional(module):
    """The layer as a function of x and its parameters; its buffers are copies, as torch.func needs them."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    call = lambda p, x: torch.func.functional_call(module, (p, {n: b.clone() for n, b in buffers.items()}), (x,))
    return call, parameters


@pytest.mark.parametrize("law", ["bn", "gn", "an", "se", "sn"])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_jacobians_and_hessians_by_torch_func(law):
    own = layer(law, act=None).double().eval()
    call, parameters = functional(own)
    x, w = torch.randn(2, 2, C, 2, 2, dtype=torch.double)
    for argument in (0, 1):
        forward = torch.func.jacfwd(call, argument)(parameters, x)
        reverse = torch.func.jacrev(call, argument)(parameters, x)
        torch.testing.assert_close(forward, reverse)
    _, found = torch.func.jvp(lambda p: call(p, x), (parameters,), (parameters,))
    jacobian = torch.func.jacrev(call)(parameters, x)
    expected = sum((jacobian[n] * p).flatten(x.dim()).sum(-1) for n, p in parameters.items())
    torch.testing.assert_close(found, expected)
    loss = lambda x: (call(parameters, x).tanh() * w).sum()
    reference = torch.autograd.functional.hessian(lambda x: (own(x).tanh() * w).sum(), x)
    torch.testing.assert_close(torch.func.hessian(loss)(x), reference)


@pytest.mark.parametrize(("law", "torchs"), [("bn", nn.BatchNorm2d(C)), ("gn", nn.GroupNorm(16, C))])
def test_as_torchs_own(law, torchs):
    own, torchs = anorm.create_norm(law, C).double(), copy.deepcopy(torchs).double()
    x, t = torch.randn(2, 4, C, 3, 2, dtype=torch.double)
    tangents = []
    for module in (own, torchs):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(module(forward_ad.make_dual(x, t))).tangent)
    torch.testing.assert_close(*tangents)


# ---- maps of no pixels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("law", LAWS)
def test_maps_without_pixels(law, training, backend):
    """Empty results, zero gradients, running statistics as they were."""
    own = layer(law).train(training)
    before = {name: b.clone() for name, b in own.named_buffers() if b.is_floating_point()}
    for shape in ((3, C, 0, 5), (3, C, 4, 0)):
        x = torch.randn(shape, requires_grad=True)
        with ops.use_backend(backend):
            y = own(x, torch.zeros_like(x))
            y.sum().backward()
        assert y.shape == x.grad.shape == shape
    assert all(p.grad is None or not p.grad.any() for p in own.parameters())
    for name, value in before.items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=0, atol=0, msg=f"{name} changed")
