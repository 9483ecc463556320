"""The training loop, readable from top to bottom."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from anorm.data.random import seed_of, stream
from anorm.data.sources.base import Batch
from anorm.engine import checkpoint, optim
from anorm.engine.ema import after_step
from anorm.engine.evaluate import Pair, dependence_warning
from anorm.engine.meter import Clock, Meter, NotFinite, SaveTimer
from anorm.engine.nonfinite import explain
from anorm.engine.run import Run
from anorm.engine.state import (
    UNREADABLE,
    keep_predictions,
    list_unreadable,
    save,
    save_release,
    warn_if_unwritable,
    weights_state,
)
from anorm.engine.statistics import join_statistics
from anorm.processes.interrupt import Interrupted
from anorm.processes.world import Agreement


def fit(run: Run) -> dict[str, Any]:
    """Train for ``settings.epochs``, evaluate and save where due. Returns the final event's fields.

    Raises Interrupted, after an attempt to save, when a signal asked to stop, and FloatingPointError when the loss or its
    gradient is no longer finite.
    """
    settings, progress = run.settings, run.progress
    clock, save_due = Clock(progress), SaveTimer(settings)
    with agreeing(run) as agreement, explaining(run), garbage_collected_at_reports():
        while True:
            epoch, first = divmod(progress.step, run.train.steps_per_epoch)
            if first == 0 and progress.evaluated < epoch:
                own_statistics = None
                if epoch % settings.eval.every == 0 or progress.step == run.total_steps:
                    clock.tick()
                    own_statistics = save(run)  # a kill during evaluation then loses no training step
                    evaluate_and_keep_best(run, epoch, agreement.end_alone)
                list_unreadable(run)
                progress.evaluated = epoch
                clock.tick()
                save(run, own_statistics)
                save_due.restart()
            if progress.step >= run.total_steps:
                break
            train_epoch(run, epoch, first, agreement, save_due, clock)
    return finish(run)


@contextmanager
def agreeing(run: Run) -> Iterator[Agreement]:
    """Yield what the processes agree by. An Interrupted that passes learns whether its step was saved."""
    agreement = Agreement(run.world)
    try:
        yield agreement
    except Interrupted as interrupted:
        if run.world.main:
            interrupted.saved = run.saved_step == run.progress.step
        raise
    finally:
        agreement.close()


@contextmanager
def explaining(run: Run) -> Iterator[None]:
    """Turn NotFinite into FloatingPointError with the first layer whose output or gradient is not finite."""
    try:
        yield
    except NotFinite as found:
        raise FloatingPointError(found.words + explain(run, found.step, backward)) from None


@contextmanager
def garbage_collected_at_reports() -> Iterator[None]:
    """Let Python's collector run only where ``train_epoch`` calls it. If each process collected at a moment of its own, all
    would wait for each. Objects that are there already are frozen: to look through them takes a fifth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def train_epoch(
    run: Run, epoch: int, first: int, agreement: Agreement, save_due: SaveTimer, clock: Clock
) -> None:
    """Take the steps of one epoch from step ``first`` on: save, report and stop where due."""
    settings, world, progress = run.settings, run.world, run.progress
    run.network.train()
    run.task.begin(epoch)
    meter = Meter(run, clock)
    batches = iter(meter.waiting(run.train.epoch(epoch, first)))

    for step_batches in batches:
        step = progress.step
        losses, gradient_norm = train_step(run, step, step_batches)
        after_step(run.model, (step + 1) / run.total_steps)
        if run.ema:
            run.ema.update(run.model, (step + 1) / run.total_steps)

        progress.step = step + 1
        meter.add(step, losses, gradient_norm)
        if progress.step % settings.log.every == 0 or progress.step % run.train.steps_per_epoch == 0:
            meter.report(epoch, run.schedule(step))
            gc.collect(0 if progress.step % run.train.steps_per_epoch else 2)
        if progress.step % run.train.steps_per_epoch == 0:  # before a checkpoint is written of this step
            run.schedule.epoch_ended(epoch, meter.epoch_mean())
        run.record.advance(progress.step)
        if save_due.now(progress.step) and world.main:
            agreement.ask_to_save()
        stop, save_now = agreement.due()
        if stop or (save_now and progress.step % run.train.steps_per_epoch):
            clock.tick()
            save(run)
            save_due.restart()
        if stop:
            world.barrier()  # the first to end makes the launcher stop the others, and rank 0 was writing
            raise Interrupted(stop)


def train_step(run: Run, step: int, step_batches: list[Batch]) -> tuple[list[Tensor], Tensor]:
    """Take one optimizer step over this process's micro-batches. Returns the mean of each of the task's losses and the
    norm of the gradient, on the device.
    """
    settings, world = run.settings, run.world
    optim.set_rate(run.optimizer, run.schedule(step))
    means = [torch.zeros((), device=world.device) for _ in run.task.losses]
    for k, batch in enumerate(step_batches):
        last = k == len(step_batches) - 1
        with nullcontext() if last or world.size == 1 else run.network.no_sync():
            losses = backward(run, run.network, step, k, batch, len(step_batches))
        for mean, loss in zip(means, losses, strict=True):
            mean += loss

    gradient_norm = optim.step(run.optimizer, run.scaler, settings.optim.clip)
    if settings.hardware.loss_scale == "dynamic":
        run.scaler.update()
    else:
        run.scaler.update(float(settings.hardware.loss_scale))
    run.optimizer.zero_grad(set_to_none=True)
    return means, gradient_norm


def backward(run: Run, network: nn.Module, step: int, k: int, batch: Batch, of: int) -> list[Tensor]:
    """Run forward, loss and backward of the ``k``-th of this process's ``of`` micro-batches in ``step``. Returns each
    of the task's losses over ``of``: their sums over the micro-batches are means over the global batch, as are gradients.
    """
    number = run.train.micro_batch_number(
        k
    )  # in the global batch: draws do not depend on the number of processes
    inputs, target = run.task.prepare(batch, stream(run.settings.seed, "mix", step, number))
    torch.manual_seed(seed_of(run.settings.seed, "dropout", step, number))
    with run.autocast():
        outputs = network(*inputs)
    found = run.task.loss(outputs, target)
    assert found.keys() == set(run.task.losses), (list(found), run.task.losses)
    losses = [found[name] / of for name in run.task.losses]
    run.scaler.scale(reduce(torch.add, losses)).backward()
    return [loss.detach() for loss in losses]


def evaluate_and_keep_best(run: Run, epoch: int, before_each_batch: Callable[[], None]) -> None:
    """Evaluate after ``epoch`` epochs, write one event for each pair of set and statistics, keep the weights if they are
    the best so far; after the last epoch, keep the weights for release and what they made of each image.

    The first pair decides which weights are the best.
    """
    settings, world, progress, task = run.settings, run.world, run.progress, run.task
    started = time.perf_counter()
    join_statistics(world, run.model, settings.dist.stats)
    first_alone = settings.eval.others == "last" and progress.step < run.total_steps
    watched = {"before_each_batch": before_each_batch, "first_alone": first_alone}
    found = run.evaluator(network=run.evaluated, **watched)
    averages = {}
    if run.ema:
        join_statistics(world, run.ema.model, settings.dist.stats)
        averages = run.evaluator(run.ema.model, **watched)
    progress.last = {str(pair): result.values for pair, result in found.items()}
    value = progress.first[task.best]
    improved = progress.best is None or task.metrics[task.best].better(value, progress.best)
    if improved:
        progress.best, progress.best_epoch = value, epoch
    if improved and world.main:
        with warn_if_unwritable(run, "best weights"):
            checkpoint.save(run.folder / "best.ckpt", weights_state(run))
    if progress.step == run.total_steps and world.main:
        keep_predictions(run, found)
        keep_predictions(run, averages, "_ema")
        save_release(run)
    seconds = time.perf_counter() - started
    for pair, result in found.items():
        average = averages[pair].values if averages else {}
        fields = {"step": progress.step, "epoch": epoch} | result.values
        fields |= {"images": result.images, "set": pair.set, "stats": pair.stats}
        fields |= {"batches": result.batches} if result.batches else {}
        fields |= {f"ema_{name}": value for name, value in average.items()}
        run.record.write("eval", board=_board(run, pair), **fields, seconds=seconds)
        where = "" if len(found) == 1 else f" on {pair.set} ({pair.stats} statistics)"
        where += f" ({result.batches})" if result.batches else ""
        run.record.say(
            f"epoch {epoch}/{settings.epochs}{where}: {task.words(result.values)} of {result.images} images"
            + (f" (average of weights: {task.words(average)})" if average else "")
            + (f", best {_best(run)}" if pair == next(iter(found)) else "")
        )


def _board(run: Run, pair: Pair) -> str:
    """Return the name of an evaluation's curves in TensorBoard."""
    return "eval" if pair == run.evaluator.pairs[0] else f"eval {pair.set} {pair.stats}"


def _best(run: Run) -> str:
    progress, metric = run.progress, run.task.metrics[run.task.best]
    return f"{metric.text(progress.best)} in epoch {progress.best_epoch}"


def finish(run: Run) -> dict[str, Any]:
    """Write the final event, with the last and the best epoch's metrics; return its fields."""
    progress, task = run.progress, run.task
    fields = {"step": progress.step} | progress.first
    fields |= {
        f"best_{task.best}": progress.best,
        "best_epoch": progress.best_epoch,
        "seconds": progress.seconds,
        "images_per_second": progress.train_images / progress.train_seconds
        if progress.train_seconds
        else 0.0,
        "skipped_steps": progress.skipped_steps,
        "unreadable": list_unreadable(run),
    }
    if len(progress.last) > 1:
        pairs = {str(pair): pair for pair in run.evaluator.pairs}
        fields["evaluations"] = [
            {"set": pairs[name].set, "stats": pairs[name].stats} | values
            for name, values in progress.last.items()
        ]
    depends = run.evaluator.dependence() if run.world.main else {}
    fields["batch_dependence"] = depends
    if warning := dependence_warning(depends):
        run.record.say(f"warning: {warning}")
    if fields["unreadable"]:
        run.record.say(
            f"{fields['unreadable']} unreadable images were replaced or left out: {run.folder / UNREADABLE}"
        )
    run.record.write("final", **fields)
    run.record.say(
        f"finished: last epoch {task.words(progress.first)}, best {task.metrics[task.best].heading} {_best(run)}, "
        f"{progress.seconds:.0f} s, run folder {run.folder}"
    )
    return fields
