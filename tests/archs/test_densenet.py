"""DenseNet: torchvision's function with BN, parameter counts to the digit, the sites of its norms."""

import pytest
import torch
import torchvision

import anorm
from anorm.norms.base import Site
from anorm.norms.batch import BatchNorm

SMALL = {"growth": 4, "blocks": (2, 3), "width": 8, "num_classes": 5}


@pytest.mark.parametrize(
    "arch, norm, count",
    [
        ("densenet121", "bn", 7_978_856),
        ("densenet121", "an", 8_342_288),
        ("densenet161", "bn", 28_681_000),
        ("densenet169", "bn", 14_149_480),
        ("densenet201", "bn", 20_013_928),
    ],
)
def test_parameter_counts(arch, norm, count):
    with torch.device("meta"):
        model = anorm.create_model(arch, norm)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arch", ["densenet121", "densenet161"])
def test_equals_torchvision(arch, training):
    """A random state_dict of torchvision's, in its order, gives its logits and its statistics."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(arch, num_classes=7).double().train(training)
    ours = anorm.create_model(arch, "bn", num_classes=7).double().train(training)
    for name, value in theirs.state_dict().items():
        if value.is_floating_point() and value.dim() == 1:
            value.uniform_(0.5, 1.5) if not name.endswith("bias") else value.normal_(0, 0.1)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 3, 64, 64, dtype=torch.double)
    with torch.no_grad():
        expected = theirs(x)
        # float64: sums in another order through more than a hundred layers
        assert (ours(x) - expected).abs().max() <= 1e-10 * expected.abs().max()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)


def test_sites():
    """AN's place is the second norm of every dense layer; a norm takes the role of the convolution it feeds."""
    sites: list[Site] = []

    def norm(site):
        sites.append(site)
        return BatchNorm(site.channels, site.act)

    with torch.device("meta"):
        anorm.create_model("densenet121", norm)
    assert all(site.act == "relu" and site.stages == 4 for site in sites)
    focus = [site for site in sites if site.focus]
    assert len(focus) == 58 and {(s.channels, s.role, s.block_norm) for s in focus} == {(128, "spatial", 2)}
    assert [sum(s.stage == i for s in focus) for i in range(4)] == [6, 12, 24, 16]
    outside = [(s.role, s.stage, s.channels) for s in sites if s.block_norm == 0]
    assert outside == [
        ("stem", 0, 64),
        ("transition", 0, 256),
        ("transition", 1, 512),
        ("transition", 2, 1024),
        ("final", 3, 1024),
    ]


def test_forward_stages_match_feature_info():
    model = anorm.create_model("densenet121", **SMALL).eval()
    x = torch.randn(2, 3, 64, 64)
    maps = model.forward_stages(x)
    assert list(maps) == list(model.feature_info) == ["denseblock1", "denseblock2"]
    for name, (channels, stride) in model.feature_info.items():
        assert maps[name].shape == (2, channels, 64 // stride, 64 // stride)
    # the last stage is what the classifier averages
    torch.testing.assert_close(model.classifier(maps["denseblock2"].mean((2, 3))), model(x))


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, x = anorm.create_model("densenet121", dropout=0.5, **SMALL), torch.randn(2, 3, 64, 64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("norm", [name for name in anorm.list_norms() if name != "module"])
def test_every_norm_trains_a_step(norm):
    torch.manual_seed(0)
    model = anorm.create_model("densenet121", norm, **SMALL)
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
