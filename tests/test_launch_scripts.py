"""scripts/ that launch runs: they parse, and what they start composes."""

import subprocess
import sys

import pytest
from commands import ROOT, environment, script, train

from anorm.study.grid import open_grid

SHELL = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts").glob("*.sbatch")])
AROUND = {"NODES": "2", "NODE": "1", "MASTER": "host0", "PARTITION": "gpu", "GPUS": "4", "SLURM_JOB_ID": "77"}


@pytest.fixture
def started(tmp_path):
    """Run a script among programs that only write down how they were called: (status, their calls)."""

    def run(name, *arguments, python="true", srun="true", before=()):
        tmp_path.joinpath("calls").write_text("")
        for program, then in {"python": python, "torchrun": "true", "srun": srun, "scontrol": "true"}.items():
            path = tmp_path / program
            path.write_text(
                f"#!/bin/bash\n(printf '%s\\0' {program} \"$@\"; echo) >> {tmp_path}/calls\n{then}\n"
            )
            path.chmod(0o755)
        around = environment(PATH=f"{tmp_path}:/usr/bin:/bin", **AROUND)
        done = subprocess.run(
            [*before, ROOT / "scripts" / name, *arguments],
            env=around,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        lines = (tmp_path / "calls").read_text().splitlines()
        return done.returncode, [line.strip("\0").split("\0") for line in lines]

    return run


def composes(arguments, capsys):
    assert train(*arguments, "--cfg", "job") == 0, arguments
    return capsys.readouterr().out


@pytest.mark.parametrize("path", SHELL, ids=lambda p: p.name)
def test_every_script_parses_and_stops_at_errors(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True).returncode == 0
    assert "set -euo pipefail" in path.read_text().splitlines()
    assert path.stat().st_mode & 0o111 and max(map(len, path.read_text().splitlines())) <= 130


@pytest.mark.parametrize("name", ["table2_one_machine.sh", "table2_slurm.sh"])
def test_tables(started, tmp_path, capsys, name):
    status, calls = started(name, "log.every=7", "--only", "resnet50-an")
    assert status == 0 and [call[:2] for call in calls] == [["python", "tools/table.py"]]
    table = script("tools/table.py")
    assert table.main([*calls[0][2:], "--dry", "--runs", str(tmp_path / "none")]) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python train.py")]
    assert len(commands) == 2 and all(
        "log.every=7" in command and "slurm." not in command for command in commands
    )
    composes([word for word in commands[0].split()[2:]], capsys)


def test_several_nodes(started, capsys):
    status, calls = started("nodes.sh", "norm=an", "arch=resnet50", "optim.global_batch=2048")
    assert status == 0 and len(calls) == 1
    at = calls[0].index("train.py")
    assert calls[0][0] == "torchrun" and {"--nnodes=2", "--node-rank=1", "--master-addr=host0"} < set(
        calls[0][:at]
    )
    composes(calls[0][at + 1 :], capsys)
    import torch.distributed.run

    told = torch.distributed.run.parse_args(calls[0][1:])  # it knows these options
    assert told.signals_to_handle == "SIGTERM,SIGINT,SIGQUIT,SIGUSR1,SIGUSR2,SIGHUP"
    _, calls = started("nodes.sh", "norm=an", before=["nohup"])
    assert "SIGHUP" not in torch.distributed.run.parse_args(calls[0][1:]).signals_to_handle


@pytest.mark.slow
def test_every_row_of_table_2_over_several_nodes(started, capsys):
    status, calls = started("table2_nodes.sh", "batch_size=64", python=f'exec {sys.executable} "$@"')
    runs = [call[call.index("train.py") + 1 :] for call in calls if call[0] == "torchrun"]
    grid = open_grid("table2")
    assert status == 0 and [run[:-2] for run in runs] == [list(line.overrides) for line in grid.lines]
    for run in runs[::6]:
        composes(run, capsys)


@pytest.mark.parametrize(("ended", "requeued"), [(0, False), (140, True), (1, False)])
def test_a_job_without_submitit(started, capsys, ended, requeued):
    status, calls = started("train.sbatch", "norm=an", "arch=resnet50", srun=f"exit {ended}")
    assert status == ended and (["scontrol", "requeue", "77"] in calls) == requeued
    assert calls[0][:3] == ["srun", "--cpus-per-task=8", "python"]
    composes(calls[0][4:], capsys)
