"""Runs triton_cases.py in a process of its own: whether kernels are interpreted is fixed when Triton is imported."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


def run_cases(environment):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--no-header",
        str(CASES),
    ]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=CASES.parents[2], check=False
    )
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"


def release(package):
    return tuple(int(part) for part in version(package).split(".")[:2])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter():
    """Without a GPU too: the kernels' mathematics, though not their speed nor what a GPU's rounding does."""
    if release("triton") < (3, 7) and release("numpy") >= (2, 4):
        pytest.skip(
            f"the interpreter of Triton {version('triton')} needs numpy < 2.4 (run-time bounds of a loop)"
        )
    run_cases({**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_the_gpu():
    run_cases({name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})


def test_says_why_it_cannot_run():
    """Without a GPU and without the interpreter the backend gives a reason, and asking for it by name an error."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code = (
        "import pytest; from anorm import ops; from anorm.ops import triton\n"
        "assert 'GPU' in triton.available() or 'Triton' in triton.available()\n"
        "with pytest.raises(RuntimeError, match='cannot be used here'): ops.set_backend('triton')\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
