"""Adding a norm, an architecture, a data source, a task or a table touches its own files alone, and a metric one file.

One of each is added to a copy of the tree; the suite's tests that list what exists are run over the copy, and a run is
trained, tabled and judged with all six.
"""

import shutil
import subprocess
import sys

import pytest
from commands import ROOT, environment

ADDED = {
    "anorm/norms/center.py": '''
"""Centring alone (an example)."""

from anorm.algebra import Affine, Moments, pool_batch
from anorm.norms.base import Norm


class Center(Norm):
    """y = x - mu_c, mu over (N, H, W)."""

    def law(self, moments: Moments) -> Affine:
        mean = pool_batch(moments).mean
        return Affine(mean, mean.new_ones(mean.shape), mean.new_zeros(mean.shape))


NORMS = {"center": Center}
''',
    "configs/norm/center.yaml": "# Subtracts each channel's mean.\nname: center\n",
    "anorm/archs/plain.py": '''
"""Two convolutions (an example)."""

from torch import Tensor, nn

from anorm.archs.base import FeatureInfo, MakeNorm, he_init
from anorm.norms.base import Site


class Plain(nn.Module):
    """Two 3x3 convolutions with a norm each, and a classifier."""

    def __init__(self, norm: MakeNorm, num_classes: int = 1000, in_channels: int = 3, width: int = 8):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, 2, 1, bias=False)
        self.bn1 = norm(Site(width, stage=0, stages=1, role="spatial", block_norm=1, act="relu"))
        self.conv2 = nn.Conv2d(width, width, 3, 2, 1, bias=False)
        self.bn2 = norm(
            Site(width, stage=0, stages=1, role="spatial", block_norm=2, focus=True, last=True, act="relu")
        )
        self.fc = nn.Linear(width, num_classes)
        self.feature_info = {"layer1": FeatureInfo(width, 4)}
        he_init(self)

    def forward_stages(self, x: Tensor) -> dict[str, Tensor]:
        return {"layer1": self.bn2(self.conv2(self.bn1(self.conv1(x))))}

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_stages(x)["layer1"].mean((2, 3)))


ARCHS = {"plain": Plain}
''',
    "configs/arch/plain.yaml": "# Two convolutions.\nname: plain\nwidth: 8\n",
    "anorm/data/sources/flat.py": '''
"""Images of one colour (an example)."""

import torch

from anorm.data.sources.base import FetchedImages, LabelledImages, Source


class Flat(LabelledImages):
    """Image i has the colour of its class."""

    in_memory, mean, std = True, (0.5,) * 3, (0.5,) * 3

    def __init__(self, count: int, classes: int):
        self.labels, self.image_size = torch.arange(count) % classes, 16
        self.shade = 200 // classes
        self.identity = f"flat-{count}-{classes}"

    def fetch(self, indices, rngs):
        index = torch.as_tensor(indices, dtype=torch.int64)
        shade = (20 + self.shade * self.labels[index]).to(torch.uint8)
        images = shade.view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
        return FetchedImages(images, self.labels[index], index, [])


def flat(train_images: int = 64, val_images: int = 20, num_classes: int = 4) -> Source:
    """One colour a class."""
    sets = {"val": Flat(val_images, num_classes)}
    names = [f"shade {k}" for k in range(num_classes)]
    return Source(Flat(train_images, num_classes), sets, names, f"flat-{train_images}-{val_images}-{num_classes}")


SOURCES = {"flat": flat}
''',
    "configs/data/flat.yaml": "# One colour a class.\nname: flat\n",
    "anorm/tasks/halved.py": '''
"""Classification with half the loss (an example)."""

from anorm.tasks.classification import Classification


class Halved(Classification):
    """Half the cross-entropy."""

    def loss(self, outputs, target):
        return {name: value / 2 for name, value in super().loss(outputs, target).items()}


TASKS = {"halved": Halved}
''',
    "configs/task/halved.yaml": "# Half the cross-entropy.\nname: halved\n",
    "configs/table/example.yaml": """\
title: An example
source: Nobody, 2026
section: "1"
metrics: [wrong, top1]
groups:
  - title: Shades
    overrides: [arch=plain, data=flat, task=halved, batch_size=8, optim.global_batch=16, epochs=2,
                schedule.warmup_epochs=0, log.tensorboard=false]
    rows:
      - {label: Plain-BN, overrides: [norm=bn], params: 0.00M, flops: 0.00G, wrong: 50.0, top1: 20.0}
      - {label: Plain-Center, overrides: [norm=center], params: 0.00M, flops: 0.00G, wrong: 50.0, top1: 20.0}
""",
}
METRIC = "anorm/tasks/classification.py"  # the one existing file that is edited, for the metric
LISTING = [
    "tests/test_imports.py",
    "tests/test_readme.py::test_generated_tables_are_up_to_date",
    "tests/test_configs.py",
    "tests/archs/test_arch_configs.py",
    "tests/study/test_table.py::test_every_grid_composes",
    "tests/norms/test_laws.py::test_every_parameter_states_its_needs",
    "tests/inside/test_look_inside.py::test_on_every_law",
    "tests/test_sizes.py::test_lists_and_configs_agree",
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The tree with one more of each."""
    tree = tmp_path_factory.mktemp("copy")
    for name in ("anorm", "configs", "scripts", "tests", "tools", "benchmarks", "results", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    for name, text in ADDED.items():
        assert not (tree / name).exists(), name
        (tree / name).write_text(text.lstrip("\n"))
    file = tree / METRIC
    text = file.read_text()
    for old, new in (
        ('    shown = ("top1"', '    metrics["wrong"] = Metric("wrong", higher_is_better=False)\n    shown = ("top1"'),
        ('"ece": 100 *', '"wrong": 100 - 100 * first / images,\n            "ece": 100 *'),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file.write_text(text)
    return tree


def python(tree, *arguments):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=tree, capture_output=True, text=True,
        env=environment(PYTHONPATH=str(tree)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_suite_lists_what_was_added(copy):
    python(copy, "scripts/readme.py")
    readme = (copy / "README.md").read_text()
    assert "| `center` | y = x - mu_c, mu over (N, H, W) |" in readme and "| `plain` | " in readme
    words = "center or plain or flat or halved or example or imports or agree or generated or same"
    out = python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *LISTING, "-k", words)
    assert " passed" in out and "failed" not in out
    listed = python(copy, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *LISTING)
    for name in ("norm-center", "arch-plain", "data-flat", "task-halved", "example"):
        assert name in listed, name


@pytest.mark.slow
def test_all_six_are_trained_tabled_and_judged(copy):
    arguments = ["tools/table.py", "example", "--runs", "runs", "--seeds", "1", "hardware=cpu", "hardware.threads=1"]
    shown = python(copy, *arguments, "--run")
    assert "2 finished, 0 failed" in shown
    rows = {line.split()[0]: line for line in shown.splitlines() if line.startswith("Plain-")}
    assert set(rows) == {"Plain-BN", "Plain-Center"}
    assert "printed wrong" in shown and "ours wrong" in shown and "wrong in percent; top-1 as error" in shown
    runs = sorted(path.parent for path in (copy / "runs").glob("*/config.yaml"))
    said = python(copy, "tools/judge.py", *runs, "--metric", "wrong")
    assert "points of wrong, lower is better" in said and "over seeds alone" in said
