"""Every architecture has a yaml of its name, every yaml one architecture, and its recipe composes."""

from pathlib import Path

import pytest
import torch
import yaml

import anorm
from anorm.config.frozen import Config

CONFIGS = Path(__file__).parents[2] / "configs"
ARCHS = sorted(path.stem for path in (CONFIGS / "arch").glob("*.yaml"))


def test_architectures_and_yamls_are_the_same():
    named = {arch: yaml.safe_load((CONFIGS / "arch" / f"{arch}.yaml").read_text())["name"] for arch in ARCHS}
    own = {arch: name for arch, name in named.items() if ":" not in str(name)}
    assert own == {name: name for name in anorm.list_archs()}


def conditions(arch):
    """The words under which an architecture changes the recipe, and none."""
    keys = yaml.safe_load((CONFIGS / "arch" / f"{arch}.yaml").read_text()).get("recipe") or {}
    return [[], *(key.split() for key in keys if "=" in key)]


@pytest.mark.parametrize(("arch", "extra"), [(arch, extra) for arch in ARCHS for extra in conditions(arch)])
def test_yaml_builds(arch, extra):
    config = Config.compose(CONFIGS, [f"arch={arch}", *extra])
    with torch.device("meta"):
        anorm.create_model(config.arch.name, config.norm.tree(), 10, **config.arch.options)


def test_recipe_of_mobilenetv2():
    config = Config.compose(CONFIGS, ["arch=mobilenetv2"])
    assert (config.settings.epochs, config.settings.optim.lr, config.settings.optim.weight_decay) == (150, 0.05, 4e-5)
    assert config.arch.options["dropout"] == 0.2
