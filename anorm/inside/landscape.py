"""Loss and gradient along the step, as in Santurkar et al., "How Does Batch Normalization Help Optimization?" (2018).

At a point of training, with gradient g of a batch's loss (section 3.1, Figure 4): the loss at w - t g for
several t, the distance of the gradient there from g, and the effective beta-smoothness, the largest ratio of
that distance to the distance moved, t |g|.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anorm.build import build
from anorm.engine import checkpoint
from anorm.engine.ema import after_step
from anorm.engine.fit import train_step
from anorm.inside.subject import Subject
from anorm.processes.world import World
from anorm.weights import load_weights

__all__ = ["LENGTHS", "Point", "afresh", "along_gradient", "at_checkpoints"]

LENGTHS = (0.05, 0.1, 0.2, 0.4)
"""Steps in units of the gradient: 1/2 to 4 times a learning rate of 0.1."""


@dataclass(frozen=True)
class Point:
    """A point of training. losses, changes: at each of ``lengths``; changes and smoothness are l2 norms."""

    step: int
    lengths: tuple[float, ...]
    loss: float
    gradient_norm: float
    losses: tuple[float, ...]
    changes: tuple[float, ...]

    @property
    def smoothness(self) -> float:
        """The effective beta."""
        moved = [length * self.gradient_norm for length in self.lengths]
        ratios = [change / by for change, by in zip(self.changes, moved, strict=True) if by > 0]
        return max(ratios, default=0.0)


def along_gradient(
    parameters: Sequence[Tensor],
    loss: Callable[[], Tensor],
    lengths: Sequence[float] = LENGTHS,
    step: int = 0,
) -> Point:
    """Measure around the parameters' present values, which are put back. ``loss`` may be called any number of times."""
    start = [p.detach().clone() for p in parameters]
    value, gradient = _gradient(parameters, loss)
    losses, changes = [], []
    try:
        for length in lengths:
            with torch.no_grad():
                for p, origin, g in zip(parameters, start, gradient, strict=True):
                    p.copy_(origin - length * g)
            there, other = _gradient(parameters, loss)
            losses.append(there)
            changes.append(_norm([a - b for a, b in zip(other, gradient, strict=True)]))
    finally:
        with torch.no_grad():
            for p, origin in zip(parameters, start, strict=True):
                p.copy_(origin)
    return Point(step, tuple(lengths), value, _norm(gradient), tuple(losses), tuple(changes))


def _gradient(parameters: Sequence[Tensor], loss: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
    value = loss()
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return float(value.detach()), [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)
    ]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(sum(t.double().square().sum() for t in tensors)) ** 0.5


def _measure(model: nn.Module, batch, smoothing: float, lengths: Sequence[float], step: int) -> Point:
    """The network as it trains, in full precision: batch statistics, the same dropout at every call. Its
    running statistics are put back.
    """
    images, labels = batch[:2]
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training = model.training
    model.train()

    def loss() -> Tensor:
        torch.manual_seed(0)
        return F.cross_entropy(model(images).float(), labels, label_smoothing=smoothing)

    try:
        return along_gradient([p for p in model.parameters() if p.requires_grad], loss, lengths, step)
    finally:
        model.train(was_training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])


def checkpoints(folder: Path) -> dict[int, Path]:
    """Step -> file, for every checkpoint that a run has kept."""
    files = [*folder.glob("best.ckpt"), *folder.glob("last-*.ckpt"), *folder.glob("last.ckpt")]
    return dict(sorted((checkpoint.load(path)["step"], path) for path in files))


def at_checkpoints(subject: Subject, lengths: Sequence[float] = LENGTHS) -> list[Point]:
    """At every kept checkpoint, all with one batch: the first of an epoch that training did not use."""
    own, found = subject.evaluator, []
    batch = next(iter(subject.train.epoch(own.unused_epoch)))[0]
    smoothing = subject.config.settings.mix.label_smoothing
    before = {name: value.clone() for name, value in own.model.state_dict().items()}
    try:
        for step, path in checkpoints(subject.folder).items():
            load_weights(own.model, path)
            found.append(_measure(own.model, batch, smoothing, lengths, step))
    finally:
        own.model.load_state_dict(before)
    return found


def afresh(
    subject: Subject, steps: int, points: int = 12, lengths: Sequence[float] = LENGTHS
) -> Iterator[Point]:
    """The run's first ``steps`` steps once more, in a folder that goes away; measured before about ``points``
    of them, each with the batch that is trained on next, before it is mixed.
    """
    config = subject.config.having(resume="never", log={"tensorboard": False})
    every, step = max(1, -(-steps // points)), 0
    with tempfile.TemporaryDirectory(prefix="anorm-look-") as place:
        with redirect_stdout(io.StringIO()):  # what a run says at its start
            run = build(config, Path(place), "", World().on(config.settings.hardware.device), None)
        try:
            total = min(steps, run.total_steps)
            while step < total:
                for batches in run.train.epoch(step // run.train.steps_per_epoch):
                    if step % every == 0 or step == total - 1:
                        yield _measure(run.model, batches[0], config.settings.mix.label_smoothing, lengths, step)
                    run.network.train()
                    train_step(run, step, batches)
                    after_step(run.model, (step + 1) / run.total_steps)
                    step += 1
                    if step >= total:
                        break
        finally:
            run.close()
