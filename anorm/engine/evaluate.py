"""Exact evaluation: every image counts once, whatever the number of processes and the batch size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anorm.config.settings import Eval
from anorm.data.loaders import EvalLoader, TrainLoader
from anorm.data.random import seed_of
from anorm.engine.device import Autocast
from anorm.engine.statistics import check_statistics, join_statistics, norms_with_statistics, statistics_from
from anorm.processes.world import World


@dataclass(frozen=True)
class Result:
    """top1 and top5 in percent (top5 of at most as many classes as there are), loss per image, images counted.

    Per image of this process, in the order of the loader: index, label, the class that was first, whether
    the label was first, or among five, and the probability of the class that was first.
    """

    top1: float
    top5: float
    loss: float
    images: int
    index: Tensor
    label: Tensor
    predicted: Tensor
    first: Tensor
    among_five: Tensor
    confidence: Tensor


# of a process that was given no image: the types are those of the other processes' columns
NO_COLUMNS = [torch.empty(0, dtype=kind) for kind in (*[torch.int64] * 3, *[torch.bool] * 2, torch.float32)]


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable,
    world: World,
    autocast: Autocast,
    between: Callable[[], None] = lambda: None,
) -> Result:
    """Run ``model`` over this process's share of the images; the sums are exchanged once, at the end.

    The device is not waited for until then. between: called before every batch.
    """
    was_training, tuned = model.training, torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = (
        False  # else the convolutions' algorithms, and last digits, vary from time to time
    )
    model.eval()
    sums, images = torch.zeros(4, dtype=torch.float64, device=world.device), 0
    rows: list[tuple[Tensor, ...]] = []
    for inputs, labels, indices in batches:
        between()
        with autocast():
            logits = model(inputs)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        ranked = logits.topk(min(5, logits.shape[1])).indices
        right = ranked == labels[:, None]
        first, among_five = right[:, 0], right.any(1)
        sums[:3] += torch.stack((first.sum(), among_five.sum(), losses.double().sum()))
        images += len(labels)
        rows.append((indices, labels, ranked[:, 0], first, among_five, logits.softmax(1).amax(1)))
    sums[3] = images
    world.barrier()  # over gloo: NCCL would not notice that another left by ``between``
    world.sum(sums)
    model.train(was_training)
    torch.backends.cudnn.benchmark = tuned
    first, among_five, loss, images = sums.tolist()
    if images == 0:
        raise ValueError("there are no images to evaluate on")
    columns = [torch.cat(column).cpu() for column in zip(*rows, strict=True)] if rows else NO_COLUMNS
    return Result(100 * first / images, 100 * among_five / images, loss / images, int(images), *columns)


@dataclass
class Evaluator:
    """What it takes to evaluate a network under the statistics that ``settings`` names.

    train: for recalibration, an epoch of it that training does not use; None where ``settings`` ask for none.
    Raises ValueError where the network has norms whose statistics ``settings`` do not reach.
    """

    model: nn.Module
    train: TrainLoader | None
    val: EvalLoader
    world: World
    autocast: Autocast
    settings: Eval
    unused_epoch: int

    def __post_init__(self):
        check_statistics(self.model, self.settings.stats)

    def __call__(
        self,
        model: nn.Module | None = None,
        called: nn.Module | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Result:
        """Evaluate ``model`` (default: the own one); ``called`` is what runs it, where it is compiled."""
        model = self.model if model is None else model
        with statistics_from(model, self.settings.stats, lambda: self.recalibrate(model)):
            network = model if called is None else called
            return evaluate(network, self.val, self.world, self.autocast, between)

    @torch.no_grad()
    def recalibrate(self, model: nn.Module) -> None:
        """Pass ``eval.recalibrate_batches`` micro-batches in all of training images, augmented as in training and not
        mixed, through ``model``: only its statistics change.
        """
        left = -(-self.settings.recalibrate_batches // self.world.size)
        model.eval()  # no dropout, wherever it is
        for norm in norms_with_statistics(model):
            norm.training = True
        for step, step_batches in enumerate(self.train.epoch(self.unused_epoch)):
            for k, (images, _, _) in enumerate(step_batches[:left]):
                number = self.train.micro_batch_number(k)
                torch.manual_seed(seed_of(self.train.seed, "recalibrate", step, number))  # AFN's own dropout
                with self.autocast():
                    model(images)
            left -= len(step_batches)
            if left <= 0:
                break
        model.eval()
        join_statistics(self.world, model, "mean")
