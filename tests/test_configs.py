"""Every yaml under configs/ composes, and says what the code says."""

import dataclasses

import pytest
import torch
import yaml
from commands import ROOT, network_of

from anorm.config.compose import BUILT, GROUPS, choices
from anorm.config.frozen import Config
from anorm.config.settings import Settings, sections
from anorm.registry import create_model

CONFIGS = ROOT / "configs"
PAIRS = [(group, choice) for group in GROUPS for choice in choices(CONFIGS, group)]


def composed(*arguments):
    return Config.compose(CONFIGS, list(arguments))


@pytest.mark.parametrize(("group", "choice"), PAIRS, ids=lambda value: value)
def test_every_choice_composes(group, choice):
    extra = ["norm.target=torch.nn.BatchNorm2d"] if (group, choice) == ("norm", "module") else []
    config = composed(f"{group}={choice}", *extra)
    assert config.choices[group] == choice
    assert set(config.tree()) == {field.name for field in dataclasses.fields(Settings)} | set(BUILT)
    if group in ("arch", "norm"):
        assert getattr(config, group).name == choice


@pytest.mark.parametrize("arch", choices(CONFIGS, "arch"))
def test_every_architecture_builds_under_every_setup(arch):
    configs = [
        composed(f"arch={arch}", "norm=an", setup)
        for setup in ("setup=vanilla", "setup=sota", "faithful=code")
    ]
    for i, config in enumerate(configs):
        if config.arch not in [earlier.arch for earlier in configs[:i]]:
            with torch.device("meta"):
                network_of(config, 10)


@pytest.mark.parametrize("norm", [name for name in choices(CONFIGS, "norm") if name != "module"])
def test_every_norm_builds(norm):
    config = composed(f"norm={norm}", "arch=resnet18")
    network_of(config, 10)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenetv2", "densenet121"])
@pytest.mark.parametrize("norm", [name for name in choices(CONFIGS, "norm") if name != "module"])
def test_the_network_that_is_trained_is_the_librarys(norm, arch):
    """A complete configuration must not spell out a layer's default where the site decides: AN's published K
    is 10, 10, 20, 20 for four stages."""
    with torch.device("meta"):
        trained = network_of(composed(f"arch={arch}", f"norm={norm}"), 1000).state_dict()
        wanted = create_model(arch, norm, 1000).state_dict()
    assert {n: v.shape for n, v in trained.items()} == {n: v.shape for n, v in wanted.items()}


def test_trained_networks_have_their_papers_size():
    def size(*arguments):
        with torch.device("meta"):
            return sum(p.numel() for p in network_of(composed(*arguments), 1000).parameters())

    assert size("arch=resnet50", "norm=an") == 25_755_420  # K 10, 10, 20, 20; 10 everywhere has 92,340 fewer
    assert size("arch=resnet50", "norm=an", "norm.k=10") == 25_663_080
    # SE behind the 3x3 has a reduction of 4 (C = 64, 128, 256, 512 in 3, 4, 6, 3 blocks), behind a block 16
    gates = sum(n * 2 * c * c // 4 for n, c in ((3, 64), (4, 128), (6, 256), (3, 512)))
    assert size("arch=resnet50", "norm=se", "norm.place=2") == size("arch=resnet50", "norm=bn") + gates


def test_a_plain_module_is_a_norm():
    config = composed(
        "norm=module", "norm.target=torch.nn.GroupNorm", "norm.num_groups=8", "arch=resnet18"
    )
    assert (network_of(config, 10).bn1.module.num_groups, config.norm.options["num_groups"]) == (8, 8)
    config = composed("norm=module", "norm.target=torch.nn.GroupNorm", "norm.groups=8", "arch=resnet18")
    with pytest.raises(ValueError, match="norm.target.*groups"):
        network_of(config, 10)
    config = composed(
        "norm=module", "norm.target=torch.nn.InstanceNorm2d", "norm.affine=true", "arch=resnet18"
    )
    model = network_of(config, 10)
    assert isinstance(model.bn1.module, torch.nn.InstanceNorm2d) and model.bn1.module.affine
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.bn1.module.weight.grad is not None


def test_yaml_and_dataclass_defaults_are_equal():
    assert composed("arch=resnet50", "norm=bn").settings == Settings()


def test_sota_is_written_as_a_diff_of_vanilla():
    sota = yaml.safe_load((CONFIGS / "setup" / "sota.yaml").read_text())
    assert sota["defaults"] == ["vanilla", "_self_"]
    assert set(sota) == {"defaults", "epochs", "mix"}


def test_every_section_of_the_settings_is_spelled_out():
    spelled = (
        set(yaml.safe_load((CONFIGS / "train.yaml").read_text()))
        | set(yaml.safe_load((CONFIGS / "setup" / "vanilla.yaml").read_text()))
        | {"hardware"}
    )
    assert set(sections()) <= spelled


def test_a_recipe_under_a_condition_replaces_the_general_one_and_is_said_once():
    found = composed("data=digits", "arch=resnet50")
    assert found.settings.epochs == 7
    assert [line for line in found.recipe if line.partition(": ")[2].startswith("epochs=")] == [
        "data=digits with arch=resnet50: epochs=7"
    ]
    assert composed("data=digits", "arch=resnet20").settings.epochs == 15


def test_what_a_recipe_changes_is_said_and_the_command_line_wins():
    found = composed("arch=resnet50", "setup=sota", "arch.stem=7x7")
    assert "arch=resnet50 with setup=sota: arch.zero_init=true" in found.recipe
    assert not [line for line in found.recipe if "stem" in line]
    assert found.arch.options["stem"] == "7x7"


def test_networks_are_equal_across_norms_but_for_their_norms():
    """The same seed gives the same convolutions and classifier, whatever stands between them."""
    models = {
        norm: dict(network_of(composed("arch=resnet18", f"norm={norm}"), 10).named_parameters())
        for norm in ("bn", "an", "gn")
    }
    for name, parameter in models["bn"].items():
        if "bn" not in name and "downsample.1" not in name:
            assert torch.equal(parameter, models["an"][name]) and torch.equal(
                parameter, models["gn"][name]
            ), name
    other = dict(network_of(composed("arch=resnet18", "norm=an", "seed=1"), 10).named_parameters())
    assert not torch.equal(other["conv1.weight"], models["an"]["conv1.weight"])
    assert not torch.equal(other["layer1.0.bn1.weight"], models["an"]["layer1.0.bn1.weight"])
