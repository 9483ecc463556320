"""dry=true: all of a run but its length, and what the whole of it will cost. What needs no memory, parameters
and multiply-adds, ``build.outline`` says first.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch

from anorm.engine.fit import train_step
from anorm.engine.run import Run

STEPS = 5


def rehearse(run: Run, home: Path) -> None:
    """A few steps on one batch kept, a few of reading alone, a few of both; prints the report. Called by every process.

    home: the folder that the run's own would lie in, for the space on its disk. Raises ValueError when that
    is too small.
    """
    settings, world = run.settings, run.world
    images = settings.optim.global_batch
    compute, kept = _compute(run)
    reading = _reading(run)
    both = _both(run)
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
    """(seconds a step on a batch that is there, the batch)."""
    run.network.train()
    kept = next(iter(run.train.epoch(0)))
    train_step(run, 0, kept)  # the first step allocates, tunes and compiles
    return _seconds(run, (kept for _ in range(STEPS)), lambda step, batch: train_step(run, step, batch)), kept


def _reading(run: Run) -> float:
    return _seconds(run, _cycle(run), lambda step, batch: None)


def _both(run: Run) -> float:
    return _seconds(run, _cycle(run), lambda step, batch: train_step(run, step, batch))


def _cycle(run: Run):
    """STEPS real batches after one that is not timed: workers start with it."""
    given, epoch = 0, 0
    while given <= STEPS:
        for batch in run.train.epoch(epoch):
            yield batch
            given += 1
            if given > STEPS:
                return
        epoch += 1


def _seconds(run: Run, batches, work) -> float:
    """Mean seconds a batch, the first left out where more than STEPS come."""
    batches, times = iter(batches), []
    step = 0
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            break
        work(step, batch)
        if run.world.device.type == "cuda":
            torch.cuda.synchronize(run.world.device)
        times.append(time.perf_counter() - start)
        step += 1
    return sum(times[-STEPS:]) / len(times[-STEPS:])


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
