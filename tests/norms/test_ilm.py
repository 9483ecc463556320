"""ILM-Norm against its equation on the map, its base norms, and the widths it must cope with."""

import pytest
import torch
from torch.nn import functional as F

import anorm


def make(channels, **options):
    torch.manual_seed(0)
    layer = anorm.create_norm("ilm", channels, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("base", ["gn", "ln", "in"])
@pytest.mark.parametrize("variance", ["unbiased", "biased"])
def test_equals_the_equation_written_on_the_map(base, variance):
    channels = 64
    layer = make(channels, base=base, variance=variance)
    assert layer.keys == 4 and layer.encoder.weight.shape == (2, 4)
    x = 2 * torch.randn(3, channels, 5, 3, dtype=torch.double) + 1
    unbiased = variance == "unbiased"

    def statistics(groups):
        cells = x.reshape(3, groups, -1)
        return cells.mean(2), cells.var(2, unbiased=unbiased)

    groups = {"gn": 32, "ln": 1, "in": channels}[base]
    mean, var = (t.repeat_interleave(channels // groups, 1)[..., None, None] for t in statistics(groups))
    key_mean, key_var = statistics(4)
    code = lambda key: F.relu(key @ layer.encoder.weight.T)
    omega = torch.sigmoid(code(key_var) @ layer.weight_decoder.weight.T)
    b = torch.tanh(code(key_mean) @ layer.bias_decoder.weight.T)
    omega, b = omega.repeat_interleave(16, 1) + layer.weight, b.repeat_interleave(16, 1) + layer.bias
    expected = omega[..., None, None] * (x - mean) / (var + 1e-5).sqrt() + b[..., None, None]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("base", ["gn", "ln", "in"])
def test_zero_decoders_leave_the_base_norm_with_half_more_weight(base):
    layer, one = make(48, base=base, variance="biased"), anorm.create_norm(base, 48).double()
    with torch.no_grad():
        layer.weight_decoder.weight.zero_(), layer.bias_decoder.weight.zero_()
        one.weight.copy_(layer.weight + 0.5), one.bias.copy_(layer.bias)
    x, dy = torch.randn(2, 3, 48, 5, 3, dtype=torch.double)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    ys = [norm(leaf) for norm, leaf in zip((layer, one), leaves, strict=True)]
    for y in ys:
        y.backward(dy)
    torch.testing.assert_close(*ys)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_does_not_depend_on_the_batch_or_the_mode():
    layer = make(32)
    x = torch.randn(4, 32, 3, 3, dtype=torch.double)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    torch.testing.assert_close(layer(x), layer.eval()(x))
    assert not list(layer.buffers()) and not list(layer.stat_buffers())


@pytest.mark.parametrize(
    "channels, keys, hidden",
    # the published rule at multiples of 32; 256 is where GN and IN differ; then what it cannot build
    [(32, 2, 2), (64, 4, 2), (224, 14, 2), (256, 16, 1), (512, 32, 2), (2048, 128, 8)]
    + [(16, 1, 2), (24, 2, 2), (6, 1, 2), (1, 1, 2), (17, 17, 1), (144, 9, 2)],
)
def test_keys_for_every_width(channels, keys, hidden):
    layer = anorm.create_norm("ilm", channels)
    assert (layer.keys, layer.encoder.out_features) == (keys, hidden)
    over_instance = anorm.create_norm("ilm", channels, base="in").encoder.out_features
    assert over_instance == (2 if keys == 16 else hidden)
    assert layer(torch.randn(2, channels, 2, 2)).isfinite().all()


def test_initial_scale():
    """Decoders start small: omega is near sigmoid(0) + weight = 1.5, or near 1 from initial_weight=0.5."""
    x = torch.randn(8, 64, 8, 8)
    for options, scale in (({}, 1.5), ({"initial_weight": 0.5}, 1.0)):
        torch.manual_seed(0)
        y = anorm.create_norm("ilm", 64, **options)(x)
        assert abs(y.std() - scale) < 0.25  # sigmoid(+-1) is 0.5 +- 0.23


def test_dead_channels_and_single_pixels_are_finite():
    for options in ({}, {"base": "in"}, {"base": "ln", "variance": "biased"}):
        layer = anorm.create_norm("ilm", 16, **options)
        for shape in ((2, 16, 1, 1), (2, 16, 4, 4)):
            x = torch.randn(shape)
            x[:, :4] = 1.5
            x.requires_grad_()
            y = layer(x)
            (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
            assert y.isfinite().all() and grad.isfinite().all()


def test_roles():
    roles = {name: need.role for name, need in anorm.create_norm("ilm", 32).param_needs().items()}
    network = ("encoder.weight", "weight_decoder.weight", "bias_decoder.weight")
    assert roles == {"weight": "norm", "bias": "norm"} | dict.fromkeys(network, "attention")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"base": "bn"}, "none of gn, ln, in"),
        ({"base": "ln", "groups": 4}, "option of base=gn"),
        ({"groups": 5}, "use groups=auto"),
        ({"key_group_size": 5}, "does not divide 32 channels"),
        ({"hidden": 0}, "neither auto nor a positive number"),
        ({"variance": "none"}, "neither 'unbiased' nor 'biased'"),
    ],
)
def test_wrong_options_say_what_is_right(options, words):
    with pytest.raises(ValueError, match=words):
        anorm.create_norm("ilm", 32, **options)
