"""convert: which layers, what carries over, the same function at the start; on networks of others."""

import copy
import sys

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrize
from torchvision.ops import FrozenBatchNorm2d

import anorm
from anorm.archs.foreign import load
from anorm.archs.trace import find_sites, trace
from anorm.convert import convert, create
from anorm.norms.attentive import AttentiveNorm
from anorm.norms.base import Norm
from anorm.norms.batch import BatchNorm
from anorm.norms.group import GroupNorm

timm = pytest.importorskip("timm")

# float32 through dozens of layers: rounding of two orders of the same operations, amplified layer by layer
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def batchnorms(model):
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.BatchNorm2d) and not isinstance(m, Norm)
    }


def used(model, seed=0):
    """The model with statistics and affines as after some training: nothing equal to 0 or 1 by chance."""
    g = torch.Generator().manual_seed(seed)
    for layer in batchnorms(model).values():
        for tensor in (layer.running_mean, layer.bias):
            if tensor is not None:
                tensor.data.copy_(0.1 * torch.randn(tensor.shape, generator=g))
        for tensor in (layer.running_var, layer.weight):
            if tensor is not None:
                tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=g))
    return model


class Block(nn.Module):
    def __init__(self, c=8, kernel=5):
        super().__init__()
        self.reduce = nn.Conv2d(c, c // 2, 1)
        self.n1 = nn.BatchNorm2d(c // 2)
        self.spatial = nn.Conv2d(c // 2, c // 2, kernel, padding=kernel // 2, groups=c // 2)
        self.n2 = nn.BatchNorm2d(c // 2)
        self.expand = nn.Conv2d(c // 2, c, 1)
        self.n3 = nn.BatchNorm2d(c)

    def forward(self, x):
        y = torch.relu(self.n1(self.reduce(x)))
        y = torch.relu(self.n2(self.spatial(y)))
        return torch.relu(x + self.n3(self.expand(y)))


class Small(nn.Sequential):
    """Stem, two blocks at two resolutions, a classifier: 7 BatchNorm2d."""

    def __init__(self, in_channels=3):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 8, 3, 2, 1)
        self.stem_norm = nn.BatchNorm2d(8)
        self.one = Block()
        self.pool = nn.MaxPool2d(2)
        self.two = Block()
        self.end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def images(model, size=32, n=4):
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    return torch.randn(n, first.in_channels, size, size, generator=torch.Generator().manual_seed(1))


# --- where the norms stand ------------------------------------------------------------------------


def own_sites(arch):
    made = {}

    def norm(site):
        layer = BatchNorm(site.channels, act=site.act)
        made[layer] = site
        return layer

    model = anorm.create_model(arch, norm)
    return {name: made[m] for name, m in model.named_modules() if m in made}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("resnet18", "resnet18"),
        ("resnet50", "resnet50"),
        ("densenet121", "densenet121"),
        ("mobilenet_v2", "mobilenetv2"),
    ],
)
def test_the_published_place_is_found_in_foreign_networks(theirs, ours):
    """Read from the running network, the same places as the architectures here declare by hand."""
    declared = own_sites(ours)
    model = torchvision.models.get_model(theirs, weights=None)
    found = find_sites(model, batchnorms(model))
    assert found.keys() == declared.keys()
    assert {n for n, s in found.items() if s.focus} == {n for n, s in declared.items() if s.focus}
    assert {n: s.text for n, s in found.items()} == {n: s.text for n, s in declared.items()}
    assert {n for n, s in found.items() if s.last} == {n for n, s in declared.items() if s.last}
    for role in ("stem", "shortcut", "transition", "final"):
        assert {n for n, s in found.items() if s.role == role} == {
            n for n, s in declared.items() if s.role == role
        }
    if ours != "mobilenetv2":  # its seven stages are rows of a table, not resolutions
        assert {n: s.stage for n, s in found.items()} == {n: s.stage for n, s in declared.items()}


def test_the_last_spatial_convolution_counts_whatever_its_kernel():
    model = timm.create_model("efficientnet_b0")
    spatial = {n for n, s in find_sites(model, batchnorms(model)).items() if s.focus}
    kernels = {m.kernel_size for n, m in model.named_modules() if n.endswith("conv_dw")}
    assert kernels == {(3, 3), (5, 5)}
    assert spatial == {
        f"{n.removesuffix('conv_dw')}{'bn1' if n.startswith('blocks.0') else 'bn2'}"
        for n, m in model.named_modules()
        if n.endswith("conv_dw")
    }


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("res2net50_26w_4s", 16),
        ("mixnet_s", 16),
        ("cspdarknet53", 23),
        ("resnetv2_50d", 16),
        ("resnest14d", 4),
    ],
)
def test_one_focus_for_each_block(name, count):
    """Several kernels in a layer, split attention, preactivation, cross-stage blocks: one place a block."""
    model = timm.create_model(name)
    assert sum(site.focus for site in find_sites(model, batchnorms(model)).values()) == count


def test_tracing_leaves_the_model_as_it_was():
    model = used(Small())
    model.one.n2.eval()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    calls = trace(model)
    assert calls[-1].name == "" and calls[-1].shape == (2, 5)
    assert [m.training for m in model.modules()] == modes
    assert all(not m._forward_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


# --- the same function at the start ---------------------------------------------------------------

CASES = [
    ("bn", {}, "yes"),
    ("an", {}, "yes"),
    ("an", {"k": 1}, "yes"),
    ("an", {"activation": "sigmoid"}, "yes"),
    ("an", {"activation": "softmax"}, "yes"),
    ("an", {"activation": "relu"}, "yes"),
    ("an", {"attention": "a1", "input": "mean"}, "yes"),
    ("an", {"attention": "se"}, "yes"),
    ("an", {"separate": True}, "yes"),
    ("an", {"attention_norm": "gn"}, "yes"),
    ("an", {"base": "sn"}, "in evaluation"),
    ("se", {}, "yes"),
    ("se", {"bias": True, "reduction": 2}, "yes"),
    ("sn", {}, "in evaluation"),
    ("sn", {"variance": "biased"}, "yes"),
    ("gn", {}, "no"),
    ("ln", {}, "no"),
    ("in", {}, "no"),
    ("an_gn", {}, "no"),
    ("se", {"base": "gn"}, "no"),
    ("bin", {}, "yes"),
    ("ssn", {}, "no"),
    ("afn", {}, "no"),
    ("afn", {"form": "residual", "decoders": "zero"}, "yes"),
    ("asrn", {}, "no"),
    ("ilm", {}, "no"),
    ("module", {"target": "torch.nn.BatchNorm2d"}, "yes"),
]


@pytest.mark.parametrize("law", [law for law in anorm.list_norms() if law != "module"])
def test_what_a_report_claims_holds(law):
    """Every law that exists, with its defaults: the claim is compared with the network itself."""
    check_claims(law, {})


@pytest.mark.parametrize(("law", "options", "claim"), CASES)
def test_claims(law, options, claim):
    assert check_claims(law, options) == claim


def check_claims(law, options):
    torch.manual_seed(0)
    old = used(Small()).double()
    old.one.n2.eps, old.one.n2.momentum = 1e-3, 0.01
    new = copy.deepcopy(old)
    report = convert(new, law, where="all", **options)
    claims = {row.same for row in report.swapped}
    assert len(report.swapped) == 7 and len(claims) == 1, report
    assert report.identical == (claims == {"yes"})
    x = images(old).double()
    for training in (False, True):
        same = torch.allclose(new.train(training)(x), old.train(training)(x), rtol=1e-6, atol=1e-7)
        claimed = claims == {"yes"} or (claims == {"in evaluation"} and not training)
        assert same == claimed, f"{law}: training={training}"
    return claims.pop()


def test_an_at_the_start_is_what_the_equations_say():
    """gamma_k = 2 gamma / K, beta_k = 2 beta / K, attention norm weight 0."""
    model = used(Small())
    old = copy.deepcopy(model.one.n2)
    convert(model, "an", k=5)
    new = model.one.n2
    assert isinstance(new, AttentiveNorm) and new.k == 5
    torch.testing.assert_close(new.weight, (2 * old.weight / 5).expand(5, -1))
    torch.testing.assert_close(new.bias, (2 * old.bias / 5).expand(5, -1))
    assert not new.attention.norm.weight.any()
    assert torch.equal(new.base.running_var, old.running_var)


def test_components_do_not_stay_equal():
    """A mixture of K equal components that never part would be one component."""
    for options in ({}, {"attention": "a1"}, {"attention": "se"}):
        torch.manual_seed(0)
        model = used(Small())
        convert(model, "an", k=4, **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(images(model)) * torch.randn(4, 5)).sum().backward()
            optimizer.step()
        spread = model.one.n2.weight.std(0)
        assert (spread > 1e-6).any(), options


def test_keep_false_takes_the_laws_own_start():
    model = used(Small())
    report = convert(model, "bn", where="all", keep=False)
    assert torch.equal(model.one.n2.weight, torch.ones(4)) and not report.identical
    assert torch.equal(model.one.n2.running_mean, torch.zeros(4))


def test_explicit_options_win_over_what_is_carried():
    model = used(Small())
    convert(model, "bn", where="all", eps=1e-2)
    assert model.one.n2.eps == 1e-2
    model = used(Small())
    convert(model, "an", base={"name": "bn", "momentum": 0.5})
    assert model.one.n2.base.momentum == 0.5


# --- networks of others ---------------------------------------------------------------------------

NETWORKS = [
    "timm:resnet50d",
    "timm:efficientnet_b0",
    "timm:mobilenetv3_small_050",
    "timm:regnety_002",
    "timm:densenet121",
    "timm:resnet18",
    "torchvision:resnet18",
    "torchvision:vgg11_bn",
    "torchvision:mnasnet0_5",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:googlenet",
    "torchvision:mobilenet_v3_small",
    "torchvision:regnet_y_400mf",
]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_networks_of_others(name, layout):
    torch.manual_seed(0)
    library, _, arch = name.partition(":")
    if library == "timm":
        model = timm.create_model(arch, num_classes=5)
    else:
        model = torchvision.models.get_model(arch, num_classes=5, **QUICK.get(arch, {}))
    model = used(model).to(memory_format=layout)
    x = torch.randn(2, 3, 64, 64).to(memory_format=layout)
    with torch.no_grad():
        expected = model.eval()(x)
    activations = [type(m.act) for m in model.modules() if type(m).__name__ == "BatchNormAct2d"]
    report = convert(model)
    assert report.identical and report.swapped
    assert len(report.swapped) + len(report.kept) == len(batchnorms(model)) + len(report.swapped)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, **CLOSE)
    if activations:  # fused into the norm or kept beside it
        kept = sum(type(m).__name__ == "BatchNormAct2d" for m in model.modules())
        assert kept + len(report.swapped) == len(activations)
    converted = {n: m for n, m in model.named_modules() if isinstance(m, AttentiveNorm)}
    assert len(converted) == len(report.swapped)

    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    out = model.train()(x)
    logits = out if isinstance(out, torch.Tensor) else out.logits
    (logits * torch.randn(logits.shape)).sum().backward()
    for layer in converted.values():
        assert layer.weight.grad.abs().sum() > 0 and layer.attention.norm.weight.grad.isfinite().all()
    optimizer.step()
    out = model(x)
    assert (out if isinstance(out, torch.Tensor) else out.logits).isfinite().all()


QUICK = {  # no slow truncated-normal initialisation, no auxiliary heads that need larger images
    "vgg11_bn": {"init_weights": False},
    "googlenet": {"init_weights": False, "aux_logits": False},
}


def test_timms_activation_and_drop_stay():
    layers = pytest.importorskip("timm.layers")
    model = Small()
    model.one.n2 = layers.BatchNormAct2d(4, act_layer=nn.SiLU, drop_layer=nn.Dropout2d)
    model.two.n2 = layers.BatchNormAct2d(4, act_layer=nn.ReLU)
    act, drop = model.one.n2.act, model.one.n2.drop
    x = images(model)
    expected = model.eval()(x)
    convert(model)
    assert model.one.n2.act is act and model.one.n2.drop is drop
    assert isinstance(model.two.n2, AttentiveNorm) and model.two.n2.act == "relu"
    torch.testing.assert_close(model(x), expected, **CLOSE)


@pytest.mark.parametrize(
    "name", ["groupnorm", "batchnorm2d", "frn", "layernorm2d", "evonorms0", "simplenorm2d"]
)
def test_timms_norms_as_they_are(name):
    model = timm.create_model("efficientnet_b0", num_classes=5)
    options = {"num_groups": 4} if name == "groupnorm" else {"group_size": 8} if name == "evonorms0" else {}
    report = convert(model, f"timm:{name}", where=r"blocks\.0\.0\.bn1$", **options)
    assert [row.now for row in report.swapped] == [f"timm:{name}"]
    assert report.identical == (name == "batchnorm2d")
    assert type(model.blocks[0][0].bn1).__module__.startswith(("timm", "torch.nn.modules.container"))
    model(torch.randn(2, 3, 64, 64)).sum().backward()


def test_timms_norms_refuse_what_they_cannot_be():
    with pytest.raises(ValueError, match="norm and an activation in one"):
        convert(Small(), "timm:evonorms0", where="all")
    with pytest.raises(ValueError, match="no norm layer 'gruopnorm'"):
        convert(Small(), "timm:gruopnorm", where="all")


# --- which layers ---------------------------------------------------------------------------------


def test_where():
    def names(where, norm="an"):
        return {row.name for row in convert(Small(), norm, where=where).swapped}

    assert names("published") == {"one.n2", "two.n2"}
    assert names("published", "se") == {"one.n3", "two.n3"}
    assert len(names("published", "gn")) == len(names("all")) == 7
    assert names("expand") == names(3) == names("last") == {"one.n3", "two.n3"}
    assert names(["stem", 1]) == {"stem_norm", "one.n1", "two.n1"}
    assert names({"at": "block", "stages": [2]}) == {"two.n1", "two.n2", "two.n3"}
    assert names(r"^two\.") == {"two.n1", "two.n2", "two.n3"}
    assert names(lambda name, layer: layer.num_features == 8) == {"stem_norm", "one.n3", "two.n3"}


def test_k_for_each_stage():
    model = Small()
    report = convert(model, "an", k=[3, 4])
    assert report.stages == 2 and (model.one.n2.k, model.two.n2.k) == (3, 4)
    with pytest.raises(ValueError, match="3 numbers for the 2 stages"):
        convert(Small(), "an", k=[1, 2, 3])
    model = torchvision.models.resnet18()
    convert(model)
    assert [model.get_submodule(f"layer{s}.0.bn1").k for s in (1, 2, 3, 4)] == [10, 10, 20, 20]


def test_norm_as_a_dict_and_as_a_callable():
    model = Small()
    convert(model, {"name": "an", "place": "last", "k": 2, "elsewhere": "gn"})
    assert (
        model.one.n3.k == 2 and isinstance(model.one.n2, GroupNorm) and isinstance(model.stem_norm, GroupNorm)
    )
    model = Small()
    report = convert(model, lambda site: anorm.create_norm("in", site.channels), where="spatial")
    assert len(report.swapped) == 2


def test_a_converted_network_can_be_converted_further():
    model = used(Small())
    x = images(model)
    expected = model.eval()(x)
    convert(model, "an")
    report = convert(model, "bin", where="all")
    assert len(report.swapped) == 5 and {row.why for row in report.kept} == {"not a BatchNorm2d"}
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_a_layer_registered_twice_stays_one():
    model = Small()
    model.two.n2 = model.one.n2
    convert(model)
    assert model.two.n2 is model.one.n2 and isinstance(model.one.n2, AttentiveNorm)


def test_modes_dtype_and_statistics_flags():
    model = used(Small()).double()
    model.one.n2.eval()
    model.two.n2 = nn.BatchNorm2d(4, track_running_stats=False, affine=False).double()
    old = copy.deepcopy(model)
    report = convert(model, "bn", where="all")
    assert report.identical
    assert not model.one.n2.training and model.one.n1.training
    assert model.one.n2.weight.dtype == torch.float64
    assert model.two.n2.weight is None and model.two.n2.eval_stats == "batch"
    x = images(model).double()
    torch.testing.assert_close(model.eval()(x), old.eval()(x))


def test_synchronised_layers_stay_synchronised():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(used(Small()))
    report = convert(model)
    assert report.identical and model.one.n2.base.sync and model.one.n2.attention.norm.sync


@pytest.mark.parametrize("inside", [True, False])
def test_a_network_of_accelerates_empty_weights(inside):
    """Parameters on the meta device, buffers real: statistics carry over, and the start is not known, not denied."""
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        model = Small()
        model.one.n2.running_var.fill_(3.0)
        if inside:
            report = convert(model, "an")
    if not inside:
        report = convert(model, "an")
    assert {row.name for row in report.swapped} == {"one.n2", "two.n2"}
    assert {row.same for row in report.swapped} == {"not known"}
    assert "(not known whether the same function at the start)" in report.summary()
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    assert model.one.n2.base.running_var.eq(3.0).all()
    assert sorted(model.state_dict()) == sorted(twin_of_small().state_dict())


def twin_of_small():
    model = Small()
    convert(model, "an")
    return model


@pytest.mark.parametrize("law", ["bn", "gn", "sn", "bin"])
def test_a_norm_without_bias_gains_none(law):
    model = Small()
    model.one.n2 = nn.BatchNorm2d(4, bias=False)
    report = convert(model, law, where="all")
    assert model.one.n2.bias is None and model.one.n1.bias is not None
    row = next(row for row in report.rows if row.name == "one.n2")
    assert row.same == {"bn": "yes", "bin": "yes", "sn": "in evaluation", "gn": "no"}[law]
    model.train()(images(model)).square().sum().backward()
    assert model.one.n2.weight.grad is not None


# --- tools of others on converted networks ---


@pytest.mark.filterwarnings("ignore:NOTE")  # torchvision's word on train and eval graphs
@pytest.mark.parametrize("name", [*anorm.list_archs(), *(f"torchvision:{n}" for n in ("resnet18", "googlenet"))])
def test_features_are_extracted_by_torchvision(name):
    """torch.fx sees each norm as one module of every architecture and converted network."""
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    with torch.device("meta"):
        model = anorm.create_model(name, "an", num_classes=5).eval()
        nodes = set(get_graph_node_names(model)[1])
        norms = [n for n, m in model.named_modules() if isinstance(m, Norm) and n in nodes]
        inside = [n for n, m in model.named_modules() if isinstance(m, Norm) and not m.part]
        assert norms == inside
        x = torch.randn(2, 3, 32, 32)
        found = create_feature_extractor(model, {norms[0]: "first", norms[-1]: "last"})(x)
        for name, key in ((norms[0], "first"), (norms[-1], "last")):
            assert found[key].shape[:2] == (2, model.get_submodule(name).channels)


@pytest.mark.filterwarnings("ignore:NOTE")
def test_features_are_extracted_by_timm_and_are_the_networks():
    from timm.models import GraphExtractNet

    model = timm.create_model("resnet18", num_classes=5)
    convert(model, "an")
    maps = {}
    model.layer2[0].bn1.register_forward_hook(lambda module, args, out: maps.update(out=out.clone()))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        model.eval()(x)
        model.layer2[0].bn1._forward_hooks.clear()
        (found,) = GraphExtractNet(model, {"layer2.0.bn1": "1"}, squeeze_out=False)(x)
    torch.testing.assert_close(found, maps["out"])


REPARAMETERIZED = ["repvgg_a0", "mobileone_s0", "fastvit_t8", "ghostnetv3_050", "repghostnet_050"]


@pytest.mark.parametrize("name", REPARAMETERIZED)
def test_timms_reparameterization_is_the_same_function_with_bn_and_refused_with_others(name):
    from timm.utils import reparameterize_model

    model = used(timm.create_model(name, num_classes=5))
    x = torch.randn(2, 3, 64, 64)
    switchable = copy.deepcopy(model)
    convert(switchable, "sn", where="all")
    with pytest.raises(ValueError, match="SwitchableNorm.* does not compute batch normalization"):
        reparameterize_model(switchable.eval())
    with torch.no_grad():
        expected = model.eval()(x)
        convert(model, "bn", where="all")
        folded = reparameterize_model(model)
        torch.testing.assert_close(folded(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    count = lambda network: sum(isinstance(m, Norm) for m in network.modules())
    assert count(folded) < count(model)


# --- what is left alone ---------------------------------------------------------------------------


class Odd(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


class Renamed(nn.BatchNorm2d):
    """A subclass that computes what BatchNorm2d computes."""


def test_layers_that_cannot_be_replaced_are_left_alone_and_named():
    model = Small()
    model.stem_norm = FrozenBatchNorm2d(8)
    model.one.n1.requires_grad_(False)
    model.one.n2.register_forward_hook(lambda *args: None)
    model.one.n3 = Odd(8)
    model.two.n1 = Renamed(4)
    parametrize.register_parametrization(model.two.n3, "weight", nn.Softplus())
    left = {
        "stem_norm": "frozen",
        "one.n1": "frozen",
        "one.n2": "hooks",
        "one.n3": "forward of its own",
        "two.n3": "parametrizations",
    }
    before = {name: model.get_submodule(name) for name in left}
    report = convert(model, where="all")
    assert {row.name for row in report.swapped} == {"two.n1", "two.n2"}
    why = {row.name: row.why for row in report.kept}
    for name, word in left.items():
        assert model.get_submodule(name) is before[name] and word in why[name]
    text = str(report)
    assert "affine does not require gradients" in text and "an x2" in text and "two.n2" in text


def test_nothing_to_replace_is_an_error_and_changes_nothing():
    model = timm.create_model("convnext_atto")
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"no BatchNorm2d \(LayerNorm"):
        convert(model)
    assert dict(model.named_modules()) == before
    frozen = Small()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="7 frozen.*unfreeze"):
        convert(frozen)
    with pytest.raises(ValueError, match="where='colour' names none of them .roles: .*try where='all'"):
        convert(Small(), where="colour")
    with pytest.raises(ValueError, match="no norm at all"):
        convert(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(ValueError, match="itself the layer"):
        convert(nn.BatchNorm2d(3))


def test_wrong_options_change_nothing():
    for options, message in (
        ({"norm": "anx"}, "unknown norm"),
        ({"kk": 3}, "no option 'kk'"),
        ({"norm": "gn", "where": "all", "groups": 3}, "cannot be divided"),
        ({"where": "("}, "nor a pattern"),
        ({"norm": nn.Identity, "k": 3}, "takes its options itself"),
    ):
        model = Small()
        with pytest.raises(ValueError, match=message):
            convert(model, **options)
        assert not any(isinstance(m, Norm) for m in model.modules())


class TakesAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Small()

    def forward(self, pictures, scale):
        return self.net(torch.stack(pictures)) * scale


def test_a_model_that_does_not_take_images_asks_for_an_example():
    with pytest.raises(ValueError, match="example=images"):
        convert(TakesAList())
    model = TakesAList()
    report = convert(model, example=([torch.randn(3, 32, 32)] * 2, 2.0))
    assert {row.name for row in report.swapped} == {"net.one.n2", "net.two.n2"}


# --- arch=timm:NAME, arch=torchvision:NAME --------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "channels", "strides"),
    [
        ("timm:resnet18", [64, 64, 128, 256, 512], [2, 4, 8, 16, 32]),
        ("timm:efficientnet_b0", [16, 24, 40, 112, 320], [2, 4, 8, 16, 32]),
        ("torchvision:resnet18", [64, 64, 128, 256, 512], [2, 4, 8, 16, 32]),
        ("torchvision:regnet_y_400mf", [32, 48, 104, 208, 440], [2, 4, 8, 16, 32]),
        ("torchvision:densenet121", [64, 256, 512, 1024, 1024], [2, 4, 8, 16, 32]),
        ("torchvision:googlenet", [64, 192, 480, 832, 1024], [2, 4, 8, 16, 32]),
        ("torchvision:mobilenet_v2", [16, 24, 32, 96, 1280], [2, 4, 8, 16, 32]),
    ],
)
def test_create(arch, channels, strides):
    model = create(arch, {"name": "an", "k": 2}, num_classes=7)
    assert "an x" in model.norm_summary and not batchnorms(model)
    assert [info.channels for info in model.feature_info.values()] == channels
    assert [info.stride for info in model.feature_info.values()] == strides
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, 7)
    maps = model.forward_stages(x)
    assert list(maps) == list(model.feature_info)
    for name, info in model.feature_info.items():
        assert maps[name].shape == (2, info.channels, 64 // info.stride, 64 // info.stride)
    assert all(not m._forward_hooks for m in model.modules())


def test_create_without_a_norm_and_with_other_images():
    model = create("timm:convnext_atto", None, num_classes=3, in_channels=1)
    assert model.eval()(torch.randn(1, 1, 64, 64)).shape == (1, 3)
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        create("timm:convnext_atto", "an")


def test_create_says_what_is_wrong():
    for arch, message in (
        ("keras:resnet50", "none of timm, torchvision"),
        ("timm:resnet50dd", "no model 'resnet50dd': did you mean .*resnet50d"),
        ("torchvision:resnet51", "did you mean resnet50"),
    ):
        with pytest.raises(ValueError, match=message):
            load(arch)
    with pytest.raises(ValueError, match="3 channels, not 4"):
        load("torchvision:resnet18", in_channels=4)


def test_missing_and_mismatched_libraries_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # what Python itself does for a blocked import
    with pytest.raises(ImportError, match="pip install timm"):
        load("timm:resnet18")
    monkeypatch.delitem(sys.modules, "torchvision")

    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(ImportError, match="does not fit torch .*pip install --force-reinstall"):
        load("torchvision:resnet18")
