"""AN against arrays computed by the authors' public implementations in float64 (12 variants of the module).

The arrays hold inputs, upstream gradients, parameters in the published names, outputs, both kinds of gradients, mixture
weights and running statistics, for one training step and for evaluation from the same start.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import anorm
from anorm import ops

ARRAYS = Path(__file__).parent / "arrays"

# the published variant of each file, in this project's words
VARIANTS = {
    "bn_mode2_N4_C8_K5_6x6_fc1": {},
    "bn_mode2_N2_C16_K10_7x5_fc1": {},
    "bn_mode2_N8_C32_K20_3x3_fc1": {},
    "bn_mode2_N3_C12_K2_1x2_fc1": {},
    "bn_mode2_tinyvar_N4_C8_K5_6x6": {},
    "bn_mode0_N4_C16_K10_6x6": {"attention": "a1", "activation": "sigmoid"},
    "bn_mode4_N4_C16_K10_6x6": {"attention": "a1"},
    "bn_mode5_N4_C16_K10_6x6": {"activation": "sigmoid"},
    "bn_mode6_N4_C16_K10_6x6": {"activation": "softmax"},
    "gn_det_mode0_G4_N3_C16_K10_7x7": {"name": "an_gn", "base": {"name": "gn", "groups": 4}},
    "gn_rel_mode1_G4_attnG1_N3_C16_K10_7x7": {
        "name": "an_gn",
        "base": {"name": "gn", "groups": 4},
        "attention": "a2",
    },
    "bn_rel_meanonly_N4_C16_K10_6x6": {"input": "mean"},
}


def own_name(published: str) -> str:
    for old, new in (
        ("attention_weights.attention.", "attention."),
        ("attn_weights.attention.", "attention."),
    ):
        published = published.replace(old, new)
    for old, new in (("attention.0.", "attention.fc."), ("attention.1.", "attention.norm.")):
        published = published.replace(old, new)
    published = {"weight_": "weight", "bias_": "bias"}.get(published, published)
    return (
        f"base.{published}"
        if published in ("running_mean", "running_var", "num_batches_tracked")
        else published
    )


def load(name: str):
    arrays = {key: torch.from_numpy(value) for key, value in np.load(ARRAYS / f"{name}.npz").items()}
    options = dict(VARIANTS[name])
    k, channels = arrays["p.weight_"].shape
    layer = anorm.create_norm(options.pop("name", "an"), channels, k=k, **options).double()
    own = layer.state_dict()
    state = {
        own_name(key[key.index(".") + 1 :]): v for key, v in arrays.items() if key.startswith(("p.", "b0."))
    }
    layer.load_state_dict({key: value.reshape(own[key].shape) for key, value in state.items()})
    return layer, arrays


def test_every_array_is_tested():
    assert {path.stem for path in ARRAYS.glob("*.npz")} == set(VARIANTS)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_published_arrays(name, mode, backend):
    with ops.use_backend(backend):
        check_arrays(name, mode)


def check_arrays(name, mode):
    layer, arrays = load(name)
    layer.train(mode == "train")
    x = arrays["x"].requires_grad_()
    seen = []
    layer.attention.register_forward_hook(lambda *call: seen.append(call[-1]))
    y = layer(x)
    y.backward(arrays["g"])
    close = dict(rtol=0, atol=1e-10)  # both sides are float64: only the order of sums differs
    torch.testing.assert_close(y, arrays[f"{mode}.y"], **close)
    if seen:  # the compiled law makes the weights without the module
        torch.testing.assert_close(seen[0], arrays[f"{mode}.lambda"], **close)
    torch.testing.assert_close(x.grad, arrays[f"{mode}.gx"], **close)
    parameters = dict(layer.named_parameters())
    for key, value in arrays.items():
        if key.startswith(f"{mode}.gp."):
            grad = parameters[own_name(key.removeprefix(f"{mode}.gp."))].grad
            torch.testing.assert_close(grad, value.reshape(grad.shape), **close)
        if mode == "train" and key.startswith("b1."):
            buffer = layer.state_dict()[own_name(key.removeprefix("b1."))]
            torch.testing.assert_close(buffer, value, **close)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_published_arrays_in_float32(name, mode):
    layer, arrays = load(name)
    layer.float().train(mode == "train")
    expected = arrays[f"{mode}.y_float32"]
    # float32 rounding (6e-8) through a chain of a dozen operations, relative to the largest value
    error = (layer(arrays["x"].float()) - expected).abs().max() / expected.abs().max()
    assert error < 2e-5


def test_one_component_of_weight_one_is_batch_norm():
    """K = 1, lambda = 1 (hsigmoid saturated by the bias of A1), gamma and beta shared: AN is BN."""
    an = anorm.create_norm("an", 6, act="relu", k=1, attention="a1").double()
    bn = anorm.create_norm("bn", 6, act="relu").double()
    with torch.no_grad():
        an.attention.fc.weight.zero_()
        an.attention.fc.bias.fill_(3.0)
        bn.weight.copy_(an.weight[0])
        bn.bias.copy_(an.bias[0])
    x, dy = torch.randn(2, 4, 6, 5, 3, dtype=torch.double)
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [layer(t) for layer, t in zip((an, bn), xs, strict=True)]
    for y in ys:
        y.backward(dy)
    torch.testing.assert_close(*ys)
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    an.eval(), bn.eval()
    torch.testing.assert_close(an(x), bn(x))


def test_a_map_of_one_pixel_and_a_dead_channel_are_finite():
    for options in ({}, {"input": "rsd_paper"}, {"input": "mean_std"}):
        layer = anorm.create_norm("an", 4, **options)
        for shape in ((8, 4, 1, 1), (8, 4, 3, 3)):
            x = torch.randn(shape)
            x[:, 0] = 1.5  # constant
            x.requires_grad_()
            y = layer(x)
            (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
            assert y.isfinite().all() and grad.isfinite().all()


def test_parameter_roles_and_initialisation():
    torch.manual_seed(0)
    layer = anorm.create_norm("an", 512, k=20)
    roles = {name: needs.role for name, needs in layer.param_needs().items()}
    assert roles == {
        "weight": "mixture",
        "bias": "mixture",
        "attention.fc.weight": "attention",
        "attention.norm.weight": "attention",
        "attention.norm.bias": "attention",
    }
    # N(1, 0.1) and N(0, 0.1) with 10,240 draws: standard errors 0.001 and 0.0007; FC: std sqrt(2/K)
    assert abs(layer.weight.mean() - 1) < 5e-3 and abs(layer.weight.std() - 0.1) < 4e-3
    assert abs(layer.bias.mean()) < 5e-3 and abs(layer.bias.std() - 0.1) < 4e-3
    assert abs(layer.attention.fc.weight.std() - (2 / 20) ** 0.5) < 0.012


@pytest.mark.parametrize(
    "options, words",
    [
        ({"k": 0}, "positive number of components"),
        ({"k": [1, 2]}, "one positive number"),
        ({"input": "max"}, "rsd, rsd_paper, mean, mean_std"),
        ({"attention": "a3"}, "a1, a2, se"),
        ({"activation": "tanh"}, "hsigmoid"),
        ({"base": "an"}, "cannot be the base"),
        ({"base": "gnn"}, "did you mean gn"),
        ({"kk": 3}, "no option 'kk'"),
    ],
)
def test_wrong_options_say_what_is_right(options, words):
    with pytest.raises(ValueError, match=words):
        anorm.create_norm("an", 8, **options)


def test_a_batch_of_one_cannot_train_the_attention_norm():
    layer = anorm.create_norm("an", 8)
    x = torch.randn(1, 8, 4, 4)
    with pytest.raises(ValueError, match="at least 2 per process"):
        layer(x)
    assert layer.eval()(x).shape == x.shape
    assert anorm.create_norm("an_gn", 8).train()(x).shape == x.shape
