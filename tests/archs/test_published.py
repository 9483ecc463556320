"""Files in the authors' naming give the logits, gradients and statistics that their networks gave."""

import numpy as np
import published_weights as published
import pytest
import torch

import anorm
from anorm.weights import load_weights, translate

RECORDED = sorted(path.stem.removeprefix("model_") for path in published.ARRAYS.glob("model_*.npz"))


def build(name, **options):
    arch, norm, arch_options = published.MODELS[name]
    return anorm.create_model(arch, norm, **arch_options | options)


def close(ours, recorded, rtol):
    """Relative to the largest recorded value: single elements may cancel to nothing."""
    ours, recorded = np.asarray(ours), np.asarray(recorded)
    assert np.abs(ours - recorded).max() <= rtol * np.abs(recorded).max()


@pytest.mark.parametrize("name", published.MODELS)
def test_every_published_name_has_its_place(name):
    """All 21 models: a one-to-one map onto the state_dict, equal shapes, equal parameter counts."""
    with torch.device("meta"):
        model = build(name)
    record, target = published.NAMES[name], model.state_dict()
    shapes = {key: tuple(shape) for key, shape in record["params"] + record["buffers"]}
    _, places = translate(shapes, target)
    assert sorted(places.values()) == sorted(target)
    for key, place in places.items():
        assert shapes[key][: target[place].dim()] == target[place].shape
        assert np.prod(shapes[key]) == target[place].numel()
    assert sum(p.numel() for p in model.parameters()) == record["total"]
    assert {places[key] for key, _ in record["params"]} == {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize("prefix", ["", "module.", "module.network."])
@pytest.mark.parametrize("name", RECORDED)
def test_published_function(name, prefix, tmp_path):
    """Recorded in float64 by the authors' code (their AN, grammar, stem and SE), loaded through a file."""
    record, recorded = published.NAMES[name], np.load(published.ARRAYS / f"model_{name}.npz")
    model = build(name).double()
    weights = published.state(record["params"] + record["buffers"])
    torch.save({prefix + key: value for key, value in weights.items()}, tmp_path / "published.pth")
    report = load_weights(model, tmp_path / "published.pth")
    assert report.complete and report.loaded == len(weights)

    x = published.model_input(name)
    with torch.no_grad():
        close(model.eval()(x), recorded["eval.logits"], 1e-8)
    if prefix:  # the same tensors by another name: evaluation is enough
        return
    logits = model.train()(x.requires_grad_())
    logits.backward(published.logit_gradient(name))
    # batch statistics of 4 x 2 x 2 values in the last stage amplify rounding: 3e-11 seen in AOGNet
    close(logits.detach(), recorded["train.logits"], 1e-6)
    close(x.grad[:, :, ::8, ::8], recorded["train.gx_every_8th"], 1e-6)
    _, places = translate({key: tuple(value.shape) for key, value in weights.items()}, model.state_dict())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    gradients = [parameters[places[key]].grad.flatten() for key, _ in record["params"]]
    close([g.norm() for g in gradients], recorded["train.grad_l2"], 1e-6)
    floor = 1e-8 * float(recorded["train.grad_l2"].max())
    for g, first in zip(gradients, recorded["train.grad_first4"], strict=True):
        # a convolution in front of a batch norm has gradients of about 1e-16 where they cancel exactly
        np.testing.assert_allclose(g[:4], first[: len(g[:4])], rtol=1e-6, atol=floor)
    close(
        [buffers[places[key]].sum() for key, _ in record["buffers"]], recorded["train.buffer_sum_after"], 1e-8
    )
