"""A configuration as one object: composed, completed, signed, written down and read again."""

import json
from pathlib import Path

import pytest
from commands import ROOT

from anorm.config.frozen import Config
from anorm.config.machine import Machine
from anorm.engine.runfolder import folder_for

CONFIGS = ROOT / "configs"
SIGNATURES = json.loads((Path(__file__).parent / "signatures.json").read_text())
"""Arguments -> run folder, as the version of 2026-11-27 named it: runs made by it must be found again. AN stood at the
last norm of basic blocks then, which norm.place=text is now.
"""
V100S = Machine(8, 80, (7, 0), "Tesla V100", ("sm_70",))


def composed(*arguments):
    return Config.compose(CONFIGS, list(arguments))


@pytest.mark.parametrize("arguments", SIGNATURES)
def test_signatures_and_folders_of_earlier_runs_stay(arguments, monkeypatch):
    """An argument that is new since then belongs into ``signature.ADDED``."""
    monkeypatch.delenv("IMAGENET_DIR", raising=False)
    monkeypatch.delenv("IMAGENET_SHARDS", raising=False)
    machine = Machine(0, 2) if "hardware=cpu" in arguments or "digits" in arguments else V100S
    config = composed(*arguments.split()).on(machine)
    assert folder_for(config, config.signed("identity of the data")).name == SIGNATURES[arguments]
    again = Config.from_text(config.text())
    assert again.tree() == config.tree() and again.choices == config.choices
