"""python -m anorm: the report, the build, wrong arguments."""

import subprocess
import sys

import torch
import torchvision

import anorm
from anorm.__main__ import _mismatch
from anorm.data import jpeg


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "anorm", *arguments], capture_output=True, text=True)


def test_report_says_what_is_there():
    done = run()
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.startswith("  ")}
    assert anorm.__version__ in rows["anorm"] and torch.__version__ in rows["torch"]
    assert torchvision.__version__.split("+")[0] in rows["torchvision"]
    assert "usable" in rows["reference"] and "usable" in rows["cpu"]
    assert rows["JPEG"].startswith(
        "  JPEG regions usable" if jpeg.why_not() is None else "  JPEG regions not usable"
    )
    if not torch.cuda.is_available():
        assert "none" in rows["gpu"] and "not usable: torch sees no GPU" in rows["triton"]


def test_build_leaves_usable_kernels():
    done = run("build")
    assert done.returncode == 0, done.stderr
    kernels, regions = done.stdout.splitlines()
    assert kernels == "cpu kernels: ready"
    assert (regions == "JPEG regions: ready") == (jpeg.why_not() is None)


def test_unknown_arguments_show_the_usage():
    done = run("biuld")
    assert done.returncode == 2 and "python -m anorm build" in done.stdout


def test_builds_that_do_not_match_are_named():
    words = _mismatch(RuntimeError("operator torchvision::nms does not exist\nat ..."))
    assert "torch and torchvision are of different builds" in words
