"""MobileNetV2: torchvision's function with BN, parameter counts to the digit, the sites of its norms."""

import pytest
import torch
import torchvision

import anorm
from anorm.archs.mobilenetv2 import InvertedResidual
from anorm.norms.attentive import AttentiveNorm
from anorm.norms.base import Site
from anorm.norms.batch import BatchNorm


@pytest.mark.parametrize("norm, count", [("bn", 3_504_872), ("an", 3_672_760)])
def test_parameter_counts(norm, count):
    with torch.device("meta"):
        model = anorm.create_model("mobilenetv2", norm)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("width_mult", [0.35, 1.0, 1.4])
def test_equals_torchvision(width_mult, training):
    """A random state_dict of torchvision's, in its order, gives its logits and its statistics at any width."""
    torch.manual_seed(0)
    theirs = (
        torchvision.models.mobilenet_v2(num_classes=7, width_mult=width_mult, dropout=0.0)
        .double()
        .train(training)
    )
    ours = anorm.create_model("mobilenetv2", num_classes=7, width_mult=width_mult, dropout=0.0)
    ours = ours.double().train(training)
    for name, value in theirs.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            value.uniform_(0.5, 1.5) if not name.endswith("bias") else value.normal_(0, 0.1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        expected = theirs(x)
        # float64: sums in another order through fifty layers
        assert (ours(x) - expected).abs().max() <= 1e-10 * expected.abs().max()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_attentive_norm_stands_behind_every_depthwise_convolution():
    with torch.device("meta"):
        model = anorm.create_model("mobilenetv2", "an")
    k = [m.k for m in model.modules() if isinstance(m, AttentiveNorm)]
    depths = (1, 2, 3, 4, 3, 3, 1)
    assert k == [k for k, depth in zip((5, 5, 5, 5, 10, 10, 10), depths, strict=True) for _ in range(depth)]
    for module in model.modules():
        if (
            isinstance(module, torch.nn.Sequential)
            and len(module) == 2
            and isinstance(module[0], torch.nn.Conv2d)
        ):
            assert isinstance(module[1], AttentiveNorm) == (module[0].groups > 1)


def test_sites():
    sites: list[Site] = []

    def norm(site):
        sites.append(site)
        return BatchNorm(site.channels, site.act)

    with torch.device("meta"):
        anorm.create_model("mobilenetv2", norm)
    kinds = {(s.role, s.block_norm, s.focus, s.last, s.act) for s in sites}
    assert kinds == {
        ("stem", 0, False, False, "relu6"),
        ("expand", 1, False, False, "relu6"),
        ("spatial", 2, True, False, "relu6"),
        ("reduce", 3, False, True, None),
        ("final", 0, False, False, "relu6"),
    }
    assert (sites[0].stage, sites[-1].stage, sites[-1].channels) == (0, 6, 1280)


def test_forward_stages_match_feature_info():
    model = anorm.create_model("mobilenetv2", num_classes=5).eval()
    maps = model.forward_stages(torch.randn(2, 3, 64, 64))
    assert list(maps) == list(model.feature_info) == [f"stage{i}" for i in range(1, 8)]
    assert [info.stride for info in model.feature_info.values()] == [2, 4, 8, 16, 16, 32, 32]
    for name, (channels, stride) in model.feature_info.items():
        assert maps[name].shape == (2, channels, 64 // stride, 64 // stride)


def test_zero_init_spares_blocks_without_a_shortcut():
    model = anorm.create_model("mobilenetv2", zero_init=True)
    for module in model.modules():
        if isinstance(module, InvertedResidual):
            assert bool(module.last_norm.weight.any()) == (not module.residual)


def test_classifier_starts_small():
    """N(0, 0.01) and no bias, as published; 1.28 million draws are within 1 % of it."""
    torch.manual_seed(0)
    linear = anorm.create_model("mobilenetv2").classifier[1]
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.01) and not linear.bias.any()


@pytest.mark.parametrize("norm", [name for name in anorm.list_norms() if name != "module"])
def test_every_norm_trains_a_step(norm):
    torch.manual_seed(0)
    model = anorm.create_model("mobilenetv2", norm, num_classes=5, width_mult=0.25)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_wrong_width_is_said():
    with pytest.raises(ValueError, match="width_mult"):
        anorm.create_model("mobilenetv2", width_mult=0.0)
