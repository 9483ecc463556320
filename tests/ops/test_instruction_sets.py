"""Runs the numeric tests of ops and norms for every instruction set of this processor narrower than its widest.

The ordinary run takes the widest. A limit that holds for one set by luck fails here for another, as it would on a
processor that has no wider one; torch's own kernels, which the limits are measured by, are narrowed as well.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anorm.ops import cpu

ROOT = Path(__file__).parents[2]
TORCHS = {"baseline": "default", "avx2": "avx2"}
# what no kernel's instruction set changes: builds, torch.compile, and derivatives that run in float64 throughout
OTHER = "build or library or compiles or gradcheck or gradients_of_gradients"

if cpu.available() is not None:
    pytest.skip(cpu.available(), allow_module_level=True)


@pytest.mark.slow
@pytest.mark.parametrize("isa", list(TORCHS))
def test_the_numbers_hold(isa):
    sets = [*TORCHS, "avx512"]
    if sets.index(isa) >= sets.index(cpu.instruction_set()):
        pytest.skip(f"the ordinary run uses {cpu.instruction_set()}")
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider --no-header -k".split()
    files = ["tests/ops/test_cpu.py", "tests/ops/test_running_laws.py", "tests/ops/test_normalize.py", "tests/norms"]
    narrowed = {"ANORM_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": TORCHS[isa], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"not ({OTHER})", *files],
        cwd=ROOT, env={**os.environ, **narrowed}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 500  # no file was renamed away
