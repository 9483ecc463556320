"""BIN between its two ends, and what it asks of the training loop."""

import pytest
import torch

import anorm

C = 6


def pair(name, rho, training):
    """BIN with all gates at rho and the branch it should be, of one random affine and running statistics."""
    torch.manual_seed(0)
    bin_, one = (anorm.create_norm(n, C, act="relu").double().train(training) for n in ("bin", name))
    with torch.no_grad():
        bin_.gate.fill_(rho)
        for parameter in (bin_.weight, bin_.bias):
            parameter.normal_()
        bin_.running_mean.normal_(), bin_.running_var.uniform_(0.5, 2)
    one.load_state_dict({key: bin_.state_dict()[key] for key in one.state_dict()})
    return bin_, one


@pytest.mark.parametrize("name, rho", [("bn", 1.0), ("in", 0.0)])
@pytest.mark.parametrize("training", [True, False])
def test_a_closed_or_open_gate_is_one_branch(name, rho, training):
    layers = pair(name, rho, training)
    x, r, dy = torch.randn(3, 4, C, 5, 3, dtype=torch.double)
    leaves = [x.clone().requires_grad_() for _ in layers]
    ys = [layer(leaf, r) for layer, leaf in zip(layers, leaves, strict=True)]
    for y in ys:
        y.backward(dy)
    torch.testing.assert_close(*ys)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    torch.testing.assert_close(layers[0].weight.grad, layers[1].weight.grad)
    if name == "bn":
        for buffer in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(layers[0], buffer), getattr(layers[1], buffer))


@pytest.mark.parametrize("training", [True, False])
def test_equals_the_equation_written_on_the_map(training):
    bin_, _ = pair("bn", 0.3, training)
    bin_.act = None
    with torch.no_grad():
        bin_.gate.copy_(torch.rand(C))
    running = bin_.running_mean.clone(), bin_.running_var.clone()
    x = 2 * torch.randn(4, C, 5, 3, dtype=torch.double) + 7
    spread = lambda t: t[:, None, None]
    mean, var = running
    if training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    batch = (x - spread(mean)) / (spread(var) + 1e-5).sqrt()
    variance = x.var((2, 3), unbiased=False, keepdim=True)
    instance = (x - x.mean((2, 3), keepdim=True)) / (variance + 1e-5).sqrt()
    rho = spread(bin_.gate)
    expected = spread(bin_.weight) * (rho * batch + (1 - rho) * instance) + spread(bin_.bias)
    torch.testing.assert_close(bin_(x), expected)


def test_starts_as_batch_norm():
    x = torch.randn(4, C, 3, 3)
    torch.testing.assert_close(anorm.create_norm("bin", C)(x), anorm.create_norm("bn", C)(x))


def test_gates_learn_fast_without_decay_and_keep_their_limits():
    layer = anorm.create_norm("bin", C)
    need = layer.param_needs()["gate"]
    assert (need.role, need.decay, need.lr_scale, need.clip) == ("control", False, 10.0, None)
    assert {layer.param_needs()[name].role for name in ("weight", "bias")} == {"norm"}
    with torch.no_grad():
        layer.gate.copy_(torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5, 0.9]))
    layer.after_step(0.5)
    torch.testing.assert_close(layer.gate.detach(), torch.tensor([0.0, 0.0, 0.25, 1.0, 1.0, 0.9]))


def test_evaluation_with_batch_statistics_is_training_without_tracking():
    bin_, _ = pair("bn", 0.4, False)
    x = torch.randn(4, C, 3, 3, dtype=torch.double)
    before = bin_.running_mean.clone()
    bin_.eval_stats = "batch"
    y = bin_(x)
    torch.testing.assert_close(bin_.running_mean, before)
    torch.testing.assert_close(y, bin_.train()(x))
    assert [name for name, _ in bin_.stat_buffers()] == ["running_mean", "running_var", "num_batches_tracked"]


def test_a_one_pixel_map_leaves_the_batch_branch():
    bin_, _ = pair("bn", 0.5, False)
    bin_.act = None
    x = torch.randn(4, C, 1, 1, dtype=torch.double)
    batch = (x.squeeze() - bin_.running_mean) / (bin_.running_var + 1e-5).sqrt()
    torch.testing.assert_close(bin_(x).squeeze(), bin_.weight * 0.5 * batch + bin_.bias)
