"""Jobs of a Slurm cluster, whose commands are faked: they run here, on the CPU."""

import os
import re
import time
from pathlib import Path

import fake_slurm
import pytest
import torch
import yaml
from commands import SMALL, events, run_train, train, weights

from anorm.processes.slurm import active, minutes, wishes_from

CPU = [
    "--submit",
    "slurm",
    "slurm.gpus_per_node=0",
    "slurm.partition=long",
    "slurm.time=2-12",
    "slurm.exclusive=true",
]
LONG = [*SMALL, "data.train_images=128", "epochs=30", "log.every=1"]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    return fake_slurm.Slurm(tmp_path / "cluster", monkeypatch)


def job_of(said):
    """(number, log) that a submission prints."""
    _, number, log = said.split()
    return number.strip(":"), Path(log)


def same_weights(a, b):
    one, other = weights(a)["model"], weights(b)["model"]
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_ends_as_if_it_had_not_been(slurm, tmp_path):
    """And the configuration is the one of the submission, whatever happens to files and the queue since."""
    (slurm.folder / "hold").touch()
    status, out, err = run_train(*CPU, *LONG, "run_dir=run", cwd=tmp_path)
    assert status == 0, err
    number, log = job_of(out)
    assert slurm.jobs() == [number] and active(number) and not active("99")
    options = slurm.job(number)["options"]
    assert {k: options[k] for k in ("nodes", "ntasks-per-node", "partition", "time", "cpus-per-task")} == {
        "nodes": "1",
        "ntasks-per-node": "1",
        "partition": "long",
        "time": "3600",
        "cpus-per-task": "1",
    }
    assert {"requeue", "exclusive"} <= options.keys() and options["signal"] == "USR2@180"
    assert "gpus-per-node" not in options and "srun" in slurm.job(number)["script"]
    (frozen,) = (tmp_path / "runs" / ".slurm").glob("*.yaml")
    assert yaml.safe_load(frozen.read_text())["hardware"]["dtype"] == "fp32"

    (slurm.folder / "hold").unlink()
    run = tmp_path / "run"
    while not any(line["step"] >= 3 for line in events(run, "train")):
        assert active(number), log.read_text()
        time.sleep(0.05)
    slurm.signal(number)
    assert slurm.wait(number) == ["COMPLETED"], log.read_text()
    assert slurm.job(number)["starts"] == 2 and not active(number)
    said = log.read_text()
    assert "this job is preempted" in said
    assert "everything is saved" in said and "continuing at step" in said
    assert len(events(run, "final")) == 1
    steps = [line["step"] for line in events(run, "train")]
    assert steps == sorted(set(steps)) and len(events(run, "start")) == 2

    status, _, err = run_train(*LONG, f"run_dir={tmp_path / 'whole'}")
    assert status == 0, err
    assert same_weights(run, tmp_path / "whole")


@pytest.mark.slow
def test_two_nodes_are_one_run(slurm, tmp_path):
    """Also when their time is over: the first node's signal stops the processes of both. To submitit a signal in
    the last ten minutes is a time-out, and otherwise a preemption.
    """
    status, out, err = run_train(*CPU, "slurm.nodes=2", "slurm.time=9", *LONG, "run_dir=run", cwd=tmp_path)
    assert status == 0, err
    number, log = job_of(out)
    while not any(line["step"] >= 3 for line in events(tmp_path / "run", "train")):
        assert active(number), log.read_text()
        time.sleep(0.05)
    slurm.signal(number)
    assert slurm.wait(number) == ["COMPLETED"], log.read_text()
    assert slurm.job(number)["starts"] == 2
    starts = events(tmp_path / "run", "start")
    assert "this job is timed-out" in log.read_text()
    assert [line["processes"] for line in starts] == [2, 2] and starts[1]["step"] >= 3
    assert len(events(tmp_path / "run", "final")) == 1


@pytest.mark.slow
def test_a_grid_is_a_job_for_each_combination_that_composes_and_a_failure_is_seen(slurm, tmp_path):
    (slurm.folder / "hold").touch()
    status, out, err = run_train(
        "-m", *CPU, *SMALL, "epochs=1", "norm=bn,bm", "optim.lr=0.1,1e30", cwd=tmp_path
    )
    assert status == 2 and err.count("unknown norm 'bm'") == 2 and len(slurm.jobs()) == 2
    (slurm.folder / "hold").unlink()
    assert slurm.wait(*slurm.jobs()) == ["COMPLETED", "FAILED"]
    logs = [(tmp_path / "runs" / ".slurm" / f"{n}_0_log.out").read_text() for n in slurm.jobs()]
    assert "finished: last epoch" in logs[0] and "not finite" in logs[1]


def test_submission_options_do_not_change_the_run_and_its_devices_are_those_of_the_nodes(slurm, tmp_path):
    """Composed on a machine without GPUs for one with; nothing is run."""
    (slurm.folder / "hold").touch()
    here = [word for word in SMALL if not word.startswith("hardware")]
    sizes = ["batch_size=4", "optim.global_batch=64"]
    for nodes, partition in (("1", "a"), ("2", "b")):
        status, out, err = run_train(
            "--submit",
            "slurm",
            f"slurm.nodes={nodes}",
            f"slurm.partition={partition}",
            *here,
            *sizes,
            cwd=tmp_path,
        )
        assert status == 0, err
    (frozen,) = (tmp_path / "runs" / ".slurm").glob("*.yaml")
    hardware = yaml.safe_load(frozen.read_text())["hardware"]
    assert (hardware["device"], hardware["dtype"], hardware["processes"]) == ("gpu", "fp16", "auto")
    options = [slurm.job(number)["options"] for number in slurm.jobs()]
    assert [o["gpus-per-node"] for o in options] == ["8", "8"] and options[0]["cpus-per-task"] == "64"
    for number in slurm.jobs():  # the jobs would want GPUs
        slurm_file = slurm.folder / f"{number}.json"
        slurm_file.write_text(slurm_file.read_text().replace("srun", "true"))
    (slurm.folder / "hold").unlink()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["slurm.partition=a"], "add --submit slurm"),
        (["--submit", "pbs"], "--submit takes one word"),
        (["--submit", "slurm", "slurm.time=soon"], "slurm.time=soon is no duration"),
        (["--submit", "slurm", "slurm.nodes=0"], "slurm.nodes=0 must be a whole number"),
        (["--submit", "slurm", "slurm.array=1-3"], "slurm.array is decided by train.py"),
        (["--submit", "slurm", "slurm.partition"], "give slurm.OPTION=VALUE"),
        (["--submit", "slurm", "slurm.partition=nowhere"], "Slurm refuses the job: .*invalid partition"),
        (
            ["--submit", "slurm", "hardware.processes=3", "slurm.nodes=2", "optim.global_batch=384"],
            "on each node",
        ),
        (["--submit", "slurm", "slurm.nodes=3"], "optim.global_batch=1024 is no whole number"),
    ],
)
def test_mistakes(slurm, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert train(*arguments, "arch=resnet50") == 2
    message = capsys.readouterr().err
    assert re.search(words, message) and len(message.splitlines()) <= 2 and not slurm.jobs()


def test_without_slurm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.path.dirname(os.__file__))
    assert train("--submit", "slurm", "arch=resnet50") == 2
    assert "there is no sbatch here" in capsys.readouterr().err


def test_durations_as_slurm_writes_them():
    for text, expected in {
        "90": 90,
        "90:00": 90,
        "1:30:00": 90,
        "1-12": 2160,
        "2-00:30": 2910,
        "0:30": 1,
    }.items():
        assert minutes(text) == expected
    assert wishes_from(["slurm.mail_user=a", "slurm.time=1-00"]).other == {"mail-user": "a"}
