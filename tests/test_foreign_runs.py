"""train.py on networks of timm and torchvision, by name."""

import pytest
import torch
from commands import SMALL, network_of, script, train

from anorm.engine.record import read_metrics

SIZES = [word for word in SMALL if not word.startswith(("arch=", "norm="))]


@pytest.mark.parametrize(
    ("arch", "norm", "layer", "kind"),
    [
        ("timm:resnet18", ["norm=an", "norm.k=5"], "layer1.0.bn1", "AttentiveNorm"),
        ("timm:resnet18", ["norm=timm:frn"], "layer1.0.bn2", "FilterResponseNorm"),
        ("torchvision:mobilenet_v2", ["norm=gn"], "features.1.conv.0.1", "GroupNorm"),
    ],
)
def test_another_librarys_network_trains_and_validates(tmp_path, capsys, arch, norm, layer, kind):
    folder = tmp_path / "run"
    assert train(f"arch={arch}", *norm, *SIZES, f"run_dir={folder}") == 0
    last = read_metrics(folder)[-1]
    assert last["event"] == "final"
    assert script("tools/validate.py").main([str(folder)]) == 0
    assert f"top-1 {last['top1']:.2f}" in capsys.readouterr().out

    composed = script("train.py").composed
    arguments = script("train.py").Arguments([f"arch={arch}", *norm, *SIZES])
    network = network_of(composed(arguments), 4).network
    assert type(network.get_submodule(layer)).__name__.startswith(kind)


def test_a_recipe_of_another_network_does_not_leak_in(capsys):
    """resnet50 is the default architecture, and its yaml changes the stem under setup=sota."""
    found = script("train.py").composed(
        script("train.py").Arguments(["arch=timm:resnet18", "setup=sota", "arch.drop_path_rate=0.1"])
    )
    assert found.arch.tree() == {"name": "timm:resnet18", "drop_path_rate": 0.1} and found.recipe == ()


def test_norms_share_the_initial_weights():
    def network(*norm):
        composed = script("train.py").composed
        arguments = script("train.py").Arguments(["arch=timm:resnet18", *norm, *SIZES])
        return network_of(composed(arguments), 4)

    bn, frn = network("norm=bn"), network("norm=timm:frn")
    assert torch.equal(bn.network.layer4[1].conv2.weight, frn.network.layer4[1].conv2.weight)
    assert torch.equal(bn.network.fc.weight, frn.network.fc.weight)
    assert bn.network.conv1.weight.std() > 0


def test_the_folder_has_no_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("arch=timm:resnet18", "norm=bn", *SIZES, "dry=true") == 0
    assert train("arch=timm:resnet18", "norm=bn", *SIZES, "epochs=1") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("timm_resnet18-bn-synthetic-vanilla-s0-")


def test_the_librarys_own_weights_load_into_its_network(tmp_path):
    import torchvision

    import anorm

    theirs = torchvision.models.resnet18(num_classes=7).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = anorm.create_model("torchvision:resnet18", "bn", num_classes=7).eval()
    anorm.load_weights(ours, tmp_path / "theirs.pth")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        # the same function by other kernels: rounding of float32
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
