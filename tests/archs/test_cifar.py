"""The networks for small images: sizes that are known from their papers, shortcuts, sites, every norm."""

import pytest
import torch
from torch import nn

import anorm
from anorm.archs.resnet_cifar import PadShortcut
from anorm.norms.attentive import AttentiveNorm

# with BN and 10 classes; the papers print 0.27, 0.46, 0.85, 1.7 M (ResNet), 2.7, 2.2, 8.9, 55.8 M (WRN)
COUNTS = [
    ("resnet20", {}, 269_722),
    ("resnet32", {}, 464_154),
    ("resnet56", {}, 853_018),
    ("resnet110", {}, 1_727_962),
    ("resnet20", {"option": "B"}, 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)),
    ("wrn_16_4", {}, 2_748_890),
    ("wrn_40_2", {}, 2_243_546),
    ("wrn_40_4", {}, 8_949_210),
    ("wrn_40_10", {}, 55_841_754),
    ("vgg13", {}, 9_413_066),
    ("vgg16", {}, 14_724_042),
    ("vgg19", {}, 20_035_018),
    ("convnet", {}, 16 * 27 + 32 + 32 * 144 + 64 + 2048 * 128 + 128 + 1290),
]
SMALL = ["resnet20", "wrn_16_4", "vgg13", "convnet"]


@pytest.mark.parametrize("arch, options, count", COUNTS)
def test_parameter_counts(arch, options, count):
    with torch.device("meta"):
        model = anorm.create_model(arch, "bn", num_classes=10, **options)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    "arch, depth", [("resnet20", 20), ("resnet110", 110), ("wrn_16_4", 16), ("wrn_40_4", 40)]
)
def test_depth_counts_layers(arch, depth):
    """A ResNet's depth counts convolutions and classifier, a WRN's all convolutions, its three shortcuts too."""
    with torch.device("meta"):
        model = anorm.create_model(arch, num_classes=10)
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert convolutions + arch.startswith("resnet") == depth


@pytest.mark.parametrize("arch", SMALL)
def test_forward_stages_match_feature_info(arch):
    model = anorm.create_model(arch, num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    maps = model.forward_stages(x)
    assert list(maps) == list(model.feature_info)
    for name, (channels, stride) in model.feature_info.items():
        assert maps[name].shape == (2, channels, 32 // stride, 32 // stride)
    assert model(x).shape == (2, 10)


@pytest.mark.parametrize("norm", [name for name in anorm.list_norms() if name != "module"])
@pytest.mark.parametrize("arch", SMALL)
def test_every_norm_trains_a_step(arch, norm):
    torch.manual_seed(0)
    model = anorm.create_model(arch, norm, num_classes=10)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("arch", SMALL)
def test_an_stands_at_the_focus(arch):
    model = anorm.create_model(arch, "an", num_classes=10)
    count = sum(isinstance(m, AttentiveNorm) for m in model.modules())
    assert count == {"resnet20": 9, "wrn_16_4": 6, "vgg13": 5, "convnet": 2}[arch]


def test_padded_shortcut():
    """Option A keeps every second pixel and puts new zero channels on both sides."""
    x = torch.randn(2, 16, 8, 8)
    y = PadShortcut(16, 32)(x)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any() and not y[:, 24:].any()


def test_zero_init_makes_blocks_their_shortcuts():
    """With every last norm at zero the network is its stem followed by padding and subsampling."""
    model = anorm.create_model("resnet20", num_classes=10, zero_init=True).eval()
    x = torch.randn(2, 3, 32, 32)
    stem = model.bn1(model.conv1(x))
    assert torch.equal(model.forward_stages(x)["layer1"], stem)
    assert torch.equal(model.forward_stages(x)["layer3"][:, 24:40], stem[:, :, ::4, ::4])


def test_wide_block_is_preactivated():
    """y = conv2(relu(norm2(conv1(h)))) + shortcut(h), h = relu(norm1(x)); the identity shortcut takes x itself."""
    torch.manual_seed(0)
    model = anorm.create_model("wrn_16_4", num_classes=10).eval()
    first, second = model.layer1
    x = torch.randn(2, 16, 8, 8)
    # fresh running statistics: 0, 1
    h = nn.functional.relu(first.bn1.weight[:, None, None] * x / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(first.bn1(x), h)
    torch.testing.assert_close(first(x), first.conv2(first.bn2(first.conv1(h))) + first.shortcut(h))
    y = torch.randn(2, 64, 8, 8)
    torch.testing.assert_close(second(y), second.conv2(second.bn2(second.conv1(second.bn1(y)))) + y)


def test_convnet_takes_other_images():
    model = anorm.create_model("convnet", num_classes=10, in_channels=1, image_size=28)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(ValueError, match="image_size"):
        model(torch.randn(2, 1, 32, 32))


@pytest.mark.parametrize(
    "arch, options, words",
    [
        ("resnet20", {"depth": 21}, "6 n \\+ 2"),
        ("resnet20", {"option": "C"}, "'A'"),
        ("wrn_16_4", {"depth": 18}, "6 n \\+ 4"),
        ("wrn_16_4", {"widen": 0}, "widen"),
        ("convnet", {"image_size": 2}, "image_size"),
    ],
)
def test_wrong_options_are_said(arch, options, words):
    with pytest.raises(ValueError, match=words):
        anorm.create_model(arch, num_classes=10, **options)
