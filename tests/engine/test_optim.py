import sys
import types

import pytest
import torch
from torch import nn

from anorm import create_model
from anorm.config.settings import Optim
from anorm.engine import optim


def groups_of(**options):
    return optim.parameter_groups(create_model("resnet18", "an", 10), 1e-4, **options)


def test_every_parameter_is_in_exactly_one_group():
    model = create_model("resnet18", "an", 10)
    groups = optim.parameter_groups(model, 1e-4, decay_norm=False, layer_decay=0.9)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_everything_decays_by_default_as_the_authors_code_does():
    [group] = groups_of()
    assert group["weight_decay"] == 1e-4
    assert set(group["roles"]) == {"weight", "bias", "norm", "mixture", "attention"}


def test_decay_norm_false_excludes_what_norms_declare_and_nothing_else():
    decayed, excluded = sorted(groups_of(decay_norm=False), key=lambda group: -group["weight_decay"])
    assert set(excluded["roles"]) == {"norm", "mixture", "attention"} and excluded["weight_decay"] == 0
    assert "fc.bias" in decayed["names"]  # a bias, but of no norm
    assert "layer1.0.bn2.weight" in excluded["names"]  # K x C, and yet no weight matrix
    assert "layer1.0.downsample.1.weight" not in decayed["names"]


def test_another_librarys_network_decays_and_scales_as_one_of_ours():
    model = create_model("timm:resnet18", "timm:groupnorm", 10)
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)}
    decayed, excluded = sorted(
        optim.parameter_groups(model, 1e-4, decay_norm=False), key=lambda group: -group["weight_decay"]
    )
    assert {name.rpartition(".")[0] for name in excluded["names"]} == norms and len(norms) == 20
    assert (decayed["weight_decay"], excluded["weight_decay"]) == (1e-4, 0.0)
    groups = optim.parameter_groups(model, 1e-4, layer_decay=0.5)
    scale = {name.removeprefix("network."): group["lr_scale"] for group in groups for name in group["names"]}
    assert (scale["fc.weight"], scale["layer4.1.conv1.weight"], scale["layer4.0.bn2.bias"]) == (
        1.0,
        0.5,
        0.25,
    )


def test_a_module_declares_its_own_needs():
    """Switchable norms ask for a tenth of the rate, no decay and a gradient clip for their control
    parameters, if they do.
    """
    from anorm.norms.base import Norm, ParamNeeds

    class Controlled(Norm):
        def __init__(self):
            super().__init__(4)
            self.control = nn.Parameter(torch.ones(3))
            self.weight = nn.Parameter(torch.ones(4))

        def param_needs(self):
            return {
                "control": ParamNeeds("control", decay=False, lr_scale=0.1, clip=1.0),
                "weight": ParamNeeds("norm"),
            }

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Controlled())
    groups = {tuple(group["roles"]): group for group in optim.parameter_groups(model, 0.5)}
    control = groups[("control",)]
    assert (control["weight_decay"], control["lr_scale"], control["clip"]) == (0.0, 0.1, 1.0)
    optimizer = optim.create_optimizer(list(groups.values()), Optim(momentum=0.0, weight_decay=0.5))
    optim.set_rate(optimizer, 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optim.step(optimizer, torch.amp.GradScaler("cpu", enabled=False), None)
    moved = before["1.control"] - model[1].control
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-5)  # rate 1 x 0.1 on a gradient clipped to norm 1
    torch.testing.assert_close(
        before["1.weight"] - model[1].weight, torch.full((4,), 100.0) + 0.5 * before["1.weight"]
    )


def test_layer_decay_falls_with_the_distance_from_the_head():
    groups = optim.parameter_groups(create_model("resnet18", "bn", 10), 1e-4, layer_decay=0.5)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    assert scale["fc.weight"] == 1.0
    assert scale["layer4.1.conv1.weight"] == scale["layer4.1.bn2.weight"] == 0.5
    assert scale["layer4.0.conv1.weight"] == 0.25
    assert scale["conv1.weight"] == min(scale.values())


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_names_of_timms_factory(name):
    optimizer = optim.create_optimizer(groups_of(), Optim(name=name))
    optim.set_rate(optimizer, 0.3)
    assert {group["lr"] for group in optimizer.param_groups} == {0.3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}


def test_apexs_sgd_where_it_can_be_imported(monkeypatch):
    """A stand-in with the arguments of NVIDIA's class, which needs its GPU: it gets what torch's own would."""

    class FusedSGD(torch.optim.SGD):
        def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
                     wd_after_momentum=False, materialize_master_grads=True, set_grad_none=False):  # fmt: skip
            super().__init__(params, lr, momentum, dampening, weight_decay, nesterov)

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", types.ModuleType("apex.optimizers"))
    sys.modules["apex.optimizers"].FusedSGD = FusedSGD
    weights = []
    for impl in ("apex", "foreach"):
        torch.manual_seed(0)
        model = create_model("convnet", "an", 4)
        optimizer = optim.create_optimizer(
            optim.parameter_groups(model, 1e-2, decay_norm=False), Optim(impl=impl, nesterov=True)
        )
        assert isinstance(optimizer, FusedSGD) == (impl == "apex")
        for _ in range(3):
            optim.set_rate(optimizer, 0.1)
            model(torch.randn(4, 3, 32, 32)).square().mean().backward()
            optim.step(optimizer, torch.amp.GradScaler("cpu", enabled=False), 1.0)
            optimizer.zero_grad()
        weights.append(model.state_dict())
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-6, atol=1e-7)


def test_sgd_is_torchs_and_not_nesterov_unless_asked():
    """timm's name sgd means Nesterov; the papers' SGD does not."""
    for nesterov in (False, True):
        torch.manual_seed(0)
        weight, twin = (nn.Parameter(torch.linspace(-1, 1, 7)) for _ in range(2))
        ours = optim.create_optimizer(
            [{"params": [weight], "lr_scale": 1.0, "clip": None, "weight_decay": 0.1}],
            Optim(nesterov=nesterov, weight_decay=0.1),
        )
        theirs = torch.optim.SGD([twin], lr=0.2, momentum=0.9, weight_decay=0.1, nesterov=nesterov)
        for _ in range(3):
            optim.set_rate(ours, 0.2)
            weight.grad = twin.grad = torch.randn(7)
            optim.step(ours, torch.amp.GradScaler("cpu", enabled=False), None)
            theirs.step()
        # fused and plain kernels round differently
        torch.testing.assert_close(weight, twin, rtol=1e-6, atol=1e-7)


def test_clipping_and_a_gradient_that_is_not_finite():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = optim.create_optimizer(
        [{"params": [weight], "lr_scale": 1.0, "clip": None, "weight_decay": 0.0}],
        Optim(momentum=0.0, weight_decay=0.0),
    )
    optim.set_rate(optimizer, 1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    weight.grad = torch.full((4,), 3.0)
    assert optim.step(optimizer, scaler, clip=1.0).item() == pytest.approx(6.0)
    assert weight.norm().item() == pytest.approx(1.0, rel=1e-5)
    before = weight.detach().clone()
    weight.grad = torch.tensor([1.0, float("nan"), 1.0, 1.0])
    assert not optim.step(optimizer, scaler, clip=None).isfinite()
    assert torch.equal(weight, before)


def test_gradients_are_clipped_after_they_are_unscaled():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = optim.create_optimizer(
        [{"params": [weight], "lr_scale": 1.0, "clip": None, "weight_decay": 0.0}],
        Optim(momentum=0.0, weight_decay=0.0),
    )
    optim.set_rate(optimizer, 1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((weight * 3).sum()).backward()
    assert optim.step(optimizer, scaler, clip=1.0).item() == pytest.approx(6.0)
    assert weight.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_a_first_step_that_overflows_leaves_no_trace():
    """A fused kernel that reads found_inf writes nothing then, momentum neither, as on a GPU in fp16."""
    junk = [torch.full((4096,), float("nan")) for _ in range(64)]
    weight, twin = (nn.Parameter(torch.ones(4096)) for _ in range(2))
    optimizer = optim.create_optimizer(
        [{"params": [weight], "lr_scale": 1.0, "clip": None, "weight_decay": 0.0}],
        Optim(momentum=0.9, weight_decay=0.0),
    )
    del junk  # memory that is allocated and not written holds this
    theirs = torch.optim.SGD([twin], lr=1.0, momentum=0.9)
    optim.set_rate(optimizer, 1.0)
    for overflow in (1.0, 0.0, 0.0):
        weight.grad = twin.grad = torch.full_like(weight, 0.5)
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(overflow)
        optimizer.step()
        if not overflow:
            theirs.step()
    assert torch.equal(weight, twin)  # halves: nothing is rounded


def test_momentum_follows_the_layout_of_the_weights():
    """hardware.channels_last may change between two parts of a run."""
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 4, 2)
        groups = lambda conv: [{"params": [conv.weight], "lr_scale": 1.0, "clip": None, "weight_decay": 0.0}]
        first = optim.create_optimizer(groups(conv), Optim(weight_decay=0.0))
        conv.weight.grad = torch.randn(4, 3, 2, 2)
        first.step()
        conv = conv.to(memory_format=layout)
        second = optim.create_optimizer(groups(conv), Optim(weight_decay=0.0))
        second.load_state_dict(first.state_dict())
        optim.lay_out_as_parameters(second)
        conv.weight.grad = torch.randn(4, 3, 2, 2).to(memory_format=layout)
        second.step()
        results.append(conv.weight.detach().clone())
    assert torch.equal(*results)


def test_freeze_mixtures_leaves_the_attention_free():
    """Section 3.3: mixtures and the statistics of the standardization are frozen, the attention is fine-tuned."""
    model = create_model("resnet18", "an", 10)
    [said] = optim.freeze(model, ["mixtures"])
    assert "8 norms" in said
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    after = model.state_dict()
    layer = "layer1.0.bn1."
    assert model.layer1[0].bn1.weight.grad is None and model.layer1[0].bn1.bias.grad is None
    assert model.layer1[0].bn1.attention.fc.weight.grad.abs().sum() > 0
    assert torch.equal(before[layer + "base.running_mean"], after[layer + "base.running_mean"])
    assert not torch.equal(
        before[layer + "attention.norm.running_mean"], after[layer + "attention.norm.running_mean"]
    )
    assert not torch.equal(before["bn1.running_mean"], after["bn1.running_mean"])  # no AN there


def test_freezing_norms_of_others_says_what_it_leaves():
    [said] = optim.freeze(create_model("timm:resnet18", "timm:batchnorm2d", 10), ["norm"])
    assert said.endswith(
        "40 parameters, the statistics of 0 norms; those of 20 norms of other libraries go on being tracked"
    )
    [said] = optim.freeze(create_model("timm:resnet18", "timm:groupnorm", 10), ["norm"])
    assert said.endswith("the statistics of 0 norms")


def test_freeze_by_role_and_by_pattern():
    model = create_model("resnet18", "bn", 10)
    optim.freeze(model, ["layer1.*", "norm"])
    assert not any(
        p.requires_grad for name, p in model.named_parameters() if name.startswith("layer1.") or "bn" in name
    )
    assert model.layer2[0].conv1.weight.requires_grad and model.bn1.frozen and model.layer1[0].bn1.frozen
    names = [name for group in optim.parameter_groups(model, 0.0) for name in group["names"]]
    assert names and not any("bn" in name for name in names)
    with pytest.raises(ValueError, match=r"layer9\.\*"):
        optim.freeze(model, ["layer9.*"])


@pytest.mark.parametrize("arch", ["resnet18", "timm:resnet18"])
def test_freeze_statistics_alone(arch):
    """norm_eval of detection codes: statistics stay, affines learn; torch's norms as ours."""
    norm = None if arch.startswith("timm") else "bn"
    model = create_model(arch, norm, 10)
    [said] = optim.freeze(model, ["stats:layer1"])
    assert said == "frozen by stats:layer1: the statistics of 4 norms, their affines learn"
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.train()(torch.randn(2, 3, 64, 64)).square().sum().backward()
    moved = {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if "layer1." not in name}
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert optim.freeze(model, ["stats"]) == ["frozen by stats: the statistics of 20 norms, their affines learn"]
    with pytest.raises(ValueError, match="stats:layer9 holds nothing.*layer1"):
        optim.freeze(create_model("resnet18", "bn", 10), ["stats:layer9"])
