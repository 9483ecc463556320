"""Finished and unfinished runs as the tools see them: configuration, results, and the protocol that results were taken under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml

from anorm.build import CARD, complete
from anorm.engine.record import read_metrics
from anorm.engine.runfolder import CONFIG, thaw
from anorm.engine.signature import EXCLUDED, flatten

EPOCHS = ("last", "best")


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
        return (f"{self.images:,} images of {self.data} ({self.classes} classes), {self.image_size} px of {self.resize} "
                f"({self.interpolation}, {self.decoder}), {self.epoch} epoch, {self.weights}, {self.statistics}, {self.dtype}")


def one_stamp(stamps: Iterable[Stamp]) -> Stamp:
    """The stamp that all share. Raises ValueError, naming what differs, when they do not."""
    distinct = list(dict.fromkeys(stamps))
    if not distinct:
        raise ValueError("there are no results")
    for other in distinct[1:]:
        unlike = [f"{f.name}: {getattr(distinct[0], f.name)} and {getattr(other, f.name)}" for f in fields(Stamp)
                  if getattr(distinct[0], f.name) != getattr(other, f.name)]
        raise ValueError(f"these results were taken under unlike protocols ({'; '.join(unlike)}) and cannot be put together")
    return distinct[0]


@dataclass(frozen=True)
class Run:
    """A run folder. config: complete and resolved."""

    folder: Path
    config: dict
    choices: dict[str, str]
    signature: str

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
        return self.config["seed"]

    def evaluations(self) -> list[dict]:
        return [e for e in self.events if e["event"] == "eval"]

    def result(self, epoch: str = "last") -> dict:
        """The eval event of the last or the best epoch: top1, top5 in percent. Only of a finished run."""
        assert self.final is not None
        wanted = self.final["best_epoch"] if epoch == "best" else self.config["epochs"]
        return next(e for e in reversed(self.evaluations()) if e["epoch"] == wanted)

    def stamp(self, epoch: str = "last") -> Stamp:
        """The protocol of ``result(epoch)``."""
        config, card = self.config, json.loads((self.folder / CARD).read_text())
        statistics = f"{config['eval']['stats']} statistics"
        if self.processes > 1:
            statistics += f" ({config['dist']['stats']} over processes)"
        names = hashlib.blake2b(json.dumps(card["classes"]).encode(), digest_size=3).hexdigest()
        return Stamp(
            data=f"{config['data']['name']}-{names}", classes=len(card["classes"]), images=self.result(epoch)["images"],
            image_size=card["image_size"], resize=card["eval_resize"], interpolation=card["interpolation"],
            decoder=config["data"].get("loader") or "torch", weights="plain weights", epoch=epoch, statistics=statistics,
            dtype=config["hardware"]["dtype"])

    @property
    def processes(self) -> int:
        return self.config["hardware"]["processes"]

    @property
    def on_gpu(self) -> bool:
        return self.config["hardware"]["device"] == "gpu"

    @property
    def images_per_second(self) -> float:
        return self.final["images_per_second"]

    @property
    def device_hours(self) -> float:
        """Hours times processes: GPU-hours where it ran on GPUs."""
        return self.final["seconds"] * self.processes / 3600

    def correct(self) -> tuple[np.ndarray, np.ndarray]:
        """(index, right) of the last weights, image by image in the order of index."""
        path = self.folder / "predictions.npz"
        if not path.is_file():
            raise ValueError(f"{self.folder} has no predictions.npz: only finished runs can be compared image by image")
        with np.load(path) as kept:
            order = np.argsort(kept["index"], kind="stable")
            return kept["index"][order], kept["top1"][order]


def open_run(folder: Path) -> Run:
    """The run in a folder. Raises ValueError where there is none."""
    config, choices = thaw(folder)
    signature = yaml.safe_load((folder / CONFIG).read_text()).get("signature", "")
    return Run(folder, complete(config), choices, signature)


def find_runs(folder: Path) -> list[Run]:
    """The runs in the folders of ``folder``; such as this version cannot read any more are left out."""
    found = []
    for path in sorted(folder.glob(f"*/{CONFIG}")):
        try:
            found.append(open_run(path.parent))
        except ValueError:
            continue  # a key that no longer exists: its numbers are of another program
    return found


def likeness(config: dict) -> str:
    """A digest of what a complete configuration asks for, whatever the seed and the machine.

    It differs from a run's signature in what a machine without the data cannot know (the data's identity) and in what
    belongs to the stamp (seed aside, hardware.dtype).
    """
    flat = flatten(config)
    kept = {key: value for key, value in flat.items() if key != "seed" and not key.startswith("hardware.")
            and not any(key == word or key.startswith(word + ".") for word in EXCLUDED if word != "weights")}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=5).hexdigest()


def images_of(runs: list[Run]) -> np.ndarray:
    """bool (runs, N): for each run and image whether it was right. Raises ValueError where the images are not the same."""
    parts = [run.correct() for run in runs]
    if any(not np.array_equal(index, parts[0][0]) for index, _ in parts):
        raise ValueError("the runs were not evaluated on the same images")
    return np.stack([right for _, right in parts])
