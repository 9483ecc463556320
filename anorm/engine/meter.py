"""Time and numbers of a running training: what is measured, and when the device is asked for it."""

from __future__ import annotations

import time
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anorm.config.settings import Settings

if TYPE_CHECKING:
    from anorm.engine.run import Progress, Run


HOPELESS = 50
"""Steps in a row whose gradients overflow before a run is given up: a loss scale of 2^16 is halved below 2^-33 by them."""


class NotFinite(Exception):
    """Raised in every process when training cannot go on: a loss, or gradients over and over, are not finite."""

    def __init__(self, step: int, words: str = ""):
        super().__init__(step)
        self.step, self.words = step, words


class Clock:
    """Adds the time since the last tick to the run's seconds."""

    def __init__(self, progress: Progress):
        self.progress, self._last = progress, time.perf_counter()

    def tick(self) -> None:
        now = time.perf_counter()
        self.progress.seconds += now - self._last
        self._last = now


class SaveTimer:
    """When a checkpoint is due besides the end of an epoch."""

    def __init__(self, settings: Settings):
        self.steps, self.seconds = settings.checkpoint.every_steps, 60 * settings.checkpoint.every_minutes
        self.restart()

    def restart(self) -> None:
        self._since = time.monotonic()

    def now(self, step: int) -> bool:
        """Return whether a checkpoint is due; once for each, as several processes save at the next step boundary."""
        late = self.seconds and time.monotonic() - self._since > self.seconds
        if late:
            self.restart()
        return bool(late or (self.steps and step % self.steps == 0))


class Meter:
    """The numbers of training, summed on the device and read when reported; counts from the last report on.

    ``run.sums`` holds the loss, steps, steps skipped, the first bad step + 1, and the terms of the loss where the task
    has several. It is in the checkpoint, so that a resumed run's log has the same values as an uninterrupted one's.
    """

    @staticmethod
    def nothing(losses: tuple[str, ...], device: torch.device) -> Tensor:
        """Return ``run.sums`` before the first step."""
        return torch.zeros(4 + (len(losses) if len(losses) > 1 else 0), dtype=torch.float64, device=device)

    def __init__(self, run: Run, clock: Clock):
        self.run, self.clock, self.wait, self.steps, self.since = run, clock, 0.0, 0, time.perf_counter()

    def waiting(self, batches):
        """Yield ``batches``; add the time that each was waited for."""
        batches = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.wait += time.perf_counter() - start
            yield batch

    def add(self, step: int, losses: list[Tensor], gradient_norm: Tensor) -> None:
        """Add a step's losses, the terms of this process, finite or not. Remember the run's first step with a bad loss, or a
        bad gradient that a loss scale does not explain.
        """
        sums, run = self.run.sums, self.run
        loss = reduce(torch.add, losses)
        good_loss, good = loss.isfinite(), gradient_norm.isfinite()
        sums[0] += loss
        sums[1] += 1
        sums[2] += (good_loss & ~good) if run.scaler.is_enabled() else 0
        bad = ~good_loss if run.scaler.is_enabled() else ~(good_loss & good)
        sums[3] = torch.where((sums[3] == 0) & bad, float(step + 1), sums[3])
        if len(losses) > 1:
            sums[4:] += torch.stack(losses)
        self.steps += 1
        if sums.device.type == "cpu" and run.world.size == 1 and sums[3] > 0:
            self._stop()  # of several all must come to it: in report()

    def report(self, epoch: int, rate: float) -> None:
        run, world, progress = self.run, self.run.world, self.run.progress
        sums = world.sum(run.sums.clone())
        loss_sum, steps, skipped, bad, *terms = sums.tolist()
        if bad:
            self._stop()
        run.sums.zero_()
        progress.epoch_loss += loss_sum / world.size
        progress.epoch_steps += steps / world.size
        progress.skipped_steps += int(skipped / world.size)
        in_a_row = progress.skipped_in_a_row + int(steps / world.size)
        progress.skipped_in_a_row = in_a_row if skipped == steps else 0
        if progress.skipped_in_a_row >= HOPELESS:
            raise NotFinite(
                progress.step - 1,
                f"the gradients of the last {progress.skipped_in_a_row} steps overflowed, now at a loss scale of "
                f"{run.scaler.get_scale():.3g}, and nothing is learned: ",
            )
        seconds = time.perf_counter() - self.since
        progress.train_seconds += seconds
        images = run.settings.optim.global_batch * self.steps
        progress.train_images += images
        speed = images / seconds
        fields = {
            "step": progress.step,
            "epoch": epoch + 1,
            "loss": loss_sum / steps,
            "lr": rate,
            "images_per_second": speed,
            "data_wait": self.wait / seconds,
            "memory_mib": _peak_memory(world.device),
        }
        fields |= {name: term / steps for name, term in zip(run.task.losses, terms, strict=False)}
        if run.scaler.is_enabled():
            fields |= {"loss_scale": run.scaler.get_scale(), "skipped_steps": progress.skipped_steps}
        run.record.write("train", **fields)
        run.record.progress(
            progress.step,
            f"epoch {epoch + 1}/{run.settings.epochs} step {progress.step}/{run.total_steps} "
            f"loss {fields['loss']:.4f} lr {rate:.5f} {speed:.0f} images/s wait "
            f"{100 * fields['data_wait']:.0f} %",
        )
        self.wait, self.steps, self.since = 0.0, 0, time.perf_counter()

    def epoch_mean(self) -> float:
        """Return the mean loss of an epoch's steps over all processes, from their reports; the next epoch begins.

        Reports cut the sum anywhere without changing it: losses are float32 or less precise, and float64 holds sums of a
        million of one size exactly.
        """
        progress = self.run.progress
        mean = progress.epoch_loss / progress.epoch_steps
        progress.epoch_loss = progress.epoch_steps = 0.0
        return mean

    def _stop(self) -> None:
        """Raise NotFinite for the first bad step of any process. Called by every process."""
        run = self.run
        first = min((step for step in run.world.gather(int(run.sums[3])) if step), default=1)
        raise NotFinite(run.world.broadcast(first) - 1)


def _peak_memory(device: torch.device) -> float:
    """Return the peak of the device's allocator, or of this process, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
