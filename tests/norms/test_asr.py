"""ASR-Norm against the equations written on the map, its limit IN, and its options and guards."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import anorm

C = 12


def make(name="asrn", channels=C, **options):
    torch.manual_seed(0)
    layer = anorm.create_norm(name, channels, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def written_out(layer, x, *, unbiased=False, eps=1e-5, free=False, softplus=False, floor=0.1):
    """Eq. 2-8 with modules on (N, C) statistics and arithmetic on the map."""
    a = layer.adapt
    mu = x.mean((2, 3))
    sigma = (x.var((2, 3), unbiased=unbiased) + eps).sqrt()
    mu_stan = a.mean_decoder(F.relu(a.encoder(mu)))
    sigma_stan = a.std_decoder(F.relu((a.std_encoder or a.encoder)(sigma)))
    sigma_stan = F.softplus(sigma_stan) if softplus else F.relu(sigma_stan)
    l_mu, l_sigma = a.lambda_mean.sigmoid(), a.lambda_std.sigmoid()
    mu_hat = l_mu * mu_stan + (1 - l_mu) * mu
    sigma_hat = l_sigma * sigma_stan + (1 - l_sigma) * sigma
    sigma_hat = torch.where(sigma_hat < floor * sigma, floor * sigma, sigma_hat)
    if a.lambda_weight is None:
        l_gamma = l_beta = 1.0
    elif free:
        l_gamma, l_beta = a.lambda_weight, a.lambda_bias
    else:
        l_gamma, l_beta = a.lambda_weight.sigmoid(), a.lambda_bias.sigmoid()
    gamma = l_gamma * torch.sigmoid(a.weight_decoder(F.relu(a.rescale_encoder(sigma)))) + layer.weight
    beta = l_beta * torch.tanh(a.bias_decoder(F.relu((a.bias_encoder or a.rescale_encoder)(mu)))) + layer.bias
    spread = lambda t: t[..., None, None]
    return (x - spread(mu_hat)) / spread(sigma_hat) * spread(gamma) + spread(beta)


@pytest.mark.parametrize(
    "options, form",
    [
        ({}, {}),
        ({"share": "standardize"}, {}),
        ({"share": "none", "granularity": "channel"}, {}),
        ({"sigma_act": "softplus"}, {"softplus": True}),
        ({"rescale_lambda": "free", "floor": 0.0}, {"free": True, "floor": 0.0}),
        ({"rescale_lambda": "none"}, {}),
        ({"variance": "unbiased", "eps": 1e-6}, {"unbiased": True, "eps": 1e-6}),
        ({"mix_start": 3.0, "floor": 0.3}, {"floor": 0.3}),
    ],
)
def test_equals_the_equations_written_on_the_map(options, form):
    layer = make(**options)
    x = 2 * torch.randn(4, C, 5, 3, dtype=torch.double) + 1
    dy = torch.randn_like(x)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    ys = layer(leaves[0]), written_out(layer, leaves[1], **form)
    torch.testing.assert_close(*ys)
    grads = [torch.autograd.grad(y, leaf, dy)[0] for y, leaf in zip(ys, leaves, strict=True)]
    torch.testing.assert_close(*grads)


def switch_off(layer):
    """All lambdas 0: before a sigmoid that is -inf."""
    with torch.no_grad():
        for name in ("lambda_mean", "lambda_std", "lambda_weight", "lambda_bias"):
            bounded = layer.adapt.rescale_lambda == "sigmoid" or name in ("lambda_mean", "lambda_std")
            getattr(layer.adapt, name).fill_(float("-inf") if bounded else 0.0)
    return layer


@pytest.mark.parametrize("rescale_lambda", ["sigmoid", "free"])
@pytest.mark.parametrize("training", [True, False])
def test_without_lambdas_it_is_instance_norm(rescale_lambda, training):
    layer = switch_off(make(rescale_lambda=rescale_lambda)).train(training)
    one = anorm.create_norm("in", C).double()
    one.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x, dy = torch.randn(2, 4, C, 5, 3, dtype=torch.double)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    ys = [norm(leaf) for norm, leaf in zip((layer, one), leaves, strict=True)]
    for y in ys:
        y.backward(dy)
    torch.testing.assert_close(*ys)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_does_not_depend_on_the_batch_or_the_mode():
    layer = make()
    x = torch.randn(4, C, 3, 3, dtype=torch.double)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    torch.testing.assert_close(layer(x), layer.eval()(x))
    assert not list(layer.buffers())


def test_starts_of_the_lambdas():
    start = lambda **options: anorm.create_norm("asrn", C, **options).adapt
    # sigmoid(-3) = 0.0474, sigmoid of that = 0.51185, sigmoid(-5) = 0.0067, to their printed digits
    assert abs(start().lambda_mean.sigmoid().item() - 0.0474) < 5e-5
    assert abs(start(mix_start="code").lambda_std.sigmoid().item() - 0.51185) < 5e-5
    assert start(mix_start=-2.0).lambda_std.item() == -2
    assert abs(start().lambda_weight.sigmoid().item() - 0.0067) < 5e-5
    assert abs(start(rescale_lambda="free").lambda_bias.item() - 0.0067) < 5e-5
    assert start(rescale_lambda="none").lambda_bias is None
    assert start(granularity="channel").lambda_mean.shape == (C,) and start().lambda_mean.shape == (1,)


@pytest.mark.parametrize(
    "channels, wide, narrow", [(64, 32, 4), (256, 128, 16), (16, 8, 4), (12, 6, 4), (1, 1, 4)]
)
def test_bottlenecks(channels, wide, narrow):
    adapt = anorm.create_norm("asrn", channels).adapt
    assert (adapt.encoder.out_features, adapt.rescale_encoder.out_features) == (wide, narrow)
    assert anorm.create_norm("asrn", 64, standardize_ratio=16).adapt.encoder.out_features == 4


def test_parameter_count_for_shared_encoders():
    """(C h + h) + 2 (h C + C) + (C r + r) + 2 (r C + C) + 4 beside the affine, h = C/2, r = C/16."""
    c, h, r = 64, 32, 4
    extra = (c * h + h) + 2 * (h * c + c) + (c * r + r) + 2 * (r * c + c) + 4

    def count(**options):
        return sum(p.numel() for p in anorm.create_norm("asrn", c, **options).parameters())

    assert count() == extra + 2 * c
    assert count(share="standardize") == count() + c * r + r
    assert count(share="none") == count(share="standardize") + c * h + h


def test_the_floor_bounds_the_gain():
    """lambda_sigma near 1, no sigma_stan: sigma^ is (1 - 0.9975) sigma, a gain of 404; floored, 10."""
    for floor, gain in ((0.0, 404.4), (0.1, 10.0)):
        layer = anorm.create_norm("asrn", C, mix_start=6.0, floor=floor).double()
        with torch.no_grad():
            layer.adapt.std_decoder.weight.zero_(), layer.adapt.std_decoder.bias.zero_()
            layer.adapt.weight_decoder.weight.zero_()
            layer.adapt.weight_decoder.bias.fill_(-50)  # gamma^ = 1
        x = torch.randn(4, C, 32, 32, dtype=torch.double)
        # eps shifts a variance near 1 by 1e-5
        std = layer(x).std((2, 3), unbiased=False)
        torch.testing.assert_close(std, torch.full_like(std, gain), rtol=2e-4, atol=0)


def test_fixed_affine_does_not_learn():
    layer = anorm.create_norm("asrn", C, fixed_affine=True)
    y = layer(torch.randn(2, C, 3, 3))
    y.backward(torch.randn_like(y))
    assert layer.weight.grad is None and layer.bias.grad is None and layer.adapt.lambda_mean.grad is not None


def test_dead_channels_and_single_pixels_are_finite():
    for options in ({}, {"variance": "unbiased", "eps": 1e-6}, {"floor": 0.0}):
        layer = anorm.create_norm("asrn", C, **options)
        for shape in ((2, C, 1, 1), (2, C, 4, 4)):
            x = torch.randn(shape)
            x[:, :4] = 1.5
            x.requires_grad_()
            y = layer(x)
            (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
            assert y.isfinite().all() and grad.isfinite().all()


def test_roles_and_decay():
    needs = anorm.create_norm("asrn", C).param_needs()
    for name, need in needs.items():
        if "lambda" in name:
            assert (need.role, need.decay) == ("control", False)
        elif name.startswith("adapt."):
            assert (need.role, need.decay) == ("attention", name.endswith(".weight"))
        else:
            assert need.role == "norm"


def test_half_precision_keeps_statistics_in_float32():
    """256 x 256 values of 300: a float16 sum of squares is infinite."""
    x = 300 + torch.randn(1, C, 256, 256).half()
    layer = anorm.create_norm("asrn", C)
    y = layer(x)
    assert y.dtype == torch.float16 and y.isfinite().all()
    torch.testing.assert_close(y.float(), layer(x.float()), rtol=2e-3, atol=2e-3)  # float16 has 11 bits
    assert isinstance(layer.half()(x), torch.Tensor) and layer(x).isfinite().all()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"share": "all"}, "both, standardize, none"),
        ({"sigma_act": "elu"}, "relu, softplus"),
        ({"mix_start": "zero"}, "a number, paper, code"),
        ({"rescale_lambda": "tanh"}, "sigmoid, free, none"),
        ({"granularity": "group"}, "layer, channel"),
        ({"standardize_ratio": 0}, "positive number"),
        ({"floor": 1.0}, "at least 0 and below 1"),
        ({"variance": "mixed"}, "'biased' nor 'unbiased'"),
    ],
)
def test_wrong_options_say_what_is_right(options, words):
    with pytest.raises(ValueError, match=words):
        anorm.create_norm("asrn", C, **options)


def test_networks_are_linear_layers_in_torchs_initialisation():
    adapt = anorm.create_norm("asrn", 256).adapt
    for layer in (module for module in adapt.children() if isinstance(module, nn.Linear)):
        bound = layer.in_features**-0.5
        for parameter in (layer.weight, layer.bias):
            assert parameter.abs().max() <= bound and parameter.abs().max() > 0.5 * bound
