"""The training loop, readable from top to bottom."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from anorm.data.loaders import Batch, TrainLoader
from anorm.data.mixing import Mixing
from anorm.data.random import seed_of, stream
from anorm.engine import checkpoint, optim
from anorm.engine.distributed import Agreement, World, join_statistics
from anorm.engine.ema import Ema, after_step
from anorm.engine.evaluate import Evaluator, Result
from anorm.engine.interrupt import Interrupted
from anorm.engine.nonfinite import explain
from anorm.engine.record import Record
from anorm.engine.schedule import WarmupCosine
from anorm.engine.settings import Settings


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint. seconds: of training and evaluation, over all its parts."""

    step: int = 0
    evaluated: int = 0  # epochs evaluated
    top1: float = 0.0
    top5: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0  # of these, reading and computing training steps that were reported
    train_images: int = 0  # in them
    skipped_steps: int = 0


@dataclass
class Run:
    """The parts that ``build`` makes for one process."""

    settings: Settings
    folder: Path
    signature: str
    arch: str
    world: World
    model: nn.Module  # the plain network: its names are those of checkpoints
    network: nn.Module  # what is called in training: compiled, distributed
    evaluated: nn.Module  # what is called in evaluation
    train: TrainLoader
    mixing: Mixing
    optimizer: torch.optim.Optimizer
    schedule: WarmupCosine
    scaler: torch.amp.GradScaler
    autocast: Callable[[], AbstractContextManager]
    evaluator: Evaluator
    ema: Ema | None
    record: Record
    progress: Progress
    sums: Tensor  # on the device, since the last reading: loss, steps skipped, first bad step + 1

    @property
    def total_steps(self) -> int:
        return self.train.steps_per_epoch * self.settings.epochs

    def close(self) -> None:
        """End the loaders' workers, close the log."""
        self.train.close()
        self.evaluator.val.close()
        self.record.close()


def fit(run: Run) -> dict[str, Any]:
    """Train to the end of ``settings.epochs``, evaluating and saving where due. Returns the final event's fields.

    Raises Interrupted after saving when a signal asked to stop, FloatingPointError when the loss is no longer finite.
    """
    settings, world, progress = run.settings, run.world, run.progress
    agreement, clock = Agreement(world), _Clock(progress)
    save_due = _SaveTimer(settings)
    try:
        while True:
            epoch, first = divmod(progress.step, run.train.steps_per_epoch)
            if first == 0 and progress.evaluated < epoch:
                if epoch % settings.eval.every == 0 or progress.step == run.total_steps:
                    evaluate_and_keep_best(run, epoch)
                progress.evaluated = epoch
                clock.tick()
                save(run)
                save_due.restart()
            if progress.step >= run.total_steps:
                break
            train_epoch(run, epoch, first, agreement, save_due, clock)
    finally:
        agreement.close()
    return finish(run)


def train_epoch(run: Run, epoch: int, first: int, agreement: Agreement, save_due: _SaveTimer, clock: _Clock) -> None:
    """The steps of one epoch from step ``first`` on."""
    settings, world, progress = run.settings, run.world, run.progress
    run.network.train()
    meter = _Meter(run, clock)
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
        run.record.advance(progress.step)
        if save_due.now(progress.step) and world.main:
            agreement.ask_to_save()
        stop, save_now = agreement.due()
        if stop or (save_now and progress.step % run.train.steps_per_epoch):
            clock.tick()
            save(run)
            save_due.restart()
        if stop:
            raise Interrupted(stop)


def train_step(run: Run, step: int, step_batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """One optimizer step over this process's micro-batches; (its mean loss, norm of the gradient), on the device.

    The loss of a micro-batch is weighted by 1 / their number, so that gradients are those of the mean over the global batch.
    """
    settings, world = run.settings, run.world
    optim.set_rate(run.optimizer, run.schedule(step))
    loss_sum = torch.zeros((), device=world.device)
    for k, (images, labels, _) in enumerate(step_batches):
        number = run.train.micro_batch_number(k)  # in the global batch: draws do not depend on the number of processes
        images, target = run.mixing.mix(images, labels, stream(settings.seed, "mix", step, number))
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


class _Clock:
    """Adds the time since the last tick to the run's seconds."""

    def __init__(self, progress: Progress):
        self.progress, self._last = progress, time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._last
        self._last = now


class _SaveTimer:
    """When a checkpoint is due besides the end of an epoch."""

    def __init__(self, settings: Settings):
        self.steps, self.seconds = settings.checkpoint.every_steps, 60 * settings.checkpoint.every_minutes
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    def now(self, step: int) -> bool:
        by_step = self.steps and step % self.steps == 0
        return bool(by_step or (self.seconds and time.monotonic() - self._since > self.seconds))


class _Meter:
    """The numbers of training, summed on the device and read when reported; counts from the last report on.

    ``run.sums`` is in the checkpoint, so that a resumed run's log has the same values as an uninterrupted one's.
    """

    def __init__(self, run: Run, clock: _Clock):
        self.run, self.clock, self.wait, self.steps, self.since = run, clock, 0.0, 0, time.perf_counter()

    def waiting(self, batches):
        """``batches``, timed."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.wait += time.perf_counter() - start
            yield batch

    def add(self, step: int, loss: Tensor, gradient_norm: Tensor) -> None:
        """loss: of this process, finite or not. The run's first step with a bad loss (or gradient, unless scaling
        explains it) is remembered."""
        sums, run = self.run.sums, self.run
        good_loss, good = loss.isfinite(), gradient_norm.isfinite()
        sums[0] += loss
        sums[1] += 1
        sums[2] += (good_loss & ~good) if run.scaler.is_enabled() else 0
        bad = ~good_loss if run.scaler.is_enabled() else ~(good_loss & good)
        sums[3] = torch.where((sums[3] == 0) & bad, float(step + 1), sums[3])
        self.steps += 1
        if sums.device.type == "cpu" and sums[3] > 0:
            self._stop()

    def report(self, epoch: int, rate: float) -> None:
        run, world, progress = self.run, self.run.world, self.run.progress
        sums = world.sum(run.sums.clone())
        loss_sum, steps, skipped, bad = sums.tolist()
        if bad:
            self._stop()
        run.sums.zero_()
        progress.skipped_steps += int(skipped / world.size)
        seconds = time.perf_counter() - self.since
        progress.train_seconds += seconds
        images = run.settings.optim.global_batch * self.steps
        progress.train_images += images
        speed = images / seconds
        fields = {"step": progress.step, "epoch": epoch + 1, "loss": loss_sum / steps, "lr": rate, "images_per_second": speed,
                  "data_wait": self.wait / seconds, "memory_mib": _peak_memory(world.device)}
        if run.scaler.is_enabled():
            fields |= {"loss_scale": run.scaler.get_scale(), "skipped_steps": progress.skipped_steps}
        run.record.write("train", **fields)
        run.record.progress(progress.step, f"epoch {epoch + 1}/{run.settings.epochs} step {progress.step}/{run.total_steps} "
                            f"loss {fields['loss']:.4f} lr {rate:.5f} {speed:.0f} images/s wait {100 * fields['data_wait']:.0f} %")
        self.wait, self.steps, self.since = 0.0, 0, time.perf_counter()

    def _stop(self) -> None:
        raise FloatingPointError(explain(self.run, max(int(self.run.sums[3]) - 1, 0)))


def _peak_memory(device: torch.device) -> float:
    """MiB: of the device's allocator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def evaluate_and_keep_best(run: Run, epoch: int) -> Result:
    """Evaluate after ``epoch`` epochs, write it down, keep the weights if they are the best so far."""
    settings, world, progress = run.settings, run.world, run.progress
    join_statistics(world, run.model, settings.dist.stats)
    started = time.perf_counter()
    result = run.evaluator(called=run.evaluated)
    fields = {"step": progress.step, "epoch": epoch, "top1": result.top1, "top5": result.top5, "loss": result.loss,
              "images": result.images, "stats": settings.eval.stats}
    improved = result.top1 > progress.best_top1
    if improved:
        progress.best_top1, progress.best_epoch = result.top1, epoch
    progress.top1, progress.top5 = result.top1, result.top5
    if improved and world.main:
        checkpoint.save(run.folder / "best.ckpt", weights_state(run))
    if progress.step == run.total_steps:
        _keep_predictions(run, result)
        if world.main:
            _save_release(run)
    if run.ema:
        join_statistics(world, run.ema.model, settings.dist.stats)
        average = run.evaluator(run.ema.model)
        fields |= {"ema_top1": average.top1, "ema_top5": average.top5}
    fields["seconds"] = time.perf_counter() - started
    run.record.write("eval", **fields)
    averaged = f" (average of weights: {fields['ema_top1']:.2f} %)" if run.ema else ""
    run.record.say(f"epoch {epoch}/{settings.epochs}: top-1 {result.top1:.2f} % top-5 {result.top5:.2f} % of {result.images} images"
                   f"{averaged}, best {progress.best_top1:.2f} % in epoch {progress.best_epoch}")
    return result


def weights_state(run: Run) -> dict[str, Any]:
    """What best.ckpt holds: the weights and what they are."""
    return {"arch": run.arch, "signature": run.signature, "step": run.progress.step, "model": run.model.state_dict(),
            "progress": dataclasses.asdict(run.progress)} | ({"ema": run.ema.model.state_dict()} if run.ema else {})


def save(run: Run) -> None:
    """last.ckpt: all that the next step depends on. Called by every process; rank 0 writes."""
    world = run.world
    buffers = world.gather([buffer.cpu() for buffer in run.model.buffers()])
    ema_buffers = world.gather([buffer.cpu() for buffer in run.ema.model.buffers()]) if run.ema else []
    sums = world.gather(run.sums.cpu())
    if not world.main:
        return
    run.record.write("checkpoint", step=run.progress.step)
    state = weights_state(run) | {
        "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "ema_steps": run.ema.steps if run.ema else 0,
        "processes": {"size": world.size, "buffers": buffers, "ema_buffers": ema_buffers, "sums": sums},
        "log_offset": run.record.offset, "threads": torch.get_num_threads(),
    }
    try:
        checkpoint.save(run.folder / "last.ckpt", state, keep=run.settings.checkpoint.keep + 1)
    except OSError as error:
        run.record.say(f"warning: no checkpoint at step {run.progress.step}: {error}; the one before it is untouched")
        if run.progress.step == run.total_steps:
            raise


def restore(run: Run, state: dict[str, Any]) -> list[str]:
    """Continue from a checkpoint's state; returns what a person should know about it. Called after DDP has looked
    at the model, as that copies rank 0's statistics.

    With another number of processes the statistics of each become the mean over those of the old ones.
    """
    said, processes, world = [], state["processes"], run.world
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"]) if run.scaler.is_enabled() else None
    run.progress = Progress(**state["progress"])
    models = [(run.model, processes["buffers"])]
    if run.ema:
        run.ema.model.load_state_dict(state["ema"])
        run.ema.steps = state["ema_steps"]
        models.append((run.ema.model, processes["ema_buffers"]))
    same = processes["size"] == world.size
    if not same:
        said.append(f"continuing on {world.size} processes what ran on {processes['size']}: same batches in the same order, sums in "
                    "another, so the weights will agree to rounding and not to the last bit")
    for model, kept in models:
        for i, buffer in enumerate(model.buffers()):
            values = [rank[i] for rank in kept]
            if same:
                buffer.copy_(values[world.rank])
            else:
                buffer.copy_(torch.stack(values).mean(0) if buffer.is_floating_point() else values[0])
    if same:
        run.sums.copy_(processes["sums"][world.rank])
    else:
        run.sums.copy_(torch.stack(processes["sums"]).mean(0))
    return said


def finish(run: Run) -> dict[str, Any]:
    """The final event, with the last and the best epoch's accuracy."""
    progress = run.progress
    fields = {"step": progress.step, "top1": progress.top1, "top5": progress.top5, "best_top1": progress.best_top1,
              "best_epoch": progress.best_epoch, "seconds": progress.seconds,
              "images_per_second": progress.train_images / progress.train_seconds if progress.train_seconds else 0.0,
              "skipped_steps": progress.skipped_steps}
    run.record.write("final", **fields)
    run.record.say(f"finished: last epoch top-1 {progress.top1:.2f} % top-5 {progress.top5:.2f} %, best epoch {progress.best_epoch} "
                   f"top-1 {progress.best_top1:.2f} %, {progress.seconds:.0f} s, run folder {run.folder}")
    return fields


def _keep_predictions(run: Run, result: Result) -> None:
    """predictions.npz: for every image of the evaluation, in the data set's order, what the final weights made of it."""
    columns = (result.index, result.first, result.among_five, result.confidence)
    parts = run.world.gather([column.numpy() for column in columns])
    if run.world.main:
        index, first, among_five, confidence = (numpy.concatenate(column) for column in zip(*parts, strict=True))
        content = io.BytesIO()
        numpy.savez_compressed(content, index=index, top1=first, top5=among_five, confidence=confidence)
        checkpoint.write_atomic(run.folder / "predictions.npz", content.getbuffer())


def _save_release(run: Run) -> None:
    """weights.safetensors: the last weights, with the statistics that they were evaluated with."""
    from safetensors.torch import save as to_bytes

    for name, model in (("weights", run.model), *((("weights_ema", run.ema.model),) if run.ema else ())):
        state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
        checkpoint.write_atomic(run.folder / f"{name}.safetensors", to_bytes(state, {"arch": run.arch, "format": "pt"}))
