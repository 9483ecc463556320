"""The wheel holds what the library needs: layers, networks, weights and kernels work outside of a checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "clone")], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run([*build, str(folder / "clone")], check=True, capture_output=True, cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


def test_what_it_holds(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-tree", "-r", "--name-only", "HEAD", "anorm"], capture_output=True, text=True, check=True, cwd=ROOT)
    missing = set(tracked.stdout.split()) - names
    assert not missing  # sources of kernels, templates and py.typed as well as modules
    assert not [name for name in names if not name.startswith(("anorm/", "anorm-"))]
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata and "\nRequires-Dist: torch" in metadata
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_works_outside_of_the_checkout(wheel, tmp_path):
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)  # what installing a pure wheel does
    code = """if True:
        import anorm, torch
        assert anorm.__file__.startswith(TARGET), anorm.__file__
        layer = anorm.create_norm("an", 64, act="relu")
        x = torch.randn(2, 64, 8, 8, requires_grad=True)
        layer(x).sum().backward()
        model = anorm.create_model("resnet18", norm="an", num_classes=10)
        torch.save(model.state_dict(), "weights.pth")
        anorm.load_weights(anorm.create_model("resnet18", norm="an", num_classes=10), "weights.pth")
        other = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        print(anorm.convert(other, norm="an", where="all"))
    """.replace("TARGET", repr(str(target)))
    environment = os.environ | {"PYTHONPATH": str(target), "ANORM_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "cache").glob("*.so"))
