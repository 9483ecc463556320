"""The training loop, readable from top to bottom."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from anorm.data.loaders import Batch
from anorm.data.random import seed_of, stream
from anorm.engine import checkpoint, optim
from anorm.engine.ema import after_step
from anorm.engine.meter import Clock, Meter, SaveTimer
from anorm.engine.run import Run
from anorm.engine.state import (
    PREDICTIONS,
    PREDICTIONS_EMA,
    UNREADABLE,
    going_on_without,
    keep_predictions,
    list_unreadable,
    save,
    save_release,
    weights_state,
)
from anorm.engine.statistics import join_statistics
from anorm.processes.interrupt import Interrupted
from anorm.processes.world import Agreement


def fit(run: Run) -> dict[str, Any]:
    """Train to the end of ``settings.epochs``, evaluating and saving where due. Returns the final event's fields.

    Raises Interrupted, once it has tried to save, when a signal asked to stop, FloatingPointError when the loss is no
    longer finite.
    """
    settings, progress = run.settings, run.progress
    clock, save_due = Clock(progress), SaveTimer(settings)
    with agreeing(run) as agreement, garbage_collected_at_reports():
        while True:
            epoch, first = divmod(progress.step, run.train.steps_per_epoch)
            if first == 0 and progress.evaluated < epoch:
                before_joining = None
                if epoch % settings.eval.every == 0 or progress.step == run.total_steps:
                    clock.tick()
                    before_joining = save(run)  # what ends an evaluation costs nothing else
                    evaluate_and_keep_best(run, epoch, agreement.end_alone)
                list_unreadable(run)
                progress.evaluated = epoch
                clock.tick()
                save(run, before_joining)
                save_due.restart()
            if progress.step >= run.total_steps:
                break
            train_epoch(run, epoch, first, agreement, save_due, clock)
    return finish(run)


@contextmanager
def agreeing(run: Run) -> Iterator[Agreement]:
    """What the processes agree by; an interruption within learns whether its step was saved."""
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
def garbage_collected_at_reports() -> Iterator[None]:
    """Within: Python's collector runs where ``train_epoch`` calls it. By itself it would stop each process at another
    moment, and all wait for each. It passes over what is there already, which takes a fifth of a second to look through.
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
    """The steps of one epoch from step ``first`` on."""
    settings, world, progress = run.settings, run.world, run.progress
    run.network.train()
    meter = Meter(run, clock)
    batches = iter(meter.waiting(run.train.epoch(epoch, first)))

    for step_batches in batches:
        step = progress.step
        loss, gradient_norm = train_step(run, step, step_batches)
        after_step(run.model, (step + 1) / run.total_steps)
        if run.ema:
            run.ema.update(run.model, (step + 1) / run.total_steps)

        progress.step = step + 1
        meter.add(step, loss, gradient_norm)
        if progress.step % settings.log.every == 0 or progress.step % run.train.steps_per_epoch == 0:
            meter.report(epoch, run.schedule(step))
            gc.collect(0 if progress.step % run.train.steps_per_epoch else 2)
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


def train_step(run: Run, step: int, step_batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """One optimizer step over this process's micro-batches; (its mean loss, norm of the gradient), on the device.

    The loss of a micro-batch is weighted by 1 / their number, so that gradients are those of the mean over
    the global batch.
    """
    settings, world = run.settings, run.world
    optim.set_rate(run.optimizer, run.schedule(step))
    loss_sum = torch.zeros((), device=world.device)
    for k, batch in enumerate(step_batches):
        # in the global batch: draws do not depend on the number of processes
        number = run.train.micro_batch_number(k)
        images, target = run.mixing.mix(batch.inputs, batch.targets, stream(settings.seed, "mix", step, number))
        torch.manual_seed(seed_of(settings.seed, "dropout", step, number))
        last = k == len(step_batches) - 1
        with nullcontext() if last or world.size == 1 else run.network.no_sync():
            with run.autocast():
                logits = run.network(images)
            loss = run.mixing.loss(logits, target) / len(step_batches)
            run.scaler.scale(loss).backward()
        loss_sum += loss.detach()

    gradient_norm = optim.step(run.optimizer, run.scaler, settings.optim.clip)
    if settings.hardware.loss_scale == "dynamic":
        run.scaler.update()
    else:
        run.scaler.update(float(settings.hardware.loss_scale))
    run.optimizer.zero_grad(set_to_none=True)
    return loss_sum, gradient_norm


def evaluate_and_keep_best(run: Run, epoch: int, between: Callable[[], None]) -> None:
    """Evaluate after ``epoch`` epochs, write it down, keep the weights if they are the best so far; after the last
    epoch, keep the weights for release and what they made of each image.
    """
    settings, world, progress = run.settings, run.world, run.progress
    started = time.perf_counter()
    join_statistics(world, run.model, settings.dist.stats)
    result = run.evaluator(called=run.evaluated, between=between)
    fields = {
        "step": progress.step,
        "epoch": epoch,
        "top1": result.top1,
        "top5": result.top5,
        "loss": result.loss,
        "images": result.images,
        "stats": settings.eval.stats,
    }
    results = {PREDICTIONS: result}
    if run.ema:
        join_statistics(world, run.ema.model, settings.dist.stats)
        average = results[PREDICTIONS_EMA] = run.evaluator(run.ema.model, between=between)
        fields |= {"ema_top1": average.top1, "ema_top5": average.top5}
    improved = result.top1 > progress.best_top1
    if improved:
        progress.best_top1, progress.best_epoch = result.top1, epoch
    progress.top1, progress.top5 = result.top1, result.top5
    if improved and world.main:
        with going_on_without(run, "best weights"):
            checkpoint.save(run.folder / "best.ckpt", weights_state(run))
    if progress.step == run.total_steps:
        for name, of_images in results.items():
            keep_predictions(run.folder / name, world, of_images, run.evaluator.val.identity)
        if world.main:
            save_release(run)
    fields["seconds"] = time.perf_counter() - started
    run.record.write("eval", **fields)
    averaged = f" (average of weights: {fields['ema_top1']:.2f} %)" if run.ema else ""
    run.record.say(
        f"epoch {epoch}/{settings.epochs}: top-1 {result.top1:.2f} % top-5 {result.top5:.2f} % of "
        f"{result.images} images"
        f"{averaged}, best {progress.best_top1:.2f} % in epoch {progress.best_epoch}"
    )


def finish(run: Run) -> dict[str, Any]:
    """The final event, with the last and the best epoch's accuracy."""
    progress = run.progress
    fields = {
        "step": progress.step,
        "top1": progress.top1,
        "top5": progress.top5,
        "best_top1": progress.best_top1,
        "best_epoch": progress.best_epoch,
        "seconds": progress.seconds,
        "images_per_second": progress.train_images / progress.train_seconds
        if progress.train_seconds
        else 0.0,
        "skipped_steps": progress.skipped_steps,
        "unreadable": list_unreadable(run),
    }
    if fields["unreadable"]:
        run.record.say(
            f"{fields['unreadable']} unreadable images were replaced or left out: {run.folder / UNREADABLE}"
        )
    run.record.write("final", **fields)
    run.record.say(
        f"finished: last epoch top-1 {progress.top1:.2f} % top-5 {progress.top5:.2f} %, best epoch "
        f"{progress.best_epoch} top-1 {progress.best_top1:.2f} %, {progress.seconds:.0f} s, run folder "
        f"{run.folder}"
    )
    return fields
