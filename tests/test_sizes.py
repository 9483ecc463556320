"""Every architecture with every norm, found by listing configs/: the number of parameters follows from the formula of
each law and the sites of the network, which are counted independently of any law."""

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import anorm
from anorm.norms.base import Site

CONFIGS = Path(__file__).parents[1] / "configs"
K = {4: (10, 10, 20, 20), 7: (5, 5, 5, 5, 10, 10, 10)}  # section 3.3; MobileNetV2's seven rows


def names(group: str) -> list[str]:
    return sorted(yaml.safe_load(path.read_text())["name"] for path in (CONFIGS / group).glob("*.yaml"))


def bn(site: Site) -> int:
    return 2 * site.channels


def an(site: Site) -> int:
    """Mixtures 2KC, FC KC, attention norm 2K."""
    k, c = K.get(site.stages, (10,) * site.stages)[site.stage], site.channels
    return 3 * k * c + 2 * k if site.focus else bn(site)


def an_gn(site: Site) -> int:
    """Mixtures 2KC, FC with bias KC + K, no attention norm (A1)."""
    k, c = K.get(site.stages, (10,) * site.stages)[site.stage], site.channels
    return 3 * k * c + k if site.focus else bn(site)


def se(site: Site) -> int:
    """Two layers C x C/16 without bias on top of BN, at a block's last norm."""
    return bn(site) + (2 * site.channels * max(site.channels // 16, 1) if site.last else 0)


FORMULAS = {
    "bn": bn,
    "gn": bn,
    "ln": bn,
    "in": bn,
    "sn": lambda site: bn(site) + 6,
    "ssn": lambda site: bn(site) + 6,
    "bin": lambda site: bn(site) + site.channels,
    "se": se,
    "an": an,
    "an_gn": an_gn,
}


@pytest.mark.parametrize("arch", names("arch"))
def test_sizes(arch):
    sites = []

    def record(site):
        sites.append(site)
        layer = nn.Identity()
        layer.zero_init = lambda: None
        return layer

    def count(norm):
        with torch.device("meta"):
            return sum(p.numel() for p in anorm.create_model(arch, norm).parameters())

    without = count(record)
    for norm, formula in FORMULAS.items():
        assert count(norm) == without + sum(map(formula, sites)), norm


@pytest.mark.parametrize("norm", [n for n in names("norm") if n not in FORMULAS and n != "module"])
@pytest.mark.parametrize("arch", ["resnet50", "densenet121", "mobilenetv2", "resnet20"])
def test_every_other_norm_builds_everywhere(arch, norm):
    with torch.device("meta"):
        larger = anorm.create_model(arch, norm)
        plain = anorm.create_model(arch, "bn")
    assert sum(p.numel() for p in larger.parameters()) >= sum(p.numel() for p in plain.parameters())
    assert norm in larger.norm_summary


def test_lists_and_configs_agree():
    assert set(names("arch")) == set(anorm.list_archs())
    assert set(names("norm")) == set(anorm.list_norms())
