"""AN, SE and SN with running statistics, without gradients: coefficients in one call of the C++ backend."""

import copy

import pytest
import torch

import anorm
from anorm import ops
from anorm.ops import cpu
from anorm.ops.cpu import laws

if cpu.available() is not None:
    pytest.skip(cpu.available(), allow_module_level=True)

CASES = [
    ("an", {}), ("an", {"k": 1}), ("an", {"k": 5}), ("sn", {}), ("sn", {"affine": False}), ("sn", {"variance": "biased"}),
    ("se", {"reduction": 4}), ("se", {"reduction": 4, "bias": True}), ("se", {"reduction": 1000}),
]  # fmt: skip
# more and fewer channels than a register holds, a prime number, one pixel, one instance
SHAPES = [(4, 16, 6, 5), (3, 131, 7, 7), (2, 7, 3, 3), (5, 40, 1, 1), (1, 70, 9, 4)]


def lived_in(law, channels, options):
    """A layer whose parameters and running statistics are no round numbers, for evaluation."""
    torch.manual_seed(0)
    layer = anorm.create_norm(law, channels, act="relu", **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
        for _ in range(3):
            layer(2 * torch.randn(6, channels, 5, 5) + 1)
    return layer.eval()


def error(found, exact):
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.fixture
def calls(monkeypatch):
    """How often each operator of coefficients was called."""
    seen = []

    def spied(name, operator):
        return lambda *arguments: seen.append(name) or operator(*arguments)

    for name in ("an_running_coefficients", "se_running_coefficients", "sn_running_coefficients"):
        monkeypatch.setattr(laws, name, spied(name, getattr(laws, name)))
    return seen


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("law", "options"), CASES)
def test_one_call_and_the_values_of_the_law(law, options, shape, layout, mode, calls):
    layer = lived_in(law, shape[1], options)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x, r = (2 * torch.randn(2, *shape) + 1).to(dtype)
        x = x.to(memory_format=layout)
        module = copy.deepcopy(layer).double() if dtype == torch.float64 else layer
        with torch.no_grad(), ops.use_backend("reference"):
            exact = copy.deepcopy(layer).double()(x.double(), r.double())
            plain = module(x, r)
        assert calls == []
        with mode(), ops.use_backend("cpu"):
            y = module(x, r)
        assert calls == [f"{law}_running_coefficients"]
        calls.clear()
        assert y.dtype == dtype and y.stride() == x.stride()
        # in float64 both round; else a few roundings are allowed, where plain PyTorch was exact by luck
        few = 1e-13 if dtype == torch.float64 else 8 * torch.finfo(dtype).eps
        assert error(y, exact) <= max(2 * error(plain, exact), few)


def test_a_model_in_half_precision(calls):
    layer = lived_in("an", 24, {}).bfloat16()
    x = torch.randn(3, 24, 5, 5).bfloat16()
    with torch.no_grad():
        y = layer(x)
        with ops.use_backend("reference"):
            torch.testing.assert_close(y, layer(x), rtol=2e-2, atol=2e-2)
    assert calls == ["an_running_coefficients"]


@pytest.mark.parametrize("law", ["an", "se", "sn"])
def test_gradients_and_other_modes_take_the_law_itself(law, calls):
    layer = lived_in(law, 16, {})
    x = torch.randn(3, 16, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    layer.train()
    with torch.no_grad():
        layer(x)
    assert calls == [] and x.grad is not None


@pytest.mark.parametrize("law", ["an", "se", "sn"])
def test_what_is_not_finite_stays_visible(law):
    layer = lived_in(law, 16, {})
    layer.act = None
    for value in (float("inf"), float("nan")):
        x = torch.randn(3, 16, 5, 5)
        x[1, 2, 3, 3] = value
        with torch.no_grad():
            y = layer(x)
        assert not y[1, 2].isfinite().all() and y[0].isfinite().all() and y[2].isfinite().all()


def test_opcheck():
    check = lambda name, *args: torch.library.opcheck(
        getattr(torch.ops.anorm_cpu, name).default, args, test_utils=("test_schema", "test_faketensor")
    )
    cells, row, k = torch.rand(2, 5), torch.rand(5), torch.rand(3)
    check("an_running_coefficients", cells, cells, *torch.rand(3, 3, 5), k, k, row, k, k, 12, 1e-5, 1e-3, 1e-5)
    check("se_running_coefficients", cells, row, row, row, row, torch.rand(2, 5), None, torch.rand(5, 2), row, 1e-5)
    check("sn_running_coefficients", cells, cells, None, k, k, row, row, 1.1, 1e-5)
