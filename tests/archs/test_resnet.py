"""ResNet: torchvision's function with BN, the papers' parameter counts to the digit, placements."""

import pytest
import torch
import torchvision

import anorm
from anorm.norms.base import Site
from anorm.registry import has_basic_blocks

DEEP = {"stem": "deep", "shortcut": "avgpool"}

# true counts; the papers' printed ones and why some differ: tools/audit.py
COUNTS = [
    ("resnet34", "bn", {}, 21_797_672),
    ("resnet34", {"name": "an", "place": 1}, {}, 21_996_060),
    ("resnet34", "an", {}, 21_996_060),
    ("resnet34", {"name": "an", "place": [1, 2]}, {}, 22_194_448),
    ("resnet50", "bn", {}, 25_557_032),
    ("resnet50", "an", {}, 25_755_420),
    ("resnet50", {"name": "an", "place": 3}, {}, 26_349_084),
    ("resnet50", {"name": "an", "place": "block"}, {}, 26_745_860),
    ("resnet50", {"name": "an", "place": "all"}, {}, 26_947_472),
    ("resnet50", {"name": "an", "attention": "a1"}, {}, 25_755_170),
    ("resnet50", {"name": "an", "input": "mean"}, {}, 25_755_420),
    ("resnet50", {"name": "an", "input": "mean_std"}, {}, 25_823_900),
    ("resnet50", {"name": "an", "k": [5, 5, 10, 10]}, {}, 25_652_450),
    ("resnet50", {"name": "an", "k": [20, 20, 40, 40]}, {}, 25_961_360),
    ("resnet50", {"name": "se", "place": 2}, {}, 26_185_768),
    ("resnet50", "se", {}, 28_071_976),
    ("resnet50", {"name": "se", "place": "block"}, {}, 29_329_448),
    ("resnet50", "bn", DEEP, 25_576_264),
    ("resnet50", "an", DEEP, 25_774_652),
    ("resnet101", "bn", {}, 44_549_160),
    ("resnet101", "an", {}, 45_000_644),
    ("resnet101", "bn", DEEP, 44_568_392),
    ("resnet101", "an", DEEP, 45_019_876),
]


@pytest.mark.parametrize("arch, norm, options, count", COUNTS)
def test_parameter_counts(arch, norm, options, count):
    with torch.device("meta"):
        model = anorm.create_model(arch, norm, **options)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
@pytest.mark.parametrize("training", [True, False])
def test_equals_torchvision(arch, training):
    """The same state_dict, in the same order, gives the same logits and gradients."""
    torch.manual_seed(0)
    theirs = torchvision.models.get_model(arch, num_classes=7).double()
    ours = anorm.create_model(arch, "bn", num_classes=7).double()
    for buffer in theirs.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x, dy = torch.randn(4, 3, 64, 64, dtype=torch.double), torch.randn(4, 7, dtype=torch.double)
    results = []
    for model in (ours, theirs):
        model.train(training)
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.backward(dy)
        results.append((y, leaf.grad, model.conv1.weight.grad))
    for own, expected in zip(*results, strict=True):
        # float64 through 50 layers: sums in another order, relative to the largest value
        assert (own - expected).abs().max() <= 1e-9 * expected.abs().max()
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


def test_published_placement_of_attentive_norm():
    """AN behind each bottleneck's 3x3 with K 10, 10, 20, 20; BN elsewhere (section 3.3 and "Where to apply AN")."""
    with torch.device("meta"):
        model = anorm.create_model("resnet50", "an")
    an = {name: m.k for name, m in model.named_modules() if type(m).__name__ == "AttentiveNorm"}
    assert an == {
        f"layer{s + 1}.{i}.bn2": (10, 10, 20, 20)[s]
        for s, depth in enumerate((3, 4, 6, 3))
        for i in range(depth)
    }
    assert model.norm_summary == "bn x37, an x16"


@pytest.mark.parametrize("arch", ["resnet34", "resnet20"])
def test_an_stands_at_the_first_norm_of_a_basic_block_and_by_the_text_at_the_last(arch):
    """The published ResNet-34 (75.5 / 92.6) has it at norm1; section 4 of the paper says the last 3x3."""
    for place, wanted in (("published", "bn1"), ("focus", "bn1"), ("text", "bn2")):
        with torch.device("meta"):
            model = anorm.create_model(arch, {"name": "an", "place": place})
        found = {name for name, m in model.named_modules() if type(m).__name__ == "AttentiveNorm"}
        blocks = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".bn2")}
        assert found == {f"{block}.{wanted}" for block in blocks}


def test_the_text_is_another_place_in_basic_blocks_alone():
    for arch in anorm.list_archs():
        sites = []
        with torch.device("meta"):
            anorm.create_model(arch, lambda site, to=sites: to.append(site) or torch.nn.Identity())
        assert has_basic_blocks(arch) == any(site.text is not None for site in sites), arch
    assert has_basic_blocks("timm:resnet18") and not has_basic_blocks("timm:resnet50")


def test_placement_words():
    sites = []

    def record(site):
        sites.append(site)
        return torch.nn.Identity()

    # a callable from Site to any module is a norm too; nothing is run, so Identity will do
    anorm.create_model("resnet50", record)
    assert len(sites) == 53 and all(isinstance(site, Site) for site in sites)

    def built(place):
        with torch.device("meta"):
            return anorm.create_model("resnet50", {"name": "an", "place": place}).norm_summary

    assert built("all") == "an x53"
    assert built("spatial") == built(2) == built("focus") == built(["spatial"]) == "bn x37, an x16"
    assert built("stem") == "bn x52, an x1"
    assert built("shortcut") == "bn x49, an x4"
    assert built({"at": "focus", "stages": [3, 4]}) == "bn x44, an x9"


@pytest.mark.parametrize(
    "norm, words",
    [
        ({"name": "an", "k": [10, 10, 20]}, "k has 3 numbers for the 4 stages"),
        ({"name": "an", "place": "everywhere"}, "place='everywhere' is none of"),
        ({"name": "an", "place": {"at": "all", "stages": [5]}}, "stages 1 to 4"),
        ({"name": "gn", "groups": 48}, "64 channels cannot be divided into groups=48"),
        ({"name": "an", "K": 3}, "no option 'K'"),
    ],
)
def test_wrong_placements_say_what_is_right(norm, words):
    with pytest.raises(ValueError, match=words), torch.device("meta"):
        anorm.create_model("resnet50", norm)


def test_wrong_arguments_say_what_is_right():
    with pytest.raises(ValueError, match="did you mean resnet50"):
        anorm.create_model("resent50")
    with pytest.raises(ValueError, match="has no option 'stems': did you mean stem"):
        anorm.create_model("resnet50", stems="deep")
    with pytest.raises(ValueError, match="7x7, deep, cifar"):
        anorm.create_model("resnet50", stem="8x8")
    with pytest.raises(ValueError, match="num_classes=0 must be a positive number"):
        anorm.create_model("resnet50", num_classes=0)


@pytest.mark.parametrize("norm", ["bn", "an", {"name": "an", "place": 3}])
def test_zero_init_starts_every_block_as_its_shortcut(norm):
    model = anorm.create_model("resnet50", norm, num_classes=3, zero_init=True).eval()
    block = model.layer1[1]
    x = torch.rand(2, 256, 8, 8)
    torch.testing.assert_close(block(x), x)


@pytest.mark.parametrize("options", [{}, DEEP, {"stem": "cifar"}])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_feature_maps_are_what_feature_info_says(arch, options):
    model = anorm.create_model(arch, "an", num_classes=5, **options).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        maps = model.forward_stages(x)
        assert model(x).shape == (2, 5)
    assert {name: (m.shape[1], 64 // m.shape[2]) for name, m in maps.items()} == model.feature_info


def test_he_initialisation():
    torch.manual_seed(0)
    model = anorm.create_model("resnet50", "an")
    weight = model.layer3[0].conv2.weight  # 256 x 256 x 3 x 3: the standard deviation's own error is 0.1 %
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=5e-3)
    assert model.bn1.weight.eq(1).all() and model.bn1.bias.eq(0).all()
