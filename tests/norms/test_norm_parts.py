"""A law in its parts is the law; what it says it decided is what it decided."""

import pytest
import torch

import anorm
from anorm.algebra import Moments, then
from anorm.norms.base import Norm

OPTIONS = {"module": {"target": "torch.nn.BatchNorm2d"}, "afn_as_released": {"dropout": 0.0}}
C = 6
VARIANTS = [(name, {}) for name in anorm.list_norms() if name != "module"] + [
    ("an", {"separate": True}),
    ("an", {"base": "sn", "source": "standardized", "activation": "relu"}),
    ("an", {"input": "mean"}),
    ("se", {"base": "bin"}),
    ("sn", {"use_bn": False}),
    ("bn", {"affine": False}),
    ("asrn", {"rescale_lambda": "none"}),
]


def make(name, **options):
    torch.manual_seed(0)
    layer = anorm.create_norm(name, C, **(OPTIONS.get(name, {}) | options)).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def moments(n=5):
    torch.manual_seed(1)
    return Moments(torch.randn(n, C).double(), torch.rand(n, C).double(), 12)


@pytest.mark.parametrize(("name", "options"), VARIANTS)
def test_the_parts_make_the_law(name, options):
    layer, given = make(name, **options), moments()
    parts = layer.parts(given)
    x = torch.randn(5, C).double()
    found, expected = (a.scale * (x - a.centre) + a.shift for a in (then(*parts[:3]), layer.law(given)))
    torch.testing.assert_close(found, expected)
    for choice in parts.choices.values():
        assert choice.kind in ("mixture", "shares", "gates")
        if choice.limit is not None and "bin" not in (name, options.get("base")):  # BIN clips after a step
            assert 0 <= choice.values.min() and choice.values.max() <= choice.limit
        assert not choice.names or len(choice.names) == choice.values.shape[-1]


def test_a_law_that_tells_nothing():
    assert make("module").parts(moments()) is None
    assert make("an", base="bn").base.parts(moments()) is not None

    class Half(Norm):
        def law(self, moments):
            return None

    assert Half(C).parts(moments()) is None


def test_choices_by_hand():
    third = torch.full((3,), 1 / 3)
    for name in ("sn", "ssn"):
        shares = anorm.create_norm(name, C).eval().parts(moments()).choices
        assert list(shares) == ["means", "variances"]
        for choice in shares.values():
            torch.testing.assert_close(choice.values, third, rtol=0, atol=1e-6)
            assert choice.names == ("IN", "LN", "BN")

    (gate,) = anorm.create_norm("bin", C).eval().parts(moments()).choices.values()
    assert gate.values.tolist() == [1.0] * C

    se = anorm.create_norm("se", C).double().eval()
    se.fc2.weight.data.zero_()
    se.base.weight.data.fill_(3.0)
    parts = se.parts(moments())
    assert (parts.choices["channel gates"].values == 0.5).all() and (parts.gamma == 1.5).all()

    an = anorm.create_norm("an", C, k=4).double().eval()
    an.attention.norm.weight.data.zero_()  # hsigmoid(0) = 1/2 for every component of every instance
    parts = an.parts(moments())
    assert (parts.choices["mixture weights"].values == 0.5).all()
    torch.testing.assert_close(parts.gamma, an.weight.sum(0).expand(5, C) / 2)
    torch.testing.assert_close(parts.beta, an.bias.sum(0).expand(5, C) / 2)

    asrn = anorm.create_norm("asrn", C).eval().parts(moments()).choices
    assert float(asrn["lambda of mu"].values.detach()) == pytest.approx(0.04742587)  # sigmoid(-3)
    assert float(asrn["lambda of beta"].values.detach()) == pytest.approx(0.00669285)  # sigmoid(-5)


def test_a_network_knows_where_its_norms_stand():
    model = anorm.create_model("resnet20", "an", num_classes=4)
    assert model.layer2[1].bn1.site.stage == 1 and model.layer2[1].bn2.site.last
    assert model.bn1.site.role == "stem" and model.layer2[1].bn1.base.site is None
