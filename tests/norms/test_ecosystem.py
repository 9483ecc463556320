"""What other programs do to norms works on these, or is refused in words: torch's, timm's and peft's utilities."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.swa_utils import update_bn

import anorm
from anorm.norms.base import RunningNorm

LAWS = [name for name in anorm.list_norms() if name != "module"]
OPTIONS = {"an": {"k": 3}, "an_gn": {"k": 3}, "afn_as_released": {"dropout": 0.0}}
TRACKING = ["bn", "an", "se", "sn", "ssn", "bin", "afn"]
C = 6


def make(name, act=None, **options):
    torch.manual_seed(0)
    layer = anorm.create_norm(name, C, act=act, **(OPTIONS.get(name, {}) | options))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def network(name, act=None):
    torch.manual_seed(0)
    norm = make(name, act)
    return nn.Sequential(nn.Conv2d(3, C, 3), norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(C, 4))


def images(n=8):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# ---- running statistics ----


@pytest.mark.parametrize("name", TRACKING)
@pytest.mark.parametrize("how", [update_bn, lambda batches, model: anorm.update_stats(model, batches)])
def test_statistics_are_taken_afresh(name, how):
    """After the average over two batches the running mean is that of the two batches' means, in every law."""
    model = network(name)
    norms = [m for m in model.modules() if isinstance(m, RunningNorm)]
    momenta = [m.momentum for m in norms]
    batches = images(16).split(8)
    for norm in norms:
        norm.running_mean.fill_(9.0)
    how(batches, model)
    with torch.no_grad():
        expected = sum(model[0](batch).mean((0, 2, 3)) for batch in batches) / 2
    of_x = [m for m in norms if m.channels == C]
    torch.testing.assert_close(of_x[0].running_mean, expected)
    assert all(m.num_batches_tracked == 2 and not m.running_mean.eq(9.0).any() for m in norms)
    assert [m.momentum for m in norms] == momenta


def test_update_stats_reaches_torchs_norms_leaves_the_rest_and_refuses_nothing_at_all():
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.Dropout(0.5), nn.BatchNorm2d(C))
    model[1].eval()
    batches = [images()[:4], (images()[4:], torch.zeros(4))]
    assert anorm.update_stats(model, iter(batches)) == 2
    assert model.training and not model[1].training and model[3].momentum == 0.1
    with torch.no_grad():
        x = [model[0](b if isinstance(b, torch.Tensor) else b[0]) for b in batches]
        means = [nn.functional.batch_norm(part, None, None, training=True).mean((0, 2, 3)) for part in x]
    torch.testing.assert_close(model[1].running_mean, sum(part.mean((0, 2, 3)) for part in x) / 2)
    # without dropout the second norm sees what the first standardized
    torch.testing.assert_close(model[3].running_mean, sum(means) / 2, atol=1e-6, rtol=0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="no batch"):
        anorm.update_stats(model, [])
    torch.testing.assert_close(model.state_dict(), before)


@pytest.mark.parametrize("name", TRACKING)
def test_frozen_statistics_stay_and_the_affine_learns(name):
    model = network(name).train()
    model(images())
    assert anorm.freeze_stats(model) >= 1
    before = {key: value.clone() for key, value in model.named_buffers()}
    model.train()
    y = model(images())
    torch.testing.assert_close(y, model.eval()(images()))
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model[1].named_parameters() if n == "weight")
    update_bn([images()], model)
    torch.testing.assert_close(dict(model.named_buffers()), before)
    with pytest.raises(ValueError, match="anorm.set_sync"):
        nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    anorm.freeze_stats(model, False)
    model.train()(images(4))
    assert any(not torch.equal(value, before[key]) for key, value in model.named_buffers())


def test_freeze_stats_holds_torchs_norms_whatever_train_says():
    model = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)).train()
    model(images())
    assert anorm.freeze_stats(model) == 1
    copied = copy.deepcopy(model)
    for held in (model, copied):
        before = held[1].running_mean.clone()
        y = held.train()(images(4))
        torch.testing.assert_close(y, held.eval()(images(4)))
        assert torch.equal(held[1].running_mean, before)
        anorm.update_stats(held, [images()])
        assert torch.equal(held[1].running_mean, before)
    anorm.freeze_stats(model, False)
    model.train()(images(4))
    assert not torch.equal(model[1].running_mean, before) and not model[1]._forward_pre_hooks


def test_set_sync_reaches_every_norm():
    model = nn.Sequential(make("an"), nn.BatchNorm2d(C), nn.Sequential(nn.BatchNorm2d(C)), make("gn"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert anorm.set_sync(model) == 4
    assert model[0].base.sync and model[0].attention.norm.sync
    assert isinstance(model[1], nn.SyncBatchNorm) and isinstance(model[2][0], nn.SyncBatchNorm)
    torch.testing.assert_close(dict(model.state_dict()), state)
    anorm.set_sync(model, False)
    assert not model[0].base.sync
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnetv2_50", num_classes=2)  # BatchNormAct2d
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    if layers:
        assert anorm.set_sync(model) == len(layers)

    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="Own, a batch norm with a forward of its own"):
        anorm.set_sync(nn.Sequential(Own(3)))


def converters():
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    return nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm, freeze_batch_norm_2d


@pytest.mark.parametrize("name", TRACKING)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_rebuilds_batch_norms_is_refused_where_it_would_change_the_function(name, which):
    with pytest.raises(ValueError, match=r"anorm.set_sync\(model\).*anorm.freeze_stats\(model\)"):
        converters()[which](network(name, "relu"))


@pytest.mark.parametrize("name", ["gn", "in", "ln", "ilm", "asrn", "an_gn"])
def test_laws_of_the_instance_have_nothing_to_convert(name):
    model = network(name)
    expected = model.eval()(images())
    for convert in converters():
        torch.testing.assert_close(convert(copy.deepcopy(model)).eval()(images()), expected)


def test_a_plain_batch_norm_is_rebuilt_as_torchs():
    model = network("bn")
    model.train()(images())
    expected = model.eval()(images())
    sync, timms, frozen = (convert(copy.deepcopy(model)) for convert in converters())
    assert isinstance(sync[1], nn.SyncBatchNorm) and isinstance(timms[1], nn.SyncBatchNorm)
    for other in (sync, timms, frozen):
        torch.testing.assert_close(other.eval()(images()), expected)


# ---- folding ----


@pytest.mark.parametrize("name", ["sn", "ssn", "bin", "afn", "afn_as_released"])
def test_what_is_no_batch_norm_is_not_folded(name):
    model = network(name).eval()
    with pytest.raises(ValueError, match="does not compute batch normalization"):
        fuse_conv_bn_eval(model[0], model[1])


def test_a_plain_batch_norm_is_folded_and_one_with_an_activation_refused():
    model = network("bn")
    model.train()(images())
    model.eval()
    torch.testing.assert_close(
        fuse_conv_bn_eval(model[0], model[1])(images()), model[:2](images()), atol=1e-5, rtol=1e-4
    )
    model[1].act = "relu"
    with pytest.raises(ValueError, match="holds the relu behind it"):
        fuse_conv_bn_eval(model[0], model[1])
    model[1].act, model[1].eval_stats = None, "batch"
    with pytest.raises(ValueError, match="each batch's own statistics"):
        fuse_conv_bn_eval(model[0], model[1])


# ---- initialisation ----


@pytest.mark.parametrize("name", LAWS)
def test_reset_parameters_makes_a_layer_of_uninitialised_memory_a_new_one(name):
    with torch.device("meta"):
        layer = nn.Sequential(anorm.create_norm(name, 64, **OPTIONS.get(name, {})))
    layer.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 77)
    torch.manual_seed(0)
    layer.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    fresh = nn.Sequential(anorm.create_norm(name, 64, **OPTIONS.get(name, {}))).state_dict()
    for key, value in layer.state_dict().items():
        assert value.isfinite().all(), key
        spread = fresh[key].double().std() if fresh[key].numel() > 1 else torch.tensor(0.0)
        if spread == 0:  # a constant
            torch.testing.assert_close(value, fresh[key], msg=key)
        else:  # random, of 32 numbers at least: the same spread to a factor of two
            assert spread / 2 < value.double().std() < spread * 2, key


def test_zero_decoders_are_reset_to_zero():
    layer = anorm.create_norm("afn", 64, form="residual", decoders="zero")
    layer.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    assert not layer.adapt.std_decoder.weight.any()


def test_the_words_of_torchs_norms():
    layer = make("bn", "relu")
    assert isinstance(layer, nn.BatchNorm2d) and layer.affine and layer.track_running_stats
    assert "eps=1e-05, momentum=0.1, affine=True, track_running_stats=True" in repr(layer)
    layer.train()(torch.randn(4, C, 3, 3))
    layer.reset_running_stats()
    assert layer.num_batches_tracked == 0 and layer.running_var.eq(1).all()


def test_tracking_switched_off_later_is_seen():
    """As torch's: training leaves the running statistics, evaluation uses them."""
    own, torchs = anorm.create_norm("bn", C), nn.BatchNorm2d(C)
    x = torch.randn(4, C, 5, 5) + 2
    for layer in (own, torchs):
        layer(x)
        layer.track_running_stats = False
        layer(2 * x)
    torch.testing.assert_close(own.state_dict(), torchs.state_dict())
    torch.testing.assert_close(own(x), torchs(x))
    torch.testing.assert_close(own.eval()(x), torchs.eval()(x))
    torch.func.replace_all_batch_norm_modules_(own), torch.func.replace_all_batch_norm_modules_(torchs)
    torch.testing.assert_close(own(x), torchs(x))


@pytest.mark.parametrize("name", [name for name in LAWS if name not in ("an", "an_gn", "se")])
def test_a_negative_epsilon_is_refused(name):
    with pytest.raises(ValueError, match="eps=-1e-05 must be a number of at least 0"):
        anorm.create_norm(name, C, eps=-1e-5)
    layer = make(name)
    if isinstance(layer, RunningNorm):
        with pytest.raises(ValueError, match="at least 0"):
            layer.eps = -1.0


def test_one_value_a_group_is_refused_where_torch_refuses_it():
    for shape, groups in (((1, C, 1, 1), C), ((2, C, 1, 1), C), ((1, C, 1, 1), 3), ((1, C, 1, 2), C)):
        x = torch.randn(shape)
        try:
            expected = nn.GroupNorm(groups, C)(x)
        except ValueError:
            with pytest.raises(ValueError, match="one value a group"):
                anorm.create_norm("gn", C, groups=groups)(x)
        else:
            # 1 / sqrt(eps) = 316 times the rounding of the mean
            torch.testing.assert_close(anorm.create_norm("gn", C, groups=groups)(x), expected, atol=1e-4, rtol=0)
    assert anorm.create_norm("in", C)(torch.randn(1, C, 1, 1)).eq(0).all()


def test_a_file_without_the_counter_leaves_it():
    own, torchs = anorm.create_norm("bn", C), nn.BatchNorm2d(C)
    state = {k: v + 1 for k, v in nn.BatchNorm2d(C).state_dict().items() if k != "num_batches_tracked"}
    for layer in (own, torchs):
        for _ in range(3):
            layer(torch.randn(4, C, 3, 3))
        layer.load_state_dict(state, strict=False)
    assert own.num_batches_tracked == torchs.num_batches_tracked == 3


# ---- children whose weights a law uses ----

LINEAR = {
    "an": ["attention.fc"],
    "se": ["fc1", "fc2"],
    "afn": ["adapt.encoder", "adapt.mean_decoder", "adapt.weight_decoder"],
    "asrn": ["adapt.encoder", "adapt.bias_decoder"],
    "ilm": ["encoder", "weight_decoder", "bias_decoder"],
}
CHILDREN = [(name, child) for name, children in LINEAR.items() for child in children]
NORMS = [("an", "base"), ("an", "attention.norm"), ("an", "attention"), ("se", "base"), ("an_gn", "base")]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name, child", CHILDREN + NORMS)
def test_hooks_of_children_run(name, child, training):
    layer, x = make(name, "relu").train(training), torch.randn(4, C, 5, 3)
    twin, called = copy.deepcopy(layer), []
    part = layer.get_submodule(child)
    handles = [
        part.register_forward_pre_hook(lambda module, args: called.append("before")),
        part.register_forward_hook(lambda module, args, output: called.append("after")),
    ]
    residual = torch.randn_like(x)
    torch.testing.assert_close(layer(x, residual), twin(x, residual), rtol=1e-5, atol=1e-5)
    assert called[:1] == ["before"] and called[-1] == "after"
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())  # tracked once
    for handle in handles:
        handle.remove()
    layer.load_state_dict(twin.state_dict())
    assert torch.equal(layer(x, residual), twin(x, residual))  # the fast way again, bit for bit
    part.register_forward_hook(lambda module, args, output: output * 0 + 2)
    assert not torch.allclose(layer(x), twin(x))


@pytest.mark.parametrize(
    "change", [parametrizations.weight_norm, lambda m: prune.random_unstructured(m, "weight", 0.5)]
)
@pytest.mark.parametrize("name, child", CHILDREN)
def test_parametrizations_and_pruning_of_children_count(name, child, change):
    """After their parameters changed, the layer computes what one with the resulting weights in a plain child does."""
    layer, x = make(name), torch.randn(4, C, 5, 3)
    part, state = layer.get_submodule(child), copy.deepcopy(layer.state_dict())
    change(part)
    with torch.no_grad():
        layer(x)
        for parameter in part.parameters():
            parameter.copy_(torch.randn_like(parameter).abs())
        changed = layer.eval()(x)
        part(torch.zeros(1, part.in_features))  # pruning renews the weight where its layer is called
        reference = make(name).eval()
        state |= {key: value for key, value in layer.state_dict().items() if "running" in key or "num_" in key}
        state[f"{child}.weight"] = part.weight
        if part.bias is not None:
            state[f"{child}.bias"] = part.bias
        reference.load_state_dict(state)
        torch.testing.assert_close(changed, reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LINEAR)
def test_lora_of_the_layers_inside_a_law(name):
    peft = pytest.importorskip("peft")
    model, x = network(name), images()
    expected = model.eval()(x)
    targets = [f"1.{child}" for child in LINEAR[name]]
    tuned = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=targets), model)
    torch.testing.assert_close(tuned.eval()(x), expected)  # B starts at zero
    adapters = {n: p for n, p in tuned.named_parameters() if "lora_" in n}
    assert len(adapters) == 2 * len(targets)
    y = tuned.train()(x)
    (y * torch.randn_like(y)).sum().backward()
    for n, p in adapters.items():
        assert p.grad is not None and ("lora_A" in n or p.grad.abs().sum() > 0), n
    with torch.no_grad():
        for p in adapters.values():
            p.normal_()
    assert not torch.allclose(tuned.eval()(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", LINEAR)
def test_dynamic_quantization_of_the_layers_inside_a_law(name):
    model, x = network(name).eval(), images()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    inner = [m for m in quantized[1].modules() if "quantized" in type(m).__module__]
    assert len(inner) >= len(LINEAR[name])
    # eight bits of weights and activations
    torch.testing.assert_close(quantized(x), model(x), rtol=0.1, atol=0.1)


def test_a_forward_of_the_instance_is_called():
    """What accelerate's hooks put in the place of a module's forward."""
    layer, x = make("an"), torch.randn(4, C, 5, 3)
    expected, forward = layer.eval()(x), layer.attention.fc.forward
    layer.attention.fc.forward = lambda a: 0 * forward(a)
    assert not torch.allclose(layer(x), expected)


def test_flops_of_the_attention_count_in_training():
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = make("an"), torch.randn(4, C, 5, 3)
    counts = []
    for training in (True, False):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer.train(training)(x)
        counts.append(counter.get_total_flops())
    k, n = layer.k, 4
    assert counts == [2 * n * C * k + 2 * 2 * n * k * C] * 2  # the FC; the mixtures of scale and shift


SHARDED = """
import copy, torch, anorm
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", init_method="file://STORE", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for name, parts in PARTS:
    torch.manual_seed(0)
    layer, x = anorm.create_norm(name, 16, act="relu"), torch.randn(4, 16, 5, 5)
    twin = copy.deepcopy(layer)
    for part in parts:
        fully_shard(layer.get_submodule(part), mesh=mesh)
    fully_shard(layer, mesh=mesh)
    y, dy = layer(x), torch.randn(4, 16, 5, 5)
    torch.testing.assert_close(y, twin(x), rtol=1e-5, atol=1e-5)
    y.backward(dy), twin(x).backward(dy)
    for own, other in zip(layer.parameters(), twin.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(own.grad.full_tensor(), other.grad, rtol=1e-4, atol=1e-4)
    print(name, "ok")
dist.destroy_process_group()
"""


def test_sharded_parts_of_a_law_are_gathered(tmp_path):
    parts = [
        ("an", ["attention.fc", "attention.norm", "base"]),
        ("an", ["attention"]),
        ("se", ["fc1", "fc2", "base"]),
        ("afn", ["adapt.encoder", "adapt.mean_decoder"]),
        ("ilm", ["encoder", "weight_decoder"]),
    ]
    code = SHARDED.replace("PARTS", repr(parts)).replace("STORE", str(tmp_path / "store"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.count("ok") == len(parts), done.stderr[-2000:]
