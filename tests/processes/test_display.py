"""Runs whose output nobody can take any more."""

import os
import subprocess
import sys

import pytest
from commands import ROOT, SMALL, environment, events

from anorm.engine.record import final_metrics
from anorm.processes.display import lasting_output, lost_output

TWO = ["batch_size=4", "hardware.processes=2"]


def run_into(stdout, folder, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *SMALL, *arguments, f"run_dir={folder}"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        timeout=300,
    )


@pytest.mark.parametrize("arguments", [[], TWO], ids=["one process", "two processes"])
def test_a_reader_that_leaves_costs_one_warning(tmp_path, arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = run_into(writer, tmp_path / "run", *arguments)
    os.close(writer)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    [warning] = events(tmp_path / "run", "warning")
    assert "Broken pipe" in warning["message"]
    assert final_metrics(tmp_path / "run")["top1"] > 0


def test_a_full_disk_behind_the_log_costs_one_warning(tmp_path):
    with open("/dev/full", "w") as full:
        done = run_into(full, tmp_path / "run")
    assert (done.returncode, done.stderr) == (0, "")
    [warning] = events(tmp_path / "run", "warning")
    assert "No space left" in warning["message"] and final_metrics(tmp_path / "run")


def test_a_closed_terminal_costs_one_warning(tmp_path):
    """As after `disown`: the terminal is gone, and writing to it is an input/output error."""
    ours, theirs = os.openpty()
    os.close(ours)
    done = run_into(theirs, tmp_path / "run")
    os.close(theirs)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert len(events(tmp_path / "run", "warning")) == 1 and final_metrics(tmp_path / "run")


def test_only_writing_is_forgiven(capfd):
    with lasting_output():
        print("a line")
        assert lost_output() is None
        with pytest.raises(OSError, match="its own"):
            raise OSError("its own")
    assert capfd.readouterr().out == "a line\n"
