"""Threads of torch's OpenMP runtime sleep while they wait, in every process of ours, unless the user says otherwise."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, SMALL

from anorm.openmp import SLEEP

PROGRAMS = [ROOT / "train.py", *sorted((ROOT / "tools").glob("*.py"))]
SHOWN = "GOMP_SPINCOUNT = '0'"  # what GNU's runtime says it understood, once a process

if "libgomp" not in Path("/proc/self/maps").read_text():
    pytest.skip("this torch has another OpenMP runtime", allow_module_level=True)


def run(*command, **environment):
    """What a process and its children say about their OpenMP, and what it printed."""
    clean = {k: v for k, v in os.environ.items() if k not in (*SLEEP, "OMP_WAIT_POLICY")}
    clean |= {"OMP_DISPLAY_ENV": "verbose", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run([sys.executable, *command], env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr, done.stdout


def test_the_runtime_reads_it():
    said, _ = run("-c", "import anorm")
    assert SHOWN in said


@pytest.mark.parametrize("choice", [{"GOMP_SPINCOUNT": "1000"}, {"OMP_WAIT_POLICY": "active"}, {"KMP_BLOCKTIME": "9"}])
def test_the_users_word_stands(choice):
    said, printed = run("-c", f"import os, anorm; print([os.environ.get(n) for n in {sorted(SLEEP)}])", **choice)
    assert SHOWN not in said
    assert printed.strip() == str([choice.get(name) for name in sorted(SLEEP)])


def test_nothing_is_set_where_it_comes_too_late():
    _, printed = run("-c", "import torch, os, anorm; print([n for n in " + repr(sorted(SLEEP)) + " if n in os.environ])")
    assert printed.strip() == "[]"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_every_program_imports_anorm_before_anything_else_could_import_torch(program):
    for node in ast.parse(program.read_text()).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            roots = [name.split(".")[0] for name in names]
            if roots[0] == "anorm":
                return
            assert set(roots) <= sys.stdlib_module_names, f"{program.name} imports {roots} before anorm"


def test_it_reaches_the_ranks(tmp_path):
    """The parent and its two ranks load a runtime each; workers are forks of a rank."""
    small = [*SMALL, f"run_dir={tmp_path}/run", "epochs=1", "hardware.processes=2"]
    said, _ = run(str(ROOT / "train.py"), *small)
    assert said.count("OPENMP DISPLAY ENVIRONMENT BEGIN") == said.count(SHOWN) >= 3
