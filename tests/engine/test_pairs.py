"""Several evaluation sets and several statistics in one run: one event a pair, and the first pair chooses the best."""

import dataclasses
import re
import shutil

import numpy
import pytest
from commands import SMALL, events, script, train, weights

from anorm.data import sources
from anorm.engine.record import read_metrics
from anorm.engine.run import Progress
from anorm.tasks.classification import Classification


@pytest.fixture
def two_sets(monkeypatch):
    """A synthetic source with a second evaluation set, of other images."""
    from anorm import build

    def create_source(config):
        found = sources.create("synthetic", **config.data.options)
        other = sources.create("synthetic", **config.data.options | {"val_images": 30}).val
        return dataclasses.replace(found, evals={"val": found.val, "other": other})

    monkeypatch.setattr(build, "create_source", create_source)


def test_one_event_a_pair_and_the_first_chooses_the_best(two_sets, tmp_path):
    several = ["eval.stats=[running,batch]", "ema.decay=0.5"]
    assert train(*SMALL, *several, f"run_dir={tmp_path / 'several'}") == 0
    assert train(*SMALL, "ema.decay=0.5", f"run_dir={tmp_path / 'one'}") == 0
    found = events(tmp_path / "several", "eval")
    pairs = [("val", "running"), ("other", "running"), ("val", "batch"), ("other", "batch")]
    assert [(e["set"], e["stats"]) for e in found] == 2 * pairs  # two epochs
    assert [e["images"] for e in found[:4]] == [21, 30, 21, 30]
    for event in found:
        assert set(Classification.metrics) | {f"ema_{name}" for name in Classification.metrics} <= set(event)
    last = read_metrics(tmp_path / "several")[-1]
    first_pair = [e for e in found if (e["set"], e["stats"]) == pairs[0]]
    assert last["top1"] == first_pair[-1]["top1"] and last["ece"] == first_pair[-1]["ece"]
    assert last["best_top1"] == max(e["top1"] for e in first_pair)
    assert [(e["set"], e["stats"], e["loss"]) for e in last["evaluations"]] == [
        (*pair, e["loss"]) for pair, e in zip(pairs, found[4:], strict=True)
    ]
    # evaluating more changes neither the weights nor what the first pair says
    alone = events(tmp_path / "one", "eval")
    for a, b in zip([e for e in alone if e["set"] == "val"], first_pair, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    for name, value in weights(tmp_path / "one")["model"].items():
        assert value.equal(weights(tmp_path / "several")["model"][name]), name
    kept = {path.name: numpy.load(path) for path in (tmp_path / "several").glob("predictions*.npz")}
    assert sorted(kept) == sorted(
        f"predictions{ema}{of}.npz"
        for ema in ("", "_ema")
        for of in ("", "-other-running", "-val-batch", "-other-batch")
    )
    assert 100 * kept["predictions-other-batch.npz"]["top1"].mean() == pytest.approx(found[-1]["top1"])
    assert kept["predictions.npz"]["data"] != kept["predictions-other-running.npz"]["data"]


def test_held_statistics_are_those_of_a_repeated_evaluation_too(tmp_path, capsys):
    """A frozen norm standardizes with its running statistics whatever eval.stats says, in the run and in validate.py."""
    run = tmp_path / "run"
    assert train(*SMALL, "freeze=[stats]", "eval.stats=batch", f"run_dir={run}") == 0
    capsys.readouterr()
    assert script("tools/validate.py").main([str(run)]) == 0
    loss = float(re.search(r"loss (\S+)", capsys.readouterr().out).group(1))
    assert loss == pytest.approx(events(run, "eval")[-1]["loss"], abs=1e-6)


def test_weights_that_are_gone_cost_no_run(tmp_path, capsys, monkeypatch):
    """resume=never deletes what is there and starts from the weights: they are looked for before."""
    start, run = tmp_path / "start.safetensors", tmp_path / "run"
    assert train(*SMALL, f"run_dir={tmp_path / 'first'}") == 0
    shutil.copy(tmp_path / "first" / "weights.safetensors", start)
    again = [*SMALL, f"weights={start}", f"run_dir={run}", "resume=never"]
    assert train(*again) == 0
    kept = (run / "last.ckpt").read_bytes()
    (run / "predictions_bbox.json").write_text("of another task")
    start.rename(tmp_path / "elsewhere.safetensors")
    assert train(*again) == 2
    assert "start.safetensors is not a file" in capsys.readouterr().err
    assert (run / "last.ckpt").read_bytes() == kept
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the job's second start, which continues
    assert train(*again) == 0
    assert "is finished" in capsys.readouterr().out
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    (tmp_path / "elsewhere.safetensors").rename(start)
    assert train(*again) == 0
    assert not (run / "predictions_bbox.json").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("[]", "must name one or more"),
        ("[running,running]", "each once"),
        ("[running,bacth]", "batch"),
        ("[running,1]", "eval.stats"),
    ],
)
def test_wrong_statistics_are_refused(word, said, capsys):
    assert train(*SMALL, f"eval.stats={word}", "--cfg", "job") == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_that_classification_alone_wrote_is_read():
    # the fields of version 0.1's checkpoints
    old = {
        "step": 8, "evaluated": 2, "top1": 41.5, "top5": 90.0, "best_top1": 43.0, "best_epoch": 1, "seconds": 2.5,
        "train_seconds": 2.0, "train_images": 128, "skipped_steps": 0, "skipped_in_a_row": 0,
    }  # fmt: skip
    found = Progress.from_state(old)
    assert found.first == {"top1": 41.5, "top5": 90.0} and (found.best, found.best_epoch) == (43.0, 1)
    assert (found.step, found.train_images) == (8, 128) and "best_top1" in old
    unevaluated = Progress.from_state(old | {"top1": 0.0, "top5": 0.0, "best_top1": -1.0})
    assert unevaluated.best is None and unevaluated.first == {}
    assert Progress.from_state(dataclasses.asdict(found)) == found
