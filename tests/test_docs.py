"""docs/: commands compose, numbers are those of the code, links and files exist."""

import re
import shlex

import pytest
from commands import ROOT, SMALL, train

from anorm.config.commandline import parse
from anorm.config.machine import FOR_V100
from anorm.processes.slurm import wishes_from

PAGE = (ROOT / "docs" / "train_for_real.md").read_text()
DETECTION = (ROOT / "docs" / "detection.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for line in PAGE.splitlines() if line.startswith("    ")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "train.py" in c or "nodes.sh" in c])
def test_commands_compose(command, capsys, tmp_path):
    words = shlex.split(command)
    asked = parse(words[next(i for i, w in enumerate(words) if w.endswith((".py", ".sh"))) + 1 :])
    assert asked.submit == bool(asked.slurm) and wishes_from(asked.slurm).gpus_per_node == 8
    single = [word.split(",")[0] if asked.multirun else word for word in asked.overrides]
    assert train(*single, "--cfg", "job") == 0, capsys.readouterr().err


@pytest.mark.parametrize("command", re.findall(r"python train\.py ([^#\n]*)", DETECTION))
def test_commands_of_detection_compose(command, capsys):
    assert train(*command.split(), "--cfg", "job") == 0, capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\btools/[\w/]+\.py", DETECTION))))
def test_files_of_detection_exist(path):
    assert (ROOT / path).is_file()


def test_the_installation_for_v100s_is_the_one_that_is_told():
    assert FOR_V100 in COMMANDS


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\b(?:tools|scripts|anorm)/[\w/]+\.\w+", PAGE))))
def test_files_exist(path):
    assert (ROOT / path).is_file()


def test_keys_exist(capsys):
    assert train("data=synthetic", "--cfg", "job") == 0
    import yaml

    config = yaml.safe_load(capsys.readouterr().out)
    for section, key in re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", PAGE):
        if section in config and isinstance(config[section], dict) and section != "data":
            assert key in config[section], f"{section}.{key}"


def test_the_size_of_a_checkpoint():
    import anorm

    weights = sum(4 * p.numel() for p in anorm.create_model("resnet50", norm="an").parameters()) / 1e6
    assert f"of {2 * weights:.0f} MB" in PAGE and f"of {weights:.0f} MB each" in PAGE
    assert f"{(3 * 2 + 2) * weights / 1000:.1f} GB: three checkpoints" in PAGE


def test_what_a_run_folder_holds(tmp_path):
    assert (
        train(
            *SMALL, "log.tensorboard=true", "ema.decay=0.9", "checkpoint.every_steps=1", f"run_dir={tmp_path}"
        )
        == 0
    )
    there = {path.name for path in tmp_path.iterdir() if path.name[0] != "."} - {
        "last-2.ckpt"
    }  # one stands for all
    told = set(
        re.findall(
            r"`([\w.-]+)/?`",
            " ".join(
                r.split("|")[1] for r in PAGE.split("folder holds")[1].splitlines() if r.startswith("| `")
            ),
        )
    )
    assert there == told
