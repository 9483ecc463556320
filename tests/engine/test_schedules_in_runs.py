"""Schedules that a configuration names: what runs log of them, exact resume, and keys of another schedule."""

import math

import pytest
import torch
from commands import SMALL, cut_at, events, run_train, train, weights

from anorm.config.settings import settings_from
from anorm.config.signature import signature
from anorm.engine.schedule import Alrs, create_schedule

ALRS = [
    *SMALL,
    "epochs=5",
    "data.train_images=96",
    "schedule.name=alrs",
    "schedule.factor=0.5",
    "schedule.tolerance=0.8",
    "schedule.warmup_epochs=1",
    "log.every=4",
    "checkpoint.every_steps=1",
    "checkpoint.keep=40",
]
"""Six steps an epoch. A loss that falls by less than 0.8 lowers the rate."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alrs") / "run"
    assert train(*ALRS, f"run_dir={folder}") == 0
    return folder


def assert_same(a, b):
    one, other = (weights(folder)["model"] for folder in (a, b))
    assert all(torch.equal(one[key], other[key]) for key in one)
    for key in ("step", "loss", "lr"):
        assert [e[key] for e in events(a, "train")] == [e[key] for e in events(b, "train")]
    assert weights(a)["schedule"] == weights(b)["schedule"]


def test_the_rate_of_a_run_falls_by_its_own_logged_losses(run):
    """Each epoch's mean loss, from the log: reports of every fourth step of the run and of the epoch's last."""
    logged = events(run, "train")
    assert [e["step"] for e in logged] == sorted({*range(4, 31, 4), *range(6, 31, 6)})
    schedule, lowered, before, total = (
        Alrs(0.1 * 16 / 256, 6, tolerance=0.8, factor=0.5, warmup_epochs=1),
        0,
        0,
        0.0,
    )
    for e in logged:
        assert e["lr"] == schedule(e["step"] - 1)
        total, before = total + (e["step"] - before) * e["loss"], e["step"]
        if before % 6 == 0:
            scale = schedule.scale
            schedule.epoch_ended(before // 6 - 1, total / 6)
            lowered, total = lowered + (schedule.scale < scale), 0.0
    assert lowered > 1
    assert weights(run)["schedule"]["scale"] == schedule.scale
    assert weights(run)["schedule"]["last_loss"] == pytest.approx(schedule.last_loss, rel=1e-12)


def test_a_run_that_is_cut_at_any_step_continues_exactly(run, tmp_path):
    """The checkpoints of single steps, in the middle of an epoch and of a report, continue to the same end."""
    for step in (11, 12, 19):  # in a report, at an epoch's end, past a lowered rate
        folder = cut_at(run, step, tmp_path / str(step))
        assert train(*ALRS, f"run_dir={folder}") == 0
        assert_same(run, folder)


@pytest.mark.slow
def test_two_processes_lower_the_rate_together_and_continue_exactly(run, tmp_path):
    two = [*ALRS, "hardware.processes=2"]
    whole = tmp_path / "whole"
    status, _, err = run_train(*two, f"run_dir={whole}")
    assert status == 0, err
    # the same global batches: the losses, and so the rates, are one process's to rounding
    rates = [[e["lr"] for e in events(folder, "train")] for folder in (run, whole)]
    assert rates[0] == rates[1]
    cut = cut_at(whole, 15, tmp_path / "cut")
    status, out, err = run_train(*two, f"run_dir={cut}")
    assert status == 0 and "continuing at step 15" in out, err
    assert_same(whole, cut)


def test_steps_run_by_name(tmp_path):
    arguments = [
        "schedule.name=step",
        "schedule.milestones=[1]",
        "schedule.warmup_steps=2",
        "schedule.warmup_from=0.5",
    ]
    assert train(*SMALL, *arguments, "log.every=1", f"run_dir={tmp_path / 'run'}") == 0
    peak = 0.1 * 16 / 256
    expected = [peak * f for f in (0.5, 0.75, 1, 1, 0.1, 0.1, 0.1, 0.1)]
    assert [e["lr"] for e in events(tmp_path / "run", "train")] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ({"name": "step", "milestones": [3], "floor": 0.1}, "schedule.floor=0.1 is not for schedule.name=step"),
        ({"milestones": [3]}, "schedule.milestones=.3. is not for schedule.name=cosine, which takes warmup_epochs, floor"),
        ({"factor": 0.5}, "schedule.factor=0.5 is not for schedule.name=cosine"),
        ({"name": "alrs", "warmup_steps": 3}, "schedule.warmup_steps=3 is not for schedule.name=alrs"),
        ({"name": "step", "tolerance": 0.1, "milestones": [3]}, "schedule.tolerance=0.1 is not for"),
        ({"name": "step"}, "schedule.milestones=.. must be rising numbers of epochs"),
        ({"name": "step", "milestones": [5, 3]}, "must be rising"),
        ({"name": "step", "milestones": [3, "x"]}, "must be rising"),
        ({"name": "step", "milestones": [120]}, "the last is never reached"),
        ({"name": "step", "milestones": [3], "warmup_from": 0.3}, "for schedule.warmup_steps=N"),
        ({"name": "alrs", "factor": 0.0}, "schedule.factor=0.0 must be above 0"),
        ({"name": "cosin"}, "schedule.name=cosin: did you mean cosine"),
    ],
)  # fmt: skip
def test_keys_of_another_schedule_and_impossible_values_are_refused_in_words(schedule, words):
    with pytest.raises(ValueError, match=words):
        settings_from({"schedule": schedule})


def test_the_defaults_are_those_of_the_sources():
    alrs = settings_from({"schedule": {"name": "alrs", "warmup_epochs": 0.0}}).schedule
    made = create_schedule(alrs, 0.1, 50, 10)
    assert (made.tolerance, made.factor, made.last_loss) == (0.01, 0.97, math.inf)
    step = settings_from({"schedule": {"name": "step", "milestones": [30, 60]}}).schedule
    assert create_schedule(step, 0.1, 90, 10).factor == 0.1


def test_runs_from_before_schedules_had_names_keep_their_signature():
    """A configuration without the new keys is what such a run froze."""
    import dataclasses

    new = dataclasses.asdict(settings_from({})) | {name: {"name": name} for name in ("arch", "norm", "data")}
    old = new | {"schedule": {"warmup_epochs": 5.0, "floor": 0.0}}
    assert signature(old, "data", 1) == signature(new, "data", 1)
    for key, value in (("name", "step"), ("factor", 0.5), ("milestones", [3]), ("tolerance", 0.1)):
        assert signature(new | {"schedule": new["schedule"] | {key: value}}, "data", 1) != signature(
            new, "data", 1
        )
