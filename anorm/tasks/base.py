"""The seam between the loop and what is learned. The engine imports this file of ``tasks`` and no other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy
import torch
from torch import Tensor, nn

from anorm.data.sources.base import Batch, Dataset, Source

Rows = dict[str, "numpy.ndarray | list"]
"""Column name -> one entry an image, in the order of the data set; every column has the same length."""


@dataclass(frozen=True)
class Metric:
    """How a number is called, written and compared; logs, tables, pages and comparisons read it from here.

    heading: in tables and messages, such as "top-1". unit: "%" for values in percent, "" for plain numbers.
    as_error: papers print 100 - value, as in "top-1 error"; only for a value in percent that is better when higher.
    per_image: the stored column of which the metric is the mean over images (times 100 for a percentage); None where
    it is no mean over images, and two networks cannot be paired image by image under it.
    """

    heading: str
    unit: str = "%"
    higher_is_better: bool = True
    as_error: bool = False
    per_image: str | None = None
    digits: int = 2
    latex: str | None = None

    def better(self, a: float, b: float) -> bool:
        """Return whether ``a`` is better than ``b``."""
        return a > b if self.higher_is_better else a < b

    def text(self, value: float) -> str:
        """Return ``value`` with its digits and unit: "91.38 %"."""
        return f"{value:.{self.digits}f}" + (f" {self.unit}" if self.unit else "")


class Judge(ABC):
    """Collects what one process's share of an evaluation shows. An image of a batch counts where ``batch.indices`` has
    it: inputs beyond the number of indices only fill the batch.
    """

    @abstractmethod
    def add(self, outputs: Any, batch: Batch) -> None:
        """Take the network's outputs for a batch. Never waits for the device."""

    @abstractmethod
    def done(self) -> tuple[Tensor, Rows]:
        """Return sums, float64 (K,), which the engine adds over processes, and rows, one an image in the order of
        ``add``, which it gathers and puts into the order of the data set.
        """


class Task(ABC):
    """What a network learns, and by which numbers it is judged. The loop, DDP, accumulation, checkpoints, evaluation,
    grids and tables know nothing else of it.

    classes: their names, in the order of labels. channels: of an image. mix: the ``mix`` section of the settings.
    Further arguments of a subclass are keys of the configuration: ``task.KEY=value``.
    """

    metrics: ClassVar[dict[str, Metric]]
    """By the names that events, tables and ``--metric`` use; in the order in which messages show them."""
    shown: ClassVar[tuple[str, ...]]
    """The metrics that a message of an evaluation shows."""
    best: ClassVar[str]
    """The metric that decides which weights best.ckpt keeps."""
    losses: ClassVar[tuple[str, ...]]
    """The names of ``loss``'s terms. Where there are several, each is logged beside their sum."""
    takes: ClassVar[type[Dataset]]
    """The data sets that it learns from and is judged on."""

    def __init__(self, classes: list[str], channels: int = 3, mix: Any = None):
        self.classes, self.channels = classes, channels

    @abstractmethod
    def create(self, arch: str, norm: Any, **arch_options) -> nn.Module:
        """Return the network, with the names that its checkpoints have."""

    def network(self, model: nn.Module) -> nn.Module:
        """Return what training calls and DDP wraps: the model itself, or a module around it."""
        return model

    def begin(self, epoch: int) -> None:
        """Learn that steps of ``epoch``, counted from 0, come next: called before each part of an epoch that is trained, so
        a task that depends on it resumes exactly.
        """

    @abstractmethod
    def example(self, n: int, source: Source) -> Batch:
        """Return a training batch of ``n`` images of fixed noise, on the CPU: to count, to compile, and for DDP's first backward."""

    @abstractmethod
    def prepare(self, batch: Batch, rng: torch.Generator) -> tuple[tuple, Any]:
        """Return (inputs of ``network`` in training, target of ``loss``). All randomness comes from ``rng``, a CPU
        generator of the micro-batch.
        """

    @abstractmethod
    def loss(self, outputs: Any, target: Any) -> dict[str, Tensor]:
        """Return the terms in ``losses``, means over the micro-batch, float32 or float64. Their sum is minimised."""

    @abstractmethod
    def inputs(self, batch: Batch) -> tuple:
        """Return the inputs of the model in evaluation."""

    @abstractmethod
    def judge(self, images: Dataset) -> Judge:
        """Return a new judge for an evaluation on ``images``."""

    @abstractmethod
    def metrics_of(self, sums: Tensor, rows: Rows) -> dict[str, float]:
        """Return every metric, from the processes' sums, added, and their rows, gathered. Called on rank 0."""

    @abstractmethod
    def predictions(self, rows: Rows, identity: str) -> dict[str, bytes]:
        """Return what the network made of each image, as files to keep: suffix of the name -> content."""

    @abstractmethod
    def card(self, source: Source) -> dict:
        """Return what a number, or a prediction, depends on besides the weights: data.json."""

    @classmethod
    def words(cls, values: dict[str, float]) -> str:
        """Return the metrics in ``shown`` in words: "top-1 91.38 % top-5 99.70 %"."""
        return " ".join(f"{cls.metrics[name].heading} {cls.metrics[name].text(values[name])}" for name in cls.shown)
