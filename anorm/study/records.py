"""Finished and unfinished runs: configuration, numbers, and the protocol that each number was taken under."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from anorm import tasks
from anorm.config.frozen import Config
from anorm.config.signature import ADDED, EXCLUDED, flatten
from anorm.engine.record import read_metrics
from anorm.engine.runfolder import CARD, CONFIG, configuration_in, signature_in
from anorm.engine.state import PREDICTIONS
from anorm.tasks import Metric, Task
from anorm.words import nearest

EPOCHS = ("last", "best")
PLAIN = "plain weights"
FIRST_SET = "val"
"""The evaluation set of events that name none: older versions had this one alone."""
STATISTICS = ("running", "batch", "recalibrated")


def task_of(config: Config) -> type[Task]:
    """Return the class of a configuration's task."""
    return tasks.find(config.task.name)


@dataclass(frozen=True)
class Reading:
    """Which of a run's numbers is read.

    metric: by its name in the task. set, stats: on which images, and under which statistics; None: the first pair that the
    run evaluated. epoch: "last" or "best". average: of the average of weights (EMA) in place of the plain ones.
    """

    metric: str
    set: str | None = None
    stats: str | None = None
    epoch: str = "last"
    average: bool = False

    @classmethod
    def of(cls, word: str, epoch: str = "last", average: bool = False) -> Reading:
        """Read METRIC, METRIC@SET, METRIC@SET/STATISTICS or METRIC@/STATISTICS."""
        metric, _, where = word.partition("@")
        images, slash, stats = where.rpartition("/")
        if slash and stats not in STATISTICS:
            images, stats = where, ""
        elif not slash:
            images, stats = where, ""
        return cls(metric, images or None, stats or None, epoch, average)

    def __str__(self) -> str:
        where = (self.set or "") + (f"/{self.stats}" if self.stats else "")
        return self.metric + (f"@{where}" if where else "")

    def heading(self, metric: Metric, latex: bool = False) -> str:
        """Return the words for a column or a sentence: "top-1", "top-1 on photo (batch statistics)"."""
        return (metric.latex if latex and metric.latex else metric.heading) + self._where

    def measured(self, metric: Metric) -> str:
        """Return what is compared, in words: "points of top-1 accuracy", "loss, lower is better"."""
        what = metric.heading + (" accuracy" if metric.as_error else "") + self._where
        what = f"points of {what}" if metric.unit == "%" else what
        return what if metric.higher_is_better else f"{what}, lower is better"

    @property
    def _where(self) -> str:
        return (f" on {self.set}" if self.set else "") + (f" ({self.stats} statistics)" if self.stats else "")

    def looks_up(self, metrics: dict[str, Metric]) -> Metric:
        """Return the metric. Raises ValueError, naming the nearest, where the task has none of this name."""
        if self.metric not in metrics:
            raise ValueError(f"--metric {self}{nearest(self.metric, metrics, 'metrics')}")
        return metrics[self.metric]


@dataclass(frozen=True)
class Stamp:
    """All that a number depends on besides the network's weights. Numbers of unlike stamps are never put together."""

    data: str
    classes: int
    images: int
    image_size: int | None
    resize: int | None
    interpolation: str | None
    decoder: str
    weights: str
    epoch: str
    statistics: str
    dtype: str
    set: str = FIRST_SET
    more: str = ""
    batches: str = ""
    """How images came together; empty for a network whose answers do not depend on it."""

    @property
    def parts(self) -> tuple:
        """All fields, but the newest only where they say something: digests over a stamp outlive versions."""
        found = astuple(self)
        return found if (self.set, self.more, self.batches) != (FIRST_SET, "", "") else found[:-3]

    def __str__(self) -> str:
        of = f"{self.data}, {self.set}," if self.set != FIRST_SET else self.data
        seen = (
            f"{self.decoder} decoder"
            if self.image_size is None
            else f"{self.image_size} px of {self.resize} ({self.interpolation}, {self.decoder})"
        )
        return (
            f"{self.images:,} images of {of} ({self.classes} classes), {seen}, "
            + (f"{self.more}, " if self.more else "")
            + f"{self.epoch} epoch, {self.weights}, {self.statistics}"
            + (f" ({self.batches})" if self.batches else "")
            + f", {self.dtype}"
        )


IN_STAMP = ("classes", "images", "sets", "image_size", "eval_resize", "interpolation")
"""What ``stamp_of`` reads from a task's card by name."""
OF_TRAINING = ("mean", "std")
"""Entries of a card that follow from the data set."""


def stamp_of(
    config: Config,
    card: dict,
    images: int,
    epoch: str,
    weights: str,
    processes: int = 1,
    images_set: str = FIRST_SET,
    stats: str | None = None,
    batches: str = "",
) -> Stamp:
    """Return the protocol of an evaluation of ``images`` images under a configuration decided for its machine.

    card: what the task's ``card`` says of the data. stats: of the evaluation; default: the first of ``eval.stats``.
    batches: how images came together, in the event's words.
    """
    settings, asked = config.settings, config.settings.eval
    stats = stats or asked.all_stats[0]
    statistics = f"{stats} statistics"
    if stats == "recalibrated":
        statistics += f" ({asked.recalibrate_batches} batches of {settings.batch_size})"
    if processes > 1:
        statistics += f" ({settings.dist.stats} over processes)"
    of_set = card.get("sets", {}).get(images_set, card.get("images"))
    identity = hashlib.blake2b(str(of_set).encode(), digest_size=3).hexdigest()
    others = {key: value for key, value in card.items() if key not in (*IN_STAMP, *OF_TRAINING)}
    return Stamp(
        data=f"{config.data.name}-{identity}",
        classes=len(card["classes"]),
        images=images,
        image_size=card.get("image_size"),
        resize=card.get("eval_resize"),
        interpolation=card.get("interpolation"),
        decoder=config.data.options.get("loader") or "torch",
        weights=weights,
        epoch=epoch,
        statistics=statistics,
        dtype=settings.hardware.dtype,
        set=images_set,
        more=", ".join(f"{key} {value}" for key, value in sorted(others.items())),
        batches=batches,
    )


def agreed(stamps: Iterable[Stamp]) -> list[Stamp]:
    """Return the stamps, each that names no batches with those of the others like it, where these are the same for all:
    the answers of its network depend on none, so that its number holds for theirs too.
    """
    stamps, named = list(stamps), {}
    for stamp in stamps:
        named.setdefault(replace(stamp, batches=""), {})[stamp.batches] = None
    found = []
    for stamp in stamps:
        others = [words for words in named[replace(stamp, batches="")] if words]
        found.append(replace(stamp, batches=others[0]) if len(others) == 1 else stamp)
    return found


def one_stamp(stamps: Iterable[Stamp]) -> Stamp:
    """The stamp that all share. Raises ValueError, naming what differs, when they do not."""
    distinct = list(dict.fromkeys(agreed(stamps)))
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
    """An evaluation image by image. data: the identity of the images. columns: what the task stored, each (N,) in the
    order of the column ``index``.
    """

    data: str
    columns: dict[str, np.ndarray]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.columns[name]

    def difference(self, other: Images) -> str:
        """Return why two evaluations are not of the same images; empty where they are."""
        if self.data != other.data:
            return f"the data sets differ, {self.data[:10]} and {other.data[:10]}"
        if not np.array_equal(self["index"], other["index"]):
            return f"{len(self['index'])} and {len(other['index'])} images, not the same ones"
        labels = [images.columns.get("label", np.empty(0)) for images in (self, other)]
        return "" if np.array_equal(*labels) else "their labels differ"


def open_images(path: Path) -> Images:
    """Return what a file of predictions holds. Raises ValueError where there is none, or one without an identity."""
    if not path.is_file():
        raise ValueError(
            f"{path.parent} has no {path.name}: only finished runs can be compared image by image"
        )
    with np.load(path) as kept:
        if "data" not in kept:
            raise ValueError(
                f"{path} does not say which images it is of: an older version wrote it, train "
                "again (resume=never)"
            )
        order = np.argsort(kept["index"], kind="stable")
        return Images(str(kept["data"]), {name: kept[name][order] for name in kept.files if name != "data"})


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

    @property
    def task(self) -> type[Task]:
        return task_of(self.config)

    def evaluations(self, reading: Reading | None = None) -> list[dict]:
        """Return the eval events of the pair of set and statistics that is read; of the first pair without a reading."""
        found = [e for e in self.events if e["event"] == "eval"]
        if not found:
            return []
        first = _pair(found[0])
        wanted = (reading and reading.set or first[0], reading and reading.stats or first[1])
        return [e for e in found if _pair(e) == wanted]

    @property
    def pairs(self) -> list[tuple[str, str | None]]:
        """(set, statistics) of every evaluation, in order."""
        return list(dict.fromkeys(_pair(e) for e in self.events if e["event"] == "eval"))

    @property
    def averages(self) -> bool:
        """Whether the run also evaluated an average of its weights (EMA)."""
        return self.config.settings.ema.decay > 0

    def result(self, reading: Reading) -> dict | None:
        """Return the eval event that holds the number, of a finished run; None where it evaluated nothing of the kind."""
        assert self.final is not None
        wanted = self.final["best_epoch"] if reading.epoch == "best" else self.config.settings.epochs
        return next((e for e in reversed(self.evaluations(reading)) if e["epoch"] == wanted), None)

    def value(self, reading: Reading) -> float | None:
        """Return the number; None where the run has none. A value that is no finite number is written as a word."""
        found = self.result(reading)
        value = found and found.get(f"ema_{reading.metric}" if reading.average else reading.metric)
        return None if value is None else float(value)

    def stamp(self, reading: Reading) -> Stamp | None:
        """Return the protocol of ``result``; None where there is none."""
        found = self.result(reading)
        if found is None:
            return None
        card = json.loads((self.folder / CARD).read_text())
        decay = self.config.settings.ema.decay
        weights = f"average of weights (decay {decay:g})" if reading.average else PLAIN
        return stamp_of(
            self.config,
            card,
            found["images"],
            reading.epoch,
            weights,
            self.processes,
            *_pair(found),
            self._batches(found),
        )

    def _batches(self, event: dict) -> str:
        """Return how an evaluation's images came together, where that matters; older versions took them in the order of
        the data set, and did not say so.
        """
        if "set" not in event and event.get("stats") == "batch":
            return f"batches of {self.config.settings.eval.batch_size or self.config.settings.batch_size}"
        return event.get("batches", "")

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
    def machine(self) -> str:
        """What the run ran on, in words; a speed means something only beside it."""
        start = next(e for e in reversed(self.events) if e["event"] == "start")
        of = start["environment"]
        what = ", ".join(dict.fromkeys(of["devices"])) or of.get("processor") or of["machine"]
        count = self.processes if of["devices"] else of["processor_threads"]
        return f"{count} x {what}" if of["devices"] else f"{what}, {count} threads"

    @property
    def device_hours(self) -> float:
        """Hours times processes: GPU-hours where it ran on GPUs."""
        return self.final["seconds"] * self.processes / 3600

    def images(self, reading: Reading) -> Images:
        """Return what the last weights made of each image. Raises ValueError where the run kept nothing of the kind."""
        if reading.epoch != "last":
            raise ValueError("only of the last epoch it is kept what the weights made of each image")
        return open_images(self.folder / self._predictions(reading))

    def keeps_images(self, reading: Reading) -> bool:
        """Return whether the run kept what its weights made of each image."""
        return reading.epoch == "last" and (self.folder / self._predictions(reading)).is_file()

    def _predictions(self, reading: Reading) -> str:
        """Return the name of the file; the engine names it after the pair unless that is the first."""
        name = PREDICTIONS + ("_ema" if reading.average else "")
        found = self.result(reading)
        if found is not None and _pair(found) != self.pairs[0]:
            name += "-{}-{}".format(*_pair(found)).replace("/", "_")
        return f"{name}.npz"


def _pair(event: dict) -> tuple[str, str | None]:
    return event.get("set", FIRST_SET), event.get("stats")


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


def images_of(runs: Sequence[Run], reading: Reading) -> list[Images]:
    """Return for each run what it made of each image. Raises ValueError where the images are not the same."""
    found = [run.images(reading) for run in runs]
    for run, images in zip(runs, found, strict=True):
        if differs := found[0].difference(images):
            raise ValueError(
                f"{runs[0].folder} and {run.folder} were not evaluated on the same images "
                f"({differs}), so they cannot be compared image by image: use one data set"
            )
    return found
