"""What the probes measure, against values by hand."""

import math

import pytest
import torch
from torch import nn

import anorm
from anorm.data.loaders import EvalLoader
from anorm.data.sources.synthetic import synthetic
from anorm.engine.device import nullcontext
from anorm.engine.evaluate import evaluate
from anorm.inside import landscape, mixtures, probes, surgery
from anorm.processes.world import World
from anorm.tasks.classification import Classification


def network(norm, seed=0, **options):
    torch.manual_seed(seed)
    return anorm.create_model("convnet", {"name": norm, **options}, num_classes=4, image_size=8).eval()


TASK = Classification([f"class {k}" for k in range(4)])


def images(count=24, batch=8):
    return EvalLoader(synthetic(8, 4, 8, count).val, batch)


def seen(model):
    return probes.look(model, images(), nullcontext)


def result(model):
    return evaluate(TASK, model, images(), World(), nullcontext)


# mixtures


def test_entropy_by_hand():
    weights = torch.tensor(
        [[1.0, 1.0, 1.0, 1.0], [0.5, 0.0, 0.0, 0.0], [0.2, 0.2, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]]
    )
    found = mixtures.entropy(weights)
    # uniform: log 4; one-hot: 0; (1/4, 1/4, 1/2): 2/4 log 4 + 1/2 log 2 = 1.5 log 2; nothing: not defined
    assert (
        found[:3].tolist() == pytest.approx([math.log(4), 0.0, 1.5 * math.log(2)], abs=1e-7)
        and found[3].isnan()
    )
    whole = mixtures.mixture(weights)
    assert whole.k == 4 and whole.entropy == pytest.approx((2 + 0 + 1.5) * math.log(2) / 3)
    assert whole.effective == pytest.approx((4 + 1 + 2**1.5) / 3)


def test_dead_and_saturated_components():
    weights = torch.rand(200, 5) * 0.9 + 0.05
    weights[:, 1] = 0.0
    weights[:, 3] = 1.0
    weights[:2, 4], weights[2:, 4] = 0.5, 0.0  # open for 1 % of the instances: dead still
    found = mixtures.mixture(weights)
    assert found.dead == (1, 4) and found.saturated == (3,)
    assert mixtures.mixture(weights, limit=None).saturated == ()
    weights[:3, 4] = 0.5
    weights[:, 0], weights[:, 2] = 0.99, 0.01  # nearly open and nearly closed are neither
    found = mixtures.mixture(weights)
    assert found.dead == (1,) and found.saturated == (3,)
    assert mixtures.mixture(torch.full((10, 4), 0.5)).varying == 0.0


def test_what_classes_explain():
    labels = torch.tensor([0, 0, 1, 1])
    assert mixtures.explained_by_class(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), labels) == 1.0
    assert mixtures.explained_by_class(torch.tensor([[0.0], [1.0], [0.0], [1.0]]), labels) == 0.0
    # means 1/4 and 3/4 about 1/2: 4 / 16 of 12 / 16 + ... = between 0.25, within 2 * 2 * 1/16 = 0.25
    assert mixtures.explained_by_class(torch.tensor([[0.0], [0.5], [0.5], [1.0]]), labels) == pytest.approx(
        0.5
    )
    assert mixtures.explained_by_class(torch.full((4, 3), 0.1), labels) == 0.0
    means = mixtures.by_class(torch.tensor([[0.0, 1.0], [0.5, 1.0], [0.5, 0.0], [1.0, 0.5]]), labels, [1, 0])
    assert means.tolist() == [[0.75, 0.25], [0.25, 1.0]]


# layers


def test_spread_over_batches_is_that_of_all():
    torch.manual_seed(0)
    values = torch.randn(23, 3) + 1000
    found = probes.Spread()
    for part in values.split(5):
        found.add(part)
    torch.testing.assert_close(found.mean, values.double().mean(0))
    torch.testing.assert_close(found.std, values.double().std(0, correction=0))
    still = probes.Spread()
    for part in torch.full((23, 1), 0.1).split(7):
        still.add(part)
    assert float(still.std) == 0.0 and float(still.mean) == float(torch.tensor(0.1))


def test_gammas_of_batch_norm_do_not_vary_and_those_of_attentive_norm_do():
    torch.manual_seed(1)
    bn, an = network("bn"), network("an")
    bn.bn1.weight.data = torch.linspace(1, 3, 16)
    found = seen(bn)
    assert list(found) == ["bn1", "bn2"] and found["bn2"].stage == 2 and found["bn2"].law == "BatchNorm"
    assert not any(one.by_instance or one.gamma_spread for one in found.values())
    torch.testing.assert_close(found["bn1"].gamma.mean, bn.bn1.weight.detach().double())
    # of 16 even steps from 1 to 3: width of a step 2 / 15, std = step * sqrt((16^2 - 1) / 12), mean 2
    assert found["bn1"].gamma_between_channels == pytest.approx(2 / 15 * math.sqrt(255 / 12) / 2)

    found = seen(an)
    assert all(one.by_instance and one.gamma_spread > 1e-4 for one in found.values())
    weights = found["bn1"].choices["mixture weights"]
    assert weights.values.shape == (24, 10) and len(found["bn1"].labels) == 24
    # the mean gamma is the mean weights' mixture
    torch.testing.assert_close(
        found["bn1"].gamma.mean.float(), weights.values.mean(0) @ an.bn1.weight.detach()
    )


def test_a_layer_that_tells_nothing_is_seen_without_its_parts():
    found = seen(network("module", target="torch.nn.BatchNorm2d"))
    assert [one.known for one in found.values()] == [False, False] and not found["bn1"].choices


def test_responses_by_hand():
    same = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    found = probes.Responses("x", 1, 1, 0.0, 1.0, same, torch.tensor([0, 0, 1, 1]))
    # of one class: 0 and 1/2; of two: 1/2, 1, 1/2, 1
    assert found.similarity() == pytest.approx((0.25, 0.75))
    units = probes.responses(network("bn"), images(), nullcontext)
    assert [(u.name, u.stage, u.unit) for u in units] == [("bn1", 1, 1), ("bn2", 2, 1)]
    for unit in units:
        assert unit.density.shape == (24, probes.BINS)
        torch.testing.assert_close(unit.density.sum(1), torch.ones(24))
        assert unit.low == 0.0 < unit.high  # behind a ReLU
    deep = anorm.create_model("resnet20", "bn", num_classes=4).eval()
    units = probes.responses(deep, EvalLoader(synthetic(32, 4, 8, 4).val, 4), nullcontext, most=2)
    assert [u.name for u in units] == [f"layer{s}.{b}.bn2" for s in (1, 2, 3) for b in (0, 2)]
    assert [u.unit for u in units] == [1, 3] * 3


# surgery


@pytest.mark.parametrize("still", ["no attention", "one component"])
def test_surgery_where_nothing_varies_loses_nothing(still):
    model = network("an") if still == "no attention" else network("an", k=1, activation="softmax")
    if still == "no attention":
        for layer in (model.bn1, model.bn2):
            layer.attention.fc.weight.data.zero_()
    logits = torch.cat([model(batch.inputs) for batch in images()])
    found = seen(model)
    _, each, together = surgery.operate(model, found, lambda: result(model))
    assert [one.name for one in each] == ["bn1", "bn2"]
    for one in (*each, together):
        assert (one.top1, one.loss, one.changed) == (0.0, 0.0, 0.0)
    assert torch.equal(logits, torch.cat([model(batch.inputs) for batch in images()]))


def test_surgery_gives_every_image_the_mean_affine():
    model = network("an")
    found = seen(model)
    kept = model.bn1
    averaged = surgery.Averaged(kept, found["bn1"].gamma.mean.float(), found["bn1"].beta.mean.float()).eval()
    x = torch.randn(3, 16, 8, 8)
    bn = kept.base
    x_hat = (x - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
    weights = found["bn1"].choices["mixture weights"].values.mean(0)
    gamma, beta = weights @ kept.weight, weights @ kept.bias
    expected = (gamma[:, None, None] * x_hat + beta[:, None, None]).relu()
    torch.testing.assert_close(averaged(x), expected)
    whole, each, together = surgery.operate(model, found, lambda: result(model))
    assert model.bn1 is kept and together.name == "all of them"
    assert whole["top1"] == result(model)["top1"] and any(one.loss != 0 for one in each)


def test_surgery_operates_on_laws_of_the_instance_alone():
    model = network("bn")
    _, each, together = surgery.operate(model, seen(model), lambda: result(model))
    assert each == [] and together is None


# ranks


def test_ranks_by_hand():
    model = network("bn")

    def buffers(mean):
        return [
            torch.full_like(b, mean) if "mean" in name else b.clone() for name, b in model.named_buffers()
        ]

    state = {"processes": {"size": 2, "buffers": [buffers(0.0), buffers(4.0)]}}
    found = probes.rank_divergence(state, model)
    assert found["bn1"] == {"running_mean": 1.0, "running_var": 0.0}  # 0 and 4 lie 2 from their mean, 2
    assert probes.rank_divergence({"processes": {"size": 1, "buffers": [buffers(0.0)]}}, model) == {}


# landscape


def test_along_the_gradient_of_a_parabola():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))  # loss = a/2 |w|^2: gradient a w
    a = 2.0
    found = landscape.along_gradient([w], lambda: a / 2 * w.square().sum(), (0.1, 0.5, 2.0), step=7)
    assert (found.step, found.loss, found.gradient_norm) == (7, pytest.approx(25.0), pytest.approx(10.0))
    assert found.losses == pytest.approx([25 * (1 - 2 * t) ** 2 for t in (0.1, 0.5, 2.0)], abs=1e-12)
    assert found.changes == pytest.approx([20 * t for t in (0.1, 0.5, 2.0)])  # a t |g|
    assert found.smoothness == pytest.approx(2.0)  # a
    assert w.tolist() == [3.0, 4.0]


def test_measuring_leaves_the_network_as_it_was():
    model = network("an").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = next(iter(images()))
    one = landscape._measure(model, batch, 0.1, (0.1,), 0)
    two = landscape._measure(model, batch, 0.1, (0.1,), 0)
    assert one == two and one.losses[0] != one.loss and model.training
    assert all(p.grad is None for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
