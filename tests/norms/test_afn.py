"""AFN against the equations written on the map, its limit BN, the released layer, and the guards."""

import pytest
import torch
from torch.nn import functional as F

import anorm

C = 12
PRESETS = ("afn", "afn_as_released")


def make(name="afn", channels=C, **options):
    torch.manual_seed(0)
    layer = anorm.create_norm(name, channels, **options).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 2)
    return layer


def written_out(layer, x, mu, sigma, *, free=False, residual=False, floor=0.1):
    """Eq. 2-8 with modules on (C,) statistics and arithmetic on the map."""
    a = layer.adapt
    mu_stan = a.mean_decoder(F.relu(a.encoder(mu)))
    sigma_stan = a.std_decoder(F.relu((a.std_encoder or a.encoder)(sigma)))
    l_mu, l_sigma = a.lambda_mean.sigmoid(), a.lambda_std.sigmoid()
    l_gamma, l_beta = (t if free else t.sigmoid() for t in (a.lambda_weight, a.lambda_bias))
    gamma = torch.sigmoid(a.weight_decoder(F.relu(a.rescale_encoder(sigma))))
    if residual:
        mu_hat, sigma_hat, gamma = mu + l_mu * mu_stan, sigma * (l_sigma * sigma_stan).exp(), gamma - 0.5
    else:
        mu_hat = l_mu * mu_stan + (1 - l_mu) * mu
        sigma_hat = l_sigma * F.relu(sigma_stan) + (1 - l_sigma) * sigma
    sigma_hat = torch.where(sigma_hat < floor * sigma, floor * sigma, sigma_hat)
    gamma = l_gamma * gamma + layer.weight
    beta = l_beta * torch.tanh(a.bias_decoder(F.relu((a.bias_encoder or a.rescale_encoder)(mu)))) + layer.bias
    spread = lambda t: t[:, None, None]
    return (x - spread(mu_hat)) / spread(sigma_hat) * spread(gamma) + spread(beta)


def same(layer, expected):
    """Output and input gradient of the layer and of a function of x."""
    x, dy = torch.randn(2, 4, C, 5, 3, dtype=torch.double)
    leaves = [(2 * x + 1).requires_grad_() for _ in range(2)]
    ys = layer(leaves[0]), expected(leaves[1])
    torch.testing.assert_close(*ys)
    grads = [torch.autograd.grad(y, leaf, dy)[0] for y, leaf in zip(ys, leaves, strict=True)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    "options, form",
    [
        ({}, {}),
        ({"share": "none", "granularity": "channel"}, {}),
        ({"share": "standardize", "mix_start": 3.0}, {}),
        ({"form": "residual"}, {"residual": True}),
    ],
)
def test_training_equals_the_equations_on_the_batch(options, form):
    layer = make(**options)
    same(
        layer,
        lambda x: written_out(
            layer, x, x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + 1e-5).sqrt(), **form
        ),
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_released_layer_uses_the_batch_in_both_modes(training):
    """Unbiased variance, eps outside the root, unbounded lambdas, no floor; its dropout is set aside here."""
    layer = make("afn_as_released", dropout=0.0).train(training)
    same(
        layer,
        lambda x: written_out(layer, x, x.mean((0, 2, 3)), x.std((0, 2, 3)) + 1e-6, free=True, floor=0.0),
    )


def test_evaluation_feeds_the_networks_with_running_statistics():
    layer = make().eval()
    assert layer.needs() == "none"
    same(layer, lambda x: written_out(layer, x, layer.running_mean, (layer.running_var + 1e-5).sqrt()))


def switch_off(layer):
    """All lambdas 0: before a sigmoid that is -inf."""
    with torch.no_grad():
        layer.adapt.lambda_mean.fill_(float("-inf")), layer.adapt.lambda_std.fill_(float("-inf"))
        for raw in (layer.adapt.lambda_weight, layer.adapt.lambda_bias):
            raw.fill_(float("-inf") if layer.adapt.rescale_lambda == "sigmoid" else 0.0)
    return layer


@pytest.mark.parametrize("options", [{}, {"rescale_lambda": "free"}, {"form": "residual"}])
@pytest.mark.parametrize("training", [True, False])
def test_without_lambdas_it_is_batch_norm(options, training):
    layer, bn = switch_off(make(**options)), anorm.create_norm("bn", C).double()
    bn.load_state_dict({key: layer.state_dict()[key] for key in bn.state_dict()})
    layer.train(training), bn.train(training)
    same(layer, bn)
    for key, value in bn.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value)


def test_residual_form_with_zero_decoders_starts_as_batch_norm_and_learns():
    layer = anorm.create_norm("afn", C, form="residual", decoders="zero")
    x = 3 * torch.randn(4, C, 5, 5) + 2
    y = layer(x)
    torch.testing.assert_close(y, anorm.create_norm("bn", C)(x))
    y.backward(torch.randn_like(y))
    for decoder in ("mean_decoder", "std_decoder", "weight_decoder", "bias_decoder"):
        assert getattr(layer.adapt, decoder).bias.grad.ne(0).all()


def test_eval_stats_and_the_presets_state_what_they_evaluate_with():
    x = torch.randn(4, C, 3, 3, dtype=torch.double)
    for layer in (make(eval_stats="batch").eval(), make("afn_as_released").eval()):
        assert layer.eval_stats == "batch" and layer.needs() == "mean_var"
        before = layer.running_mean.clone()
        assert not torch.allclose(layer(x)[:1], layer(x[:1]))  # transductive
        torch.testing.assert_close(layer.running_mean, before)
    assert make().eval_stats == "running"


@pytest.mark.parametrize("name", PRESETS)
def test_running_statistics_are_batch_norms(name):
    layer, bn = anorm.create_norm(name, C), anorm.create_norm("bn", C)
    for _ in range(3):
        x = 3 * torch.randn(4, C, 5, 5) + 2
        layer(x), bn(x)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(layer.state_dict()[key], bn.state_dict()[key])
    assert [key for key, _ in layer.stat_buffers()] == ["running_mean", "running_var", "num_batches_tracked"]


def test_dropout_of_the_statistics_reaches_only_the_standardizing_networks_in_training():
    layer = make(dropout=0.3)
    x = torch.randn(4, C, 5, 3, dtype=torch.double)
    assert not torch.equal(layer(x), layer(x))
    with torch.no_grad():
        for decoder in (layer.adapt.mean_decoder, layer.adapt.std_decoder):
            decoder.weight.zero_()
    torch.testing.assert_close(layer(x), layer(x))
    layer = make(dropout=0.3)
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x))
    anorm.freeze_stats(layer.train())
    torch.testing.assert_close(layer(x), layer(x))


def test_the_preset_is_the_released_settings():
    layer = anorm.create_norm("afn_as_released", 64)
    adapt = layer.adapt
    assert (adapt.dropout, adapt.floor, adapt.rescale_lambda, adapt.form) == (0.3, 0.0, "free", "mix")
    assert (layer.variance, layer.epsilon, layer.eps_place) == ("unbiased", 1e-6, "outside")
    assert layer.eval_stats == "batch"
    # sigmoid(sigmoid(-3)) = 0.51185 and sigmoid(-5) = 0.0067, to their printed digits
    assert abs(adapt.lambda_mean.sigmoid().item() - 0.51185) < 5e-5
    assert abs(adapt.lambda_bias.item() - 0.0067) < 5e-5
    assert (adapt.encoder.out_features, adapt.rescale_encoder.out_features) == (32, 4)
    assert anorm.create_norm("afn_as_released", 16).adapt.rescale_encoder.out_features == 1


def test_the_initial_gain():
    """Where sigma_stan is 0 the gain is 1 / (1 - l): 1.05 from the paper's start, 2.05 from the code's.

    gamma^ is 1 + 0.0067 sigmoid(0), 0.3 % more.
    """
    x = torch.randn(8, C, 16, 16)
    for name, gain in zip(PRESETS, (1.0 / (1 - 0.0474), 1.0 / (1 - 0.5118)), strict=True):
        layer = anorm.create_norm(name, C, dropout=0.0)
        with torch.no_grad():
            layer.adapt.std_decoder.weight.zero_(), layer.adapt.std_decoder.bias.fill_(-1)
            layer.adapt.weight_decoder.weight.zero_(), layer.adapt.weight_decoder.bias.zero_()
        got = layer(x).std((0, 2, 3))
        torch.testing.assert_close(got, torch.full_like(got, gain * 1.00335), rtol=2e-3, atol=0)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("channels", [1, 3, 8, 16])
def test_small_widths_dead_channels_and_single_pixels_are_finite(name, channels):
    layer = anorm.create_norm(name, channels)
    for shape in ((2, channels, 1, 1), (2, channels, 4, 4)):
        x = torch.randn(shape)
        x[:, 0] = 1.5
        x.requires_grad_()
        for training in (True, False):
            y = layer.train(training)(x)
            (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
            assert y.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_one_value_trains_with_an_error_and_evaluates(name):
    layer, x = anorm.create_norm(name, C), torch.randn(1, C, 1, 1)
    with pytest.raises(ValueError, match="cannot train on one value per channel"):
        layer(x)
    assert layer.eval()(x).isfinite().all()


@pytest.mark.parametrize("name", PRESETS)
def test_half_precision_keeps_statistics_in_float32(name):
    """256 x 256 values of 300: a float16 sum of squares is infinite."""
    x = 300 + torch.randn(2, C, 128, 256).half()
    layer = anorm.create_norm(name, C, dropout=0.0)
    y = layer(x)
    assert y.dtype == torch.float16 and y.isfinite().all()
    torch.testing.assert_close(y.float(), layer(x.float()), rtol=2e-3, atol=2e-3)  # float16 has 11 bits
    layer.eval().half()
    assert layer(x).dtype == torch.float16


def test_roles_and_decay():
    for name, need in anorm.create_norm("afn", C).param_needs().items():
        if "lambda" in name:
            assert (need.role, need.decay) == ("control", False)
        elif name.startswith("adapt."):
            assert (need.role, need.decay) == ("attention", name.endswith(".weight"))
        else:
            assert need.role == "norm"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"form": "sum"}, "mix, residual"),
        ({"decoders": "one"}, "default, zero"),
        ({"dropout": 1.0}, "at least 0 and below 1"),
        ({"variance": "mixed"}, "'biased' nor 'unbiased'"),
        ({"eps_place": "above"}, "'inside' nor 'outside'"),
        ({"eval_stats": "ema"}, "'running' nor 'batch'"),
        ({"rescale_min": 0}, "positive number"),
    ],
)
def test_wrong_options_say_what_is_right(options, words):
    with pytest.raises(ValueError, match=words):
        anorm.create_norm("afn", C, **options)
