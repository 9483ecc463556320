"""Weights that a run starts from, once its checkpoint has made them redundant."""

import shutil

import pytest
from commands import SMALL, events, train, weights

CUT = [*SMALL, "epochs=1", "schedule.warmup_epochs=0"]


@pytest.fixture
def started(trained, tmp_path, monkeypatch, capsys):
    """The folder of a run that started from given weights, stopped after one of its two epochs."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained / "bn-0" / "weights.safetensors", tmp_path / "w.safetensors")
    assert train(*SMALL, "seed=5", "weights=w.safetensors", "run_dir=run") == 0
    kept = tmp_path / "run" / "last-1.ckpt"
    (tmp_path / "run" / "last.ckpt").write_bytes(kept.read_bytes())  # as if killed after the first epoch
    lines = (tmp_path / "run" / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    capsys.readouterr()
    return tmp_path / "run"


def test_a_run_with_a_checkpoint_needs_them_no_longer(started, tmp_path, monkeypatch):
    wanted = weights(started, "best.ckpt").keys()
    (tmp_path / "w.safetensors").unlink()
    assert train(*SMALL, "seed=5", "weights=w.safetensors", "run_dir=run") == 0  # the command as it was typed
    assert events(started, "final") and weights(started, "best.ckpt").keys() == wanted
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train("--config", str(started / "config.yaml")) == 0  # finished, from another folder


def test_the_run_is_found_in_the_folder_of_its_own_name(started, tmp_path, capsys):
    held = (started / "config.yaml").read_text()
    signature = held.split("signature: ")[1].split()[0]
    own = tmp_path / "runs" / f"resnet20-bn-synthetic-vanilla-s5-{signature}"
    own.parent.mkdir()
    started.rename(own)
    (own / "config.yaml").write_text(held.replace(str(started), "null"))
    (tmp_path / "w.safetensors").unlink()
    assert train(*SMALL, "seed=5", "weights=w.safetensors") == 0
    assert f"run folder: {own}" in capsys.readouterr().out
    assert train(*SMALL, "seed=6", "weights=w.safetensors") == 2  # no run started from them with this seed
    assert "w.safetensors is not a file" in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_another_run(started, trained, tmp_path, capsys):
    shutil.copy(trained / "bn-1" / "weights.safetensors", tmp_path / "w.safetensors")
    assert train(*SMALL, "seed=5", "weights=w.safetensors", "run_dir=run") == 2
    assert "of another configuration (other data or weights)" in capsys.readouterr().err
    for path in started.glob("*.ckpt"):  # nothing of it is left but its configuration
        path.unlink()
    (started / "metrics.jsonl").unlink()
    assert train("--config", str(started / "config.yaml")) == 2
    assert "is another file than when this run was first started" in capsys.readouterr().err
