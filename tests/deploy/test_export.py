"""Folding and tools/export.py: the same function before and after, in torch and in onnxruntime."""

import json

import pytest
import torch
from commands import script
from torch import nn

import anorm
from anorm.deploy import export, folding
from anorm.norms.base import Norm


def lived_in(model, size=32):
    """A network whose running statistics are those of some images, and not 0 and 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for _ in range(3):
            model.train()(2 * torch.randn(8, 3, size, size) + 0.5)
    return model.eval()


def largest_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# norms that end in a convolution, that leave it their centre, that stay
COUNTS = {
    ("resnet20", "bn"): (19, 0, 0),
    ("resnet20", "an"): (10, 9, 0),
    ("resnet20", "se"): (10, 9, 0),
    ("resnet20", "gn"): (0, 0, 19),
    ("resnet20", "sn"): (0, 0, 19),
    ("resnet20", "an_gn"): (0, 0, 19),
    ("wrn_16_4", "an"): (1, 6, 6),  # pre-activation: the norm before a convolution stays
    ("mobilenetv2", "an"): (35, 17, 0),
}


@pytest.mark.parametrize("arch, norm", COUNTS)
@torch.no_grad()
def test_the_folded_network_computes_the_same(arch, norm):
    model = lived_in(anorm.create_model(arch, norm, num_classes=10), 64)
    folded, report = folding.fold(model)
    assert (len(report.folded), len(report.centred), len(report.kept)) == COUNTS[arch, norm]
    images = torch.randn(3, 3, 48, 64)
    # float32 rounds products and sums in another order: about 1e-6 of the largest logit in a deep network
    assert largest_difference(folded(images), model(images)) < 2e-5


@torch.no_grad()
def test_the_network_itself_is_left_alone():
    model = lived_in(anorm.create_model("resnet20", "an", num_classes=10))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folding.fold(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.conv1.bias is None and all(p.requires_grad for p in model.parameters())


class Branching(nn.Module):
    """A convolution with a bias that feeds a norm and something else, and one that runs twice."""

    def __init__(self):
        super().__init__()
        self.shared, self.twice = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(anorm.create_norm("bn", 4, act="relu") for _ in range(4))
        self.own = nn.Conv2d(4, 4, 3, bias=True)

    def forward(self, x):
        x = self.shared(x)
        x = x + self.norms[0](x)
        x = self.norms[2](self.twice(self.norms[1](self.twice(x))), x)
        return self.norms[3](self.own(x)).mean((2, 3))


@torch.no_grad()
def test_a_convolution_with_other_users_is_left_alone():
    model = lived_in(Branching())
    folded, report = folding.fold(model)
    assert report.folded == ["norms.3"] and sorted(report.kept) == ["norms.0", "norms.1", "norms.2"]
    images = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(folded(images), model(images))


@torch.no_grad()
def test_a_channel_far_from_zero_keeps_its_variance():
    """The convolution takes the centre off before the moments are formed: a large mean costs no digits."""
    norm = anorm.create_norm("an", 4, act="relu", k=3)
    norm.base.running_mean.fill_(1e3)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm).eval()
    model[0].bias.add_(1e3)
    images = torch.randn(2, 3, 16, 16)
    expected = model.double()(images.double())
    folded, report = folding.fold(model.float())
    assert report.centred == ["1"]
    # 1e3 in float32 carries 6e-5 of absolute error
    assert largest_difference(folded(images).double(), expected) < 1e-4


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = lived_in(anorm.create_model("resnet20", "an", num_classes=10))
    folder = tmp_path_factory.mktemp("exported")
    return model, folder, export.export(model, folder, 32)


def test_what_is_written(exported):
    _, folder, report = exported
    assert json.loads((folder / "export.json").read_text()) == report
    assert sorted(p.name for p in folder.iterdir()) == ["export.json", *sorted(report["files"])]
    assert report["norms"] == {"folded": 10, "centred": 9, "kept": []}
    assert (
        set(report["latency_ms"]) == {"torch", "onnxruntime"} and report["latency_ms"]["torch"]["median"] > 0
    )


@torch.no_grad()
def test_onnx_takes_any_batch_and_size(exported):
    model, folder, report = exported
    run = export.open_session(folder / "model.onnx", 1)
    smallest = report["smallest_size"]
    assert smallest == 5  # stride 4: a map of 2x2 remains
    for shape in ((1, 3, 32, 32), (7, 3, 24, 40), (1, 3, smallest, smallest), (2, 3, 100, smallest)):
        images = torch.randn(shape)
        assert largest_difference(run(images), model(images)) < 2e-5, shape


def test_onnx_says_its_axes(exported):
    import onnx

    graph = onnx.load(exported[1] / "model.onnx").graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [
        "batch",
        3,
        "height",
        "width",
    ]
    assert [graph.input[0].name, graph.output[0].name] == ["images", "logits"]
    assert {node.domain for node in graph.node} == {""}, "standard operators only"
    assert sum(node.op_type == "BatchNormalization" for node in graph.node) == 0


@torch.no_grad()
def test_the_exported_program_runs_elsewhere(exported):
    model, folder, _ = exported
    images = torch.randn(3, 3, 28, 36)
    assert largest_difference(torch.export.load(folder / "model.pt2").module()(images), model(images)) < 2e-5


def test_safetensors_hold_the_trained_weights(exported):
    model, folder, _ = exported
    twin = anorm.create_model("resnet20", "an", num_classes=10)
    anorm.load_weights(twin, folder / "model.safetensors")
    assert all(
        torch.equal(a, b)
        for a, b in zip(twin.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_a_network_of_one_size_keeps_it(tmp_path):
    model = lived_in(anorm.create_model("convnet", "an", num_classes=10))
    report = export.export(model, tmp_path, 32, formats=("onnx",))
    assert report["smallest_size"] is None and report["files"] == ["model.onnx"]
    run, images = export.open_session(tmp_path / "model.onnx", 1), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert largest_difference(run(images), model(images)) < 2e-5


def test_nothing_is_written_when_the_graph_disagrees(tmp_path):
    model = lived_in(anorm.create_model("convnet", "bn", num_classes=10))
    with torch.no_grad():
        model.fc2.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="may not be finite"):
        export.export(model, tmp_path, 32, formats=("pt2",))
    assert not list(tmp_path.iterdir())


def test_an_image_that_is_too_small_is_refused_in_words():
    model = anorm.create_model("resnet20", "bn", num_classes=10).eval()
    with pytest.raises(ValueError, match="--size"):
        export.program(model, 4)


def test_as_a_user_calls_it(tmp_path, capsys):
    source = lived_in(anorm.create_model("convnet", "an", num_classes=7))
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    command = ["convnet", "--norm", "an", "--classes", "7", "--weights", str(tmp_path / "weights.pt"),
               "--formats", "pt2", "--out", str(tmp_path / "out")]  # fmt: skip
    assert script("tools/export.py").main(command) == 0
    assert "any batch, this size alone" in capsys.readouterr().out
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        run = torch.export.load(tmp_path / "out" / "model.pt2").module()
        assert largest_difference(run(images), source(images)) < 2e-5
    assert script("tools/export.py").main(["resnet51"]) == 2
    assert "resnet50" in capsys.readouterr().err


def test_untrained_networks_are_given_statistics():
    """Without any, AN's values grow by K/2 a layer and a deep network overflows."""
    torch.manual_seed(0)
    model = anorm.create_model("densenet121", "an", num_classes=10)
    export.settle(model)
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).isfinite().all()
    assert not model.training and all(
        m.momentum == 0.1 for m in model.modules() if isinstance(m, Norm) and hasattr(m, "momentum")
    )
