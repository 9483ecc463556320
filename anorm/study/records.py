"""Finished and unfinished runs as the tools see them: configuration, results, and the protocol that results were taken under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from anorm.config.frozen import Config
from anorm.config.signature import ADDED, EXCLUDED, flatten
from anorm.engine.record import read_metrics
from anorm.engine.runfolder import CARD, CONFIG, configuration_in, signature_in
from anorm.engine.state import PREDICTIONS

EPOCHS = ("last", "best")
PLAIN = "plain weights"


@dataclass(frozen=True)
class Stamp:
    """All that a number depends on besides the network's weights. Numbers of unlike stamps are never put together."""

    data: str
    classes: int
    images: int
    image_size: int
    resize: int
    interpolation: str
    decoder: str
    weights: str
    epoch: str
    statistics: str
    dtype: str

    def __str__(self) -> str:
        return (
            f"{self.images:,} images of {self.data} ({self.classes} classes), {self.image_size} px of {self.resize} "
            f"({self.interpolation}, {self.decoder}), {self.epoch} epoch, {self.weights}, {self.statistics}, {self.dtype}"
        )


def stamp_of(config: Config, card: dict, images: int, epoch: str, weights: str, processes: int = 1) -> Stamp:
    """The protocol of an evaluation of ``images`` images under a configuration decided for its machine.

    card: what ``runfolder.data_card`` says of the data.
    """
    settings, asked = config.settings, config.settings.eval
    statistics = f"{asked.all_stats[0]} statistics"
    if asked.all_stats[0] == "batch":
        statistics += f" (batches of {asked.batch_size or settings.batch_size})"
    if asked.all_stats[0] == "recalibrated":
        statistics += f" ({asked.recalibrate_batches} batches of {settings.batch_size})"
    if processes > 1:
        statistics += f" ({settings.dist.stats} over processes)"
    identity = hashlib.blake2b(str(card.get("images")).encode(), digest_size=3).hexdigest()
    return Stamp(
        data=f"{config.data.name}-{identity}",
        classes=len(card["classes"]),
        images=images,
        image_size=card["image_size"],
        resize=card["eval_resize"],
        interpolation=card["interpolation"],
        decoder=config.data.options.get("loader") or "torch",
        weights=weights,
        epoch=epoch,
        statistics=statistics,
        dtype=settings.hardware.dtype,
    )


def one_stamp(stamps: Iterable[Stamp]) -> Stamp:
    """The stamp that all share. Raises ValueError, naming what differs, when they do not."""
    distinct = list(dict.fromkeys(stamps))
    if not distinct:
        raise ValueError("there are no results")
    for other in distinct[1:]:
        unlike = [
            f"{f.name}: {getattr(distinct[0], f.name)} and {getattr(other, f.name)}"
            for f in fields(Stamp)
            if getattr(distinct[0], f.name) != getattr(other, f.name)
        ]
        raise ValueError(
            f"these results were taken under unlike protocols ({'; '.join(unlike)}) and cannot be put together"
        )
    return distinct[0]


@dataclass(frozen=True)
class Images:
    """An evaluation image by image, each array (N,) in the order of index: label and predicted are classes,
    right says whether they are one, confidence is the probability of the predicted class. data: the identity
    of the images.
    """

    data: str
    index: np.ndarray
    label: np.ndarray
    predicted: np.ndarray
    right: np.ndarray
    confidence: np.ndarray

    def difference(self, other: Images) -> str:
        """Why two evaluations are not of the same images; empty where they are."""
        if self.data != other.data:
            return f"the data sets differ, {self.data[:10]} and {other.data[:10]}"
        if not np.array_equal(self.index, other.index):
            return f"{len(self.index)} and {len(other.index)} images, not the same ones"
        return "" if np.array_equal(self.label, other.label) else "their labels differ"


def open_images(folder: Path) -> Images:
    """What a folder holds of its final evaluation. Raises ValueError where that is nothing, or not of now."""
    path = folder / f"{PREDICTIONS}.npz"
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}: only finished runs can be compared image by image")
    with np.load(path) as kept:
        if "data" not in kept or "label" not in kept:
            raise ValueError(
                f"{path} does not say which images it is of: an older version wrote it, train "
                "again (resume=never)"
            )
        order = np.argsort(kept["index"], kind="stable")
        columns = (kept[name][order] for name in ("index", "label", "predicted", "top1", "confidence"))
        return Images(str(kept["data"]), *columns)


@dataclass(frozen=True)
class Run:
    """A run folder."""

    folder: Path
    config: Config
    signature: str

    @property
    def choices(self) -> dict[str, str]:
        """Group -> what was chosen."""
        return self.config.choices

    @cached_property
    def events(self) -> list[dict]:
        return read_metrics(self.folder)

    @property
    def final(self) -> dict | None:
        """The final event of a finished run."""
        return self.events[-1] if self.events and self.events[-1]["event"] == "final" else None

    @cached_property
    def likeness(self) -> str:
        return likeness(self.config)

    @property
    def seed(self) -> int:
        return self.config.settings.seed

    def evaluations(self) -> list[dict]:
        return [e for e in self.events if e["event"] == "eval"]

    @property
    def averages(self) -> bool:
        """Whether the run also evaluated an average of its weights (EMA)."""
        return self.config.settings.ema.decay > 0

    def result(self, epoch: str = "last", average: bool = False) -> dict:
        """The eval event of the last or the best epoch (of the plain weights): top1, top5 in percent, of the
        plain weights or of their average. Only of a finished run."""
        assert self.final is not None
        wanted = self.final["best_epoch"] if epoch == "best" else self.config.settings.epochs
        found = next(e for e in reversed(self.evaluations()) if e["epoch"] == wanted)
        return found | {key: found[f"ema_{key}"] for key in ("top1", "top5")} if average else found

    def stamp(self, epoch: str = "last", average: bool = False) -> Stamp:
        """The protocol of ``result``."""
        card = json.loads((self.folder / CARD).read_text())
        decay = self.config.settings.ema.decay
        weights = f"average of weights (decay {decay:g})" if average else PLAIN
        return stamp_of(self.config, card, self.result(epoch)["images"], epoch, weights, self.processes)

    @property
    def processes(self) -> int:
        return self.config.settings.hardware.processes

    @property
    def on_gpu(self) -> bool:
        return self.config.settings.hardware.device == "gpu"

    @property
    def images_per_second(self) -> float:
        return self.final["images_per_second"]

    @property
    def device_hours(self) -> float:
        """Hours times processes: GPU-hours where it ran on GPUs."""
        return self.final["seconds"] * self.processes / 3600

    @cached_property
    def images(self) -> Images:
        """What the last weights made of each image."""
        return open_images(self.folder)


def open_run(folder: Path) -> Run:
    """The run in a folder. Raises ValueError where there is none."""
    return Run(folder, configuration_in(folder), signature_in(folder))


def find_runs(folder: Path) -> list[Run]:
    """The runs in the folders of ``folder``; such as this version cannot read any more are left out."""
    found = []
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        try:
            found.append(open_run(path.parent))
        except ValueError:
            continue  # a key that no longer exists: its numbers are of another program
    return found


def likeness(config: Config) -> str:
    """A digest of what a configuration asks for, whatever the seed and the machine.

    It differs from a run's signature in what a machine without the data cannot know (the data's identity) and in what
    belongs to the stamp (seed aside, hardware.dtype).
    """
    flat = flatten(config.tree())
    kept = {
        key: value
        for key, value in flat.items()
        if key != "seed"
        and (key, value) not in ADDED.items()
        and not key.startswith("hardware.")
        and not any(key == word or key.startswith(word + ".") for word in EXCLUDED if word != "weights")
    }
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=5).hexdigest()


def images_of(runs: list[Run]) -> np.ndarray:
    """bool (runs, N): for each run and image whether it was right. Raises ValueError where the images are not the same."""
    first = runs[0].images
    for run in runs[1:]:
        if differs := first.difference(run.images):
            raise ValueError(
                f"{runs[0].folder} and {run.folder} were not evaluated on the same images "
                f"({differs}), so they cannot be compared image by image: use one data set"
            )
    return np.stack([run.images.right for run in runs])
