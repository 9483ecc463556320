"""Exact evaluation: every image counts once, whatever the number of processes and the batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy
import torch
from torch import nn

from anorm.config.settings import Eval
from anorm.data.loaders import Batches, EvalLoader, TrainLoader
from anorm.data.random import seed_of
from anorm.engine.device import Autocast
from anorm.engine.statistics import (
    check_statistics,
    join_statistics,
    statistics_from,
    uses_batch_statistics,
)
from anorm.norms.statistics import tracking_norms
from anorm.processes.world import World
from anorm.tasks.base import Rows, Task


class Pair(NamedTuple):
    """What one evaluation is of: the name of a set of images, and the statistics that norms standardize with."""

    set: str
    stats: str

    def __str__(self) -> str:
        return f"{self.set}/{self.stats}"


@dataclass(frozen=True)
class Result:
    """The task's metrics by name, and how many images counted. rows: on rank 0, what the network made of each image, in
    the order of the data set; elsewhere empty. batches: how images came together, where that matters; else empty.
    """

    values: dict[str, float]
    images: int
    rows: Rows
    batches: str = ""

    def __getitem__(self, metric: str) -> float:
        return self.values[metric]


@torch.no_grad()
def evaluate(
    task: Task,
    model: nn.Module,
    images: EvalLoader,
    world: World,
    autocast: Autocast,
    before_each_batch: Callable[[], None] = lambda: None,
) -> Result:
    """Run ``model`` over this process's share of the images; sums and rows are exchanged once, at the end.

    The device is not waited for until then. Raises ValueError where there is no image.
    """
    was_training, tuned = model.training, torch.backends.cudnn.benchmark
    # tuning may choose other algorithms for the convolutions from time to time, and last digits with them
    torch.backends.cudnn.benchmark = False
    model.eval()
    judge, indices = task.judge(images.dataset), [torch.empty(0, dtype=torch.int64)]
    for batch in images:
        before_each_batch()
        with autocast():
            outputs = model(*task.inputs(batch))
        judge.add(outputs, batch)
        indices.append(batch.indices)
    sums, rows = judge.done()
    model.train(was_training)
    torch.backends.cudnn.benchmark = tuned
    world.barrier()  # over gloo: NCCL would not notice that another left by ``before_each_batch``
    world.sum(sums)
    parts = world.gather({"index": torch.cat(indices).numpy()} | rows)
    rows = _in_order(parts) if world.main else {}
    count = len(rows["index"]) if world.main else 0
    values, count = world.broadcast((task.metrics_of(sums, rows) if count else {}, count))
    if count == 0:
        raise ValueError("there are no images to evaluate on")
    return Result(values, count, rows)


DEPENDS = 1e-3
"""Of the spread of outputs: smaller differences may be rounding, which half precision makes larger."""


def dependence_warning(found: dict[str, float]) -> str:
    """Return what a person who did not ask for batch statistics must know, or nothing. found: ``Evaluator.dependence``."""
    value = found.get("running", 0.0)
    if value < DEPENDS:
        return ""
    return (
        f"the network's answer for an image depends on the others in its batch, by up to {value:.2g} of the spread of its "
        "outputs, though batch statistics were not asked for: its numbers hold for these batches (eval.batch_size, "
        "eval.order, eval.seed) alone"
    )


PROBED = 16
"""Images whose answers are compared in two batches, at most."""


@torch.no_grad()
def batch_dependence(task: Task, model: nn.Module, images: EvalLoader, autocast: Autocast) -> float | None:
    """Return by how much a network's answers for images change with the others in their batch: the largest difference
    between its outputs for 16 images among 16 others and among another 16, as a part of their standard deviation. Batches
    are not larger than those of the evaluation, which fit the device.

    0 where an answer depends on its image alone. None where outputs are not one tensor, or images are too few. Nothing is
    exchanged between processes.
    """
    count, probed = len(images.dataset), min(PROBED, images.batch // 2)
    if probed == 0 or count < 3 * probed:
        return None
    # spread over the set, which may lie class by class
    chosen = torch.linspace(0, count - 1, 3 * probed).long()
    same, some, others = chosen[::3], chosen[1::3], chosen[2::3]
    was_training = model.training
    model.eval()
    outputs = []
    for mates in (some, others):
        batch = images.batch_of(torch.cat([same, mates]))
        with autocast():
            answer = model(*task.inputs(batch)) if len(batch.indices) == 2 * probed else None
        outputs.append(answer[:probed].double() if isinstance(answer, torch.Tensor) else None)
    model.train(was_training)
    if any(answer is None for answer in outputs):
        return None
    spread = torch.cat(outputs).std().clamp(min=torch.finfo(torch.float32).tiny)
    return float((outputs[0] - outputs[1]).abs().max() / spread)


def _in_order(parts: list[Rows]) -> Rows:
    """Return the processes' rows as one table, in the order of ``index``."""
    order = numpy.argsort(numpy.concatenate([part["index"] for part in parts]), kind="stable")
    whole = {}
    for name in parts[0]:
        columns = [part[name] for part in parts]
        if isinstance(columns[0], numpy.ndarray):
            whole[name] = numpy.concatenate(columns)[order]
        else:
            entries = [entry for column in columns for entry in column]
            whole[name] = [entries[i] for i in order]
    return whole


@dataclass
class Evaluator:
    """Evaluates a network on each of ``sets`` under each of the statistics that ``settings`` name.

    train: for recalibration, an epoch of it that training does not use; None where ``settings`` ask for none.
    Raises ValueError where the network has norms whose statistics ``settings`` do not reach.
    """

    task: Task
    model: nn.Module
    train: TrainLoader | None
    sets: dict[str, EvalLoader]
    world: World
    autocast: Autocast
    settings: Eval
    unused_epoch: int

    def __post_init__(self):
        for source in self.settings.all_stats:
            check_statistics(self.model, source)

    @property
    def pairs(self) -> list[Pair]:
        """Return the pairs in the order of evaluation; the first decides which weights are the best."""
        return [Pair(name, source) for source in self.settings.all_stats for name in self.sets]

    @property
    def val(self) -> EvalLoader:
        """Return the first set."""
        return next(iter(self.sets.values()))

    def __call__(
        self,
        model: nn.Module | None = None,
        network: nn.Module | None = None,
        before_each_batch: Callable[[], None] = lambda: None,
        first_alone: bool = False,
        batches: Batches | None = None,
    ) -> dict[Pair, Result]:
        """Evaluate ``model`` (default: the own one), called as ``network`` where that is given: compiled, or wrapped.

        first_alone: only the first pair. batches: in place of those that the settings ask for.
        """
        model = self.model if model is None else model
        network = model if network is None else network
        found = {}
        pairs = self.pairs[:1] if first_alone else self.pairs
        for source in self.settings.all_stats:
            names = [pair.set for pair in pairs if pair.stats == source]
            if not names:
                continue
            with statistics_from(model, source, lambda: self.recalibrate(model)):
                for name in names:
                    images, words = self.sets[name], ""
                    if uses_batch_statistics(model):
                        asked = batches or self.batches
                        images, words = images.together(asked), str(asked)
                    result = evaluate(
                        self.task, network, images, self.world, self.autocast, before_each_batch
                    )
                    found[Pair(name, source)] = replace(result, batches=words)
        return found

    @property
    def batches(self) -> Batches:
        """How images come together where that matters."""
        return Batches(self.val.batch, self.settings.order, self.settings.seed)

    def dependence(self, model: nn.Module | None = None) -> dict[str, float]:
        """Return, for each of "running" and "batch" that the settings ask for, ``batch_dependence`` on the first set."""
        model = self.model if model is None else model
        sources = dict.fromkeys("batch" if s == "batch" else "running" for s in self.settings.all_stats)
        found = {}
        for source in sources:
            with statistics_from(model, source, lambda: None):
                value = batch_dependence(self.task, model, self.val, self.autocast)
            if value is not None:
                found[source] = value
        return found

    @torch.no_grad()
    def recalibrate(self, model: nn.Module) -> None:
        """Take the statistics of ``model`` afresh from ``eval.recalibrate_batches`` micro-batches, in all, of training
        images: augmented as in training, not mixed. Nothing else of it changes.
        """
        left = -(-self.settings.recalibrate_batches // self.world.size)
        model.eval()  # no dropout, wherever it is
        for norm in tracking_norms(model):
            norm.training = True
        for step, step_batches in enumerate(self.train.epoch(self.unused_epoch)):
            for k, batch in enumerate(step_batches[:left]):
                number = self.train.micro_batch_number(k)
                torch.manual_seed(seed_of(self.train.seed, "recalibrate", step, number))  # AFN's own dropout
                with self.autocast():
                    model(*self.task.inputs(batch))
            left -= len(step_batches)
            if left <= 0:
                break
        model.eval()
        join_statistics(self.world, model, "mean")

    def close(self) -> None:
        """End the loaders' workers."""
        for images in self.sets.values():
            images.close()
