"""Published checkpoints in the place of own runs: the row that each file of a folder is of, and its accuracy.

A file belongs to the row whose network takes every one of its tensors and needs no other, in whatever naming
they come (``anorm.load_weights``); its name does not matter. Where rows of several setups have one network,
as AOGNet has in Table 2, a word of the path below the folder names the setup: ``sota/aognet12m_an.pth``,
``aognet12m-an-vanilla.pth``.
An evaluation is kept beside the runs, in ``.published``, and is not repeated for the same file on the same images.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from anorm.build import create_source, create_task, evaluator_for
from anorm.config.frozen import Config
from anorm.data.sources import Source
from anorm.engine.state import PREDICTIONS
from anorm.files import file_digest, write_atomic
from anorm.registry import create_model
from anorm.study.grid import Grid, Line
from anorm.study.records import Images, Reading, Stamp, open_images, stamp_of
from anorm.tasks import Task
from anorm.weights import compare, read_state
from anorm.words import nearest

PUBLISHED = "published weights"
SUFFIXES = (".pth", ".pt", ".tar", ".ckpt", ".bin", ".safetensors")
RESULT = "result.json"


@dataclass(frozen=True)
class Kept:
    """An evaluation on one set under one kind of statistics: its numbers, their protocol, and the folder that keeps them."""

    folder: Path
    found: dict
    stamp: Stamp


@dataclass(frozen=True)
class Published:
    """The evaluations of a published file, by (set, statistics), where a table has the finished run of seed 0 of a row."""

    likeness: str
    kept: dict[tuple[str, str], Kept]
    seed: int = 0
    averages: bool = True  # whatever the authors chose to publish
    events: tuple[dict, ...] = ()

    @property
    def folder(self) -> Path:
        return next(iter(self.kept.values())).folder

    @property
    def final(self) -> dict:
        return next(iter(self.kept.values())).found

    def evaluations(self, reading: Reading | None = None) -> list[dict]:
        """Return nothing: a file tells no epochs."""
        return []

    def value(self, reading: Reading) -> float | None:
        kept = self._kept(reading)
        return None if kept is None or reading.metric not in kept.found else float(kept.found[reading.metric])

    def stamp(self, reading: Reading) -> Stamp | None:
        kept = self._kept(reading)
        return kept and kept.stamp

    def keeps_images(self, reading: Reading) -> bool:
        kept = self._kept(reading)
        return kept is not None and (kept.folder / f"{PREDICTIONS}.npz").is_file()

    def images(self, reading: Reading) -> Images:
        return open_images(self._kept(reading).folder / f"{PREDICTIONS}.npz")

    def _kept(self, reading: Reading) -> Kept | None:
        first_set, first_stats = next(iter(self.kept))
        return self.kept.get((reading.set or first_set, reading.stats or first_stats))


@dataclass(frozen=True)
class Match:
    """Which row a file fills; ``line`` is None for a file that fits none."""

    file: Path
    line: Line | None

    def __str__(self) -> str:
        row = f"{self.line.label} ({self.line.group})" if self.line else "fits no row of this table"
        return f"{self.file}: {row}"


def match(grid: Grid, folder: Path) -> list[Match]:
    """The row of each file of weights under ``folder``. Nothing is evaluated.

    Raises ValueError for a folder without any, a file that several rows could be of, and a row of which there
    are several.
    """
    if not folder.is_dir():
        raise ValueError(f"--weights {folder} is not a folder: give the one that holds the published files")
    files = sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"--weights {folder} holds no weights: files that end in {', '.join(SUFFIXES)}")
    lines = list({line.likeness: line for line in reversed(grid.lines)}.values())[::-1]
    networks = {
        line.likeness: _names_and_shapes(json.dumps(line.config.arch.tree()), json.dumps(line.config.norm.tree()))
        for line in lines
    }
    found: list[Match] = []
    for file in files:
        state = read_state(file)
        fitting = [line for line in lines if compare(networks[line.likeness], state)[0].complete]
        line = _of_its_setup(file, folder, fitting)
        earlier = next((m for m in found if line and m.line is line), None)
        if earlier:
            raise ValueError(
                f"{earlier.file} and {file} both are the network of {line.label} ({line.group}): leave one "
                f"of them in {folder}"
            )
        found.append(Match(file, line))
    return found


@cache
def _names_and_shapes(arch_config: str, norm_config: str) -> dict[str, torch.Tensor]:
    """The state_dict of a network for ImageNet's classes, without memory behind it."""
    arch = json.loads(arch_config)
    with torch.device("meta"):
        return create_model(arch.pop("name"), json.loads(norm_config), 1000, **arch).state_dict()


def _of_its_setup(file: Path, folder: Path, fitting: list[Line]) -> Line | None:
    """Of the rows that a file fits the one whose setup its path names; there may be but one, or none."""
    if len(fitting) < 2:
        return fitting[0] if fitting else None
    setups = {line.config.choices["setup"]: line for line in fitting}
    words = re.findall("[a-z0-9]+", str(file.relative_to(folder)).lower())
    named = [setup for setup in setups if setup in words]
    if len(named) == 1 and len(setups) == len(fitting):
        return setups[named[0]]
    rows = ", ".join(f"{line.label} ({line.group})" for line in fitting)
    raise ValueError(
        f"{file} could be of any of these rows, which have one network: {rows}. Put {' or '.join(setups)} "
        "into its name, as a word of its own, or into its folder's; or choose rows with --only"
    )


def evaluate(matches: list[Match], runs_dir: Path, readings: Sequence[Reading] = ()) -> list[Published]:
    """Evaluate each file that has a row under that row's configuration, on the sets that ``readings`` name (None: the
    first). What was evaluated before is read from ``runs_dir``.
    """
    wanted = [m for m in matches if m.line]
    return [
        _evaluate(m.file, m.line, runs_dir, readings, f"{k} of {len(wanted)}") for k, m in enumerate(wanted, 1)
    ]


def _evaluate(file: Path, line: Line, runs_dir: Path, readings: Sequence[Reading], which: str) -> Published:
    config = line.config.having(hardware={"processes": 1}).on()
    source = create_source(config)
    task = create_task(config, source.classes, len(source.mean))
    kept: dict[tuple[str, str], Kept] = {}
    for name in dict.fromkeys(reading.set or next(iter(source.evals)) for reading in readings or [Reading("")]):
        if name not in source.evals:
            raise ValueError(f"{line.label} has no evaluation set {name!r}{nearest(name, source.evals, 'sets')}")
        kept |= _on_set(file, line, runs_dir, config, source, task, name)
    found = next(iter(kept.values())).found
    print(
        f"{which}: {Match(file, line)}, {task.words(found)} of {found['images']} images "
        f"({found['seconds']:.0f} s)",
        file=sys.stderr,
        flush=True,
    )
    return Published(line.likeness, kept)


def _on_set(
    file: Path, line: Line, runs_dir: Path, config: Config, source: Source, task: Task, name: str
) -> dict[tuple[str, str], Kept]:
    """Return the evaluations on one set under each of the statistics that are asked for; first make those that are not
    there, or lack a metric of the task.
    """
    images, card, folders = source.evals[name], task.card(source), {}
    protocol = {"epoch": "published", "weights": PUBLISHED, "images_set": name}
    for stats in config.settings.eval.all_stats:
        stamp = stamp_of(config, card, len(images), **protocol, stats=stats)
        known = json.dumps([file_digest(file), line.likeness, source.identity, stamp.parts])
        digest = hashlib.blake2b(known.encode(), digest_size=8).hexdigest()
        folders[stats] = runs_dir / ".published" / digest
    if not all(set(task.metrics) <= set(_result(folder)) for folder in folders.values()):
        started = time.monotonic()
        evaluated = evaluator_for(config, source.classes, file, source)({name: images})()
        for pair, found in evaluated.items():
            folder = folders[pair.stats]
            folder.mkdir(parents=True, exist_ok=True)
            for ending, content in task.predictions(found.rows, images.identity).items():
                write_atomic(folder / f"{PREDICTIONS}{ending}", content)
            result = {
                "file": str(file),
                "row": line.label,
                **found.values,
                "images": found.images,
                "batches": found.batches,
                "seconds": time.monotonic() - started,
            }
            write_atomic(folder / RESULT, json.dumps(result, indent=1).encode())  # last: what is there is whole
    kept = {}
    for stats, folder in folders.items():
        found = _result(folder)
        stamp = stamp_of(
            config, card, found["images"], **protocol, stats=stats, batches=found.get("batches", "")
        )
        kept[name, stats] = Kept(folder, found, stamp)
    return kept


def _result(folder: Path) -> dict:
    path = folder / RESULT
    return json.loads(path.read_text()) if path.is_file() else {}
