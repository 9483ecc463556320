"""Runs that are older than a word's present meaning are read as they were."""

import pytest
import yaml
from commands import ROOT, SMALL, train

from anorm.config.frozen import Config
from anorm.engine.runfolder import configuration_in


@pytest.mark.parametrize(
    "arch, older, place", [("resnet20", True, "text"), ("resnet50", True, "published"), ("resnet20", False, "published")]
)
def test_an_older_run_keeps_the_place_of_its_attention(arch, older, place, tmp_path):
    """Runs without a task are older than AN at the first norm of basic blocks; in bottlenecks nothing changed."""
    held = yaml.safe_load(Config.compose(ROOT / "configs", [f"arch={arch}", "norm=an"]).text())
    if older:
        del held["task"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(held))
    assert configuration_in(tmp_path).norm.options["place"] == place


def test_a_run_evaluated_on_other_batches_says_so(tmp_path, capsys):
    """As runs with eval.stats=batch are that are older than eval.order."""
    arguments = [*SMALL, "epochs=1", "eval.stats=batch", f"run_dir={tmp_path / 'run'}"]
    assert train(*arguments) == 0
    path = tmp_path / "run" / "config.yaml"
    held = yaml.safe_load(path.read_text())
    for key in ("order", "seed"):
        del held["eval"][key]
    path.write_text(yaml.safe_dump(held | {"signature": "0123456789"}))
    capsys.readouterr()
    assert train("--config", str(path)) == 2
    assert "evaluated by an earlier version, with the statistics of other batches" in capsys.readouterr().err
