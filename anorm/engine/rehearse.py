"""dry=true: all of a run but its length, and what the whole of it will cost. What needs no memory, parameters
and multiply-adds, ``build.outline`` says first.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from anorm.data.loaders import Batch
from anorm.engine.fit import train_step
from anorm.engine.run import Run

STEPS = 5  # at least, of each kind
PATIENCE = 60.0  # seconds for the steps on real batches


def rehearse(run: Run, home: Path) -> None:
    """Time a few steps on one kept batch, a few of reading alone, a few of both; print the report. Called by every process.

    home: the folder that the run's own would lie in, for the space on its disk. Raises ValueError when that
    is too small.
    """
    settings, world = run.settings, run.world
    images = settings.optim.global_batch
    compute, kept = _compute(run)
    reading = _reading(run)
    both = _both(run, max(compute, reading))
    share = max(0.0, 1 - compute / both) if both > 0 else 0.0
    total = (
        run.total_steps * both
        + settings.epochs / settings.eval.every * len(run.evaluator.val) * compute / max(1, len(kept)) / 3
    )
    needed = _checkpoint_bytes(run) * (settings.checkpoint.keep + 2)
    free = shutil.disk_usage(_existing(home)).free
    if needed > free:
        raise ValueError(
            f"{home} has {free / 2**30:.1f} GiB free and the run keeps {needed / 2**30:.1f} GiB of "
            "checkpoints: set run_dir to a larger disk, or lower checkpoint.keep"
        )
    bottleneck = (
        "reading (more hardware.workers, data.loader=dali, smaller files)"
        if reading > compute
        else f"computing on {world.device.type}"
    )
    for line in (
        f"images/s: {images / compute:.0f} on a batch that is there, {images / reading:.0f} of reading "
        f"alone, {images / both:.0f} of both; share of waiting for data {100 * share:.0f} %; bottleneck: "
        f"{bottleneck}",
        f"the whole run: {settings.epochs} epochs x {run.train.steps_per_epoch} steps, about "
        f"{_hours(total)}, {total * world.size / 3600:.3g} "
        f"{'GPU' if world.device.type == 'cuda' else 'process'}-hours on {world.size}",
        f"disk: {needed / 2**20:.0f} MiB of checkpoints, {free / 2**30:.1f} GiB free",
    ):
        run.record.say(line)


def _compute(run: Run) -> tuple[float, list]:
    """Return the seconds of a step on a batch that is there, and the batch."""
    run.network.train()
    kept = next(iter(run.train.epoch(0)))
    run.task.begin(0)
    train_step(run, 0, kept)  # the first step allocates, tunes and compiles
    again = itertools.repeat(kept)
    return _seconds(run, again, lambda step, batch: train_step(run, step, batch), ready=0, timed=STEPS), kept


def _reading(run: Run) -> float:
    return _seconds(run, _epochs(run), lambda step, batch: None, *_steps(run))


def _both(run: Run, expected: float) -> float:
    """Return the seconds of a step with reading. expected: a guess, which bounds how many are timed."""
    ready, timed = _steps(run)
    # all processes take as many steps
    affordable = run.world.broadcast(int(PATIENCE / expected) if expected > 0 else ready + timed)
    timed = min(timed, max(STEPS, affordable))
    ready = min(ready, max(1, affordable - timed))
    return _seconds(run, _epochs(run), lambda step, batch: train_step(run, step, batch), ready, timed)


def _epochs(run: Run) -> Iterator[list[Batch]]:
    return (batches for epoch in itertools.count() for batches in run.train.epoch(epoch))


def _steps(run: Run) -> tuple[int, int]:
    """How many steps on real batches to leave out, and how many to time. Two batches of each worker are under way when
    the first arrives, and then they come in rounds, of one from each.
    """
    settings = run.settings
    batches_a_step = settings.optim.global_batch // settings.batch_size // run.world.size
    rounds = settings.hardware.workers / batches_a_step
    return 1 + math.ceil(2 * rounds), max(STEPS, math.ceil(4 * rounds))


def _seconds(run: Run, batches, work, ready: int, timed: int) -> float:
    """Return the mean seconds of ``timed`` steps after the first ``ready``."""
    started = time.perf_counter()
    for step, batch in enumerate(itertools.islice(batches, ready + timed), start=1):
        work(step, batch)
        if run.world.device.type == "cuda":
            torch.cuda.synchronize(run.world.device)
        if step == ready:
            started = time.perf_counter()
    return (time.perf_counter() - started) / timed


def _checkpoint_bytes(run: Run) -> int:
    weights = sum(t.numel() * t.element_size() for t in run.model.state_dict().values())
    moments = sum(
        t.numel() * t.element_size()
        for state in run.optimizer.state.values()
        for t in state.values()
        if torch.is_tensor(t)
    )
    return weights * (2 if run.ema else 1) + moments


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
