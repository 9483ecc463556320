"""A run opened for looking at: its network, its images, its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from anorm.build import create_source, evaluator
from anorm.config.frozen import Config
from anorm.data.loaders import EvalLoader, TrainLoader
from anorm.data.sources.base import FetchedImages, LabelledImages, Source
from anorm.engine.evaluate import Evaluator, Result, evaluate
from anorm.engine.runfolder import configuration_in, last_weights
from anorm.engine.statistics import statistics_from, uses_batch_statistics
from anorm.words import nearest

__all__ = ["ImageSubset", "Subject", "chosen_classes", "of_classes", "open_subject", "spread_out"]


@dataclass
class Subject:
    """A run's network in evaluation mode, with its last weights, on this machine's device.

    norm: as it was chosen; config: decided for one process here.
    """

    norm: str
    folder: Path
    config: Config
    source: Source
    evaluator: Evaluator

    @property
    def model(self) -> nn.Module:
        return self.evaluator.model

    @property
    def device(self) -> torch.device:
        return self.evaluator.world.device

    def batches(self, dataset: LabelledImages, indices: Sequence[int]) -> EvalLoader:
        """These images of one of ``source``'s data sets, cropped as in evaluation."""
        settings = self.config.settings
        size, layout = settings.eval.batch_size or settings.batch_size, settings.hardware.channels_last
        return EvalLoader(ImageSubset(dataset, indices), size, device=self.device, channels_last=layout)

    def evaluate(self, batches: EvalLoader) -> Result:
        own = self.evaluator
        if uses_batch_statistics(self.model):
            batches = batches.together(own.batches)  # images of many classes in each, as the run evaluates itself
        return evaluate(own.task, self.model, batches, own.world, own.autocast)

    @cached_property
    def train(self) -> TrainLoader:
        """The training images in the run's batches. Raises ValueError where they are not at hand."""
        settings, hardware = self.config.settings, self.config.settings.hardware
        return TrainLoader(
            self.source,
            settings.seed,
            settings.optim.global_batch,
            settings.batch_size,
            workers=hardware.workers,
            device=self.device,
            channels_last=hardware.channels_last,
        )

    def close(self) -> None:
        """End the workers."""
        for loader in (self.__dict__.get("train"), self.evaluator.train):
            if loader is not None:
                loader.close()
        self.evaluator.close()

    @contextmanager
    def as_evaluated(self) -> Iterator[Subject]:
        """Within: statistics as the run's evaluation takes them (eval.stats)."""
        self.model.eval()
        own = self.evaluator
        with statistics_from(self.model, own.pairs[0].stats, lambda: own.recalibrate(self.model)):
            yield self


def open_subject(folder: Path, overrides: Sequence[str] = (), weights: Path | None = None) -> Subject:
    """The run in a folder; ``overrides`` are train.py's arguments. Raises ValueError where there is none."""
    config = configuration_in(folder).having(hardware={"processes": 1}).change(list(overrides)).on()
    source, found = create_source(config), evaluator(config, weights or last_weights(folder))
    found.model.eval().requires_grad_(True)
    return Subject(config.choices["norm"], folder.resolve(), config, source, found)


class ImageSubset(LabelledImages):
    """Some images of a data set, in the order of ``indices``; read by torch whatever the data set's loader."""

    def __init__(self, whole: LabelledImages, indices: Sequence[int]):
        self.whole, self.indices = whole, torch.as_tensor(indices, dtype=torch.int64)
        self.labels, self.image_size = whole.labels[self.indices], whole.image_size
        self.mean, self.std, self.in_memory = whole.mean, whole.std, whole.in_memory
        self.identity = f"{len(self.indices)} images of {whole.identity}"

    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> FetchedImages:
        return self.whole.fetch(self.indices[torch.as_tensor(indices)].tolist(), rngs)


def spread_out(count: int, wanted: int) -> list[int]:
    """``wanted`` indices of ``count`` (all when there are fewer, or 0 are wanted), at even distances."""
    if not 0 < wanted < count:
        return list(range(count))
    return [i * count // wanted for i in range(wanted)]


def of_classes(labels: Tensor, classes: Sequence[int], each: int) -> list[int]:
    """Indices of the first ``each`` images of every class."""
    return [int(i) for k in classes for i in (labels == k).nonzero().flatten()[:each]]


def chosen_classes(source: Source, asked: str | None, default: int = 4) -> list[int]:
    """Numbers of the classes that a comma-separated list names, by name or number; without one, ``default``
    classes at even distances. Raises ValueError for one that there is not, or that has no image.
    """
    names = [str(name) for name in source.classes]
    present = set(source.val.labels.tolist())
    if asked is None:
        known = sorted(present)
        return [known[i] for i in spread_out(len(known), default)]
    found = []
    for word in (word.strip() for word in asked.split(",")):
        if word in names:
            number = names.index(word)
        elif word.isdigit() and int(word) < len(names):
            number = int(word)
        else:
            raise ValueError(f"there is no class {word!r}{nearest(word, names, 'classes')}")
        if number not in present:
            raise ValueError(f"class {word!r} has no image in the evaluation images")
        found.append(number)
    return list(dict.fromkeys(found))
