"""tools/import_weights.py, called as a user does."""

import importlib.util
from pathlib import Path

import pytest
import torch

import anorm
from anorm.norms.attentive import AttentiveNorm
from anorm.weights import load_weights

TOOL = Path(__file__).parents[2] / "tools" / "import_weights.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("import_weights", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_the_authors_names(model):
    """An AN network's state in the naming of the authors' first repository, as their trainer saves it."""
    attentive = [name for name, module in model.named_modules() if isinstance(module, AttentiveNorm)]
    state = {}
    for name, value in model.state_dict().items():
        if name.rpartition(".")[0] in attentive:
            name += "_"
        name = name.replace(".base.", ".").replace(".attention.norm.", ".attention_weights.attention.1.")
        if ".attention.fc." in name:
            name, value = (
                name.replace(".attention.fc.", ".attention_weights.attention.0."),
                value[:, :, None, None],
            )
        state[f"module.{name}"] = value
    return {"epoch": 119, "state_dict": state}


def test_the_authors_file_becomes_ours(tool, tmp_path, capsys):
    torch.manual_seed(0)
    model = anorm.create_model("resnet18", "an", num_classes=7)
    torch.save(in_the_authors_names(model), tmp_path / "theirs.pth")
    files = [str(tmp_path / name) for name in ("theirs.pth", "ours.safetensors")]
    assert tool.main([*files, "arch=resnet18", "norm=an"]) == 0
    said = capsys.readouterr().out
    assert "the authors' names" in said and "7 classes" in said
    other = anorm.create_model("resnet18", "an", num_classes=7)
    assert load_weights(other, tmp_path / "ours.safetensors").style == "own names"
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["arch=resnet18", "norm=bn"], "does not fit this network"),
        (["arch=resnet18", "norm=an", "norm.place=text"], "does not fit this network"),
        (["arch=resnet18", "norm=an", "out.pth"], "ends in .safetensors"),
        (["arch=resnet18", "norm=an", "theirs.pth"], "exists already"),
        (["arch=resnet18", "a", "b"], "got 3 files"),
        (["arch=resnet18", "entry=ema"], "no weights under 'ema'"),
    ],
)
def test_mistakes_are_said(tool, arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(in_the_authors_names(anorm.create_model("resnet18", "an", num_classes=7)), "theirs.pth")
    assert tool.main(["theirs.pth", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message and len(message.splitlines()) <= 2
