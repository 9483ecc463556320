"""README is true: its tables are what the code says, its Python runs, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_generated_tables_are_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "readme.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize("title", ["As a library", "Put AN into another library's network"])
def test_python_runs(title, tmp_path):
    block = re.search(rf"## {title}\n.*?```python\n(.*?)```", README, re.S)[1]
    block = re.sub(r"^.*load_weights.*$\n", "", block, flags=re.M)  # names a run that does not exist yet
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_example_law_runs():
    import torch

    from anorm.norms.base import Norm

    block = re.search(r"## Add one\n.*?```python\n(.*?)```", README, re.S)[1]
    names = {}
    exec(block, names)
    law = names["NORMS"]["center"]
    assert issubclass(law, Norm)
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(law(3)(x).mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
