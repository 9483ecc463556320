"""Weights are evaluated with a folder that holds the evaluation images alone."""

import numpy as np
import pytest
import torch
from commands import script, train
from PIL import Image

from anorm import create_model


@pytest.fixture
def case(tmp_path):
    """A folder without training images, and weights for its three classes."""
    folder, rng = tmp_path / "set", np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (folder / "val" / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
                folder / "val" / name / f"{i}.png"
            )
    torch.manual_seed(0)
    torch.save(create_model("resnet20", norm="bn", num_classes=3).state_dict(), tmp_path / "weights.pth")
    data = ["data=imagefolder", f"data.root={folder}", "data.image_size=24", "hardware=cpu"]
    return tmp_path, ["arch=resnet20", "norm=bn", *data]


def test_validate_needs_no_training_images(case, capsys):
    folder, arguments = case
    assert script("tools/validate.py").main([str(folder / "weights.pth"), *arguments]) == 0
    assert "(9 images, running statistics" in capsys.readouterr().out
    status = script("tools/validate.py").main(
        [str(folder / "weights.pth"), *arguments, "eval.stats=recalibrated"]
    )
    assert (
        status == 2 and "without training images the network can be evaluated only" in capsys.readouterr().err
    )


def test_training_says_what_is_missing_before_it_starts(case, capsys):
    folder, arguments = case
    assert train(*arguments, f"run_dir={folder / 'run'}") == 2
    assert "train is not a folder: without training images" in capsys.readouterr().err
    assert not (folder / "run").exists()
