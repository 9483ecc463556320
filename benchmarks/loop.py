"""What the training loop costs beside a bare PyTorch loop of the same network: data, rates, mixing, records, agreement.

    python -m benchmarks.loop [key=value ...]        more arguments of train.py, such as arch=resnet50 hardware=gpu

Both train the same network on synthetic images; the bare loop has one normalised batch that never changes.
They take turns, an epoch of ours and as many bare steps, and the median of the ratios of their images/s is given.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
from anorm.build import build
from anorm.config.frozen import Config
from anorm.engine.fit import garbage_collected_at_reports, train_epoch
from anorm.engine.meter import Clock, SaveTimer
from anorm.engine.run import Run
from anorm.processes.errors import user_errors
from anorm.processes.world import Agreement, enter

STEPS, ROUNDS = 8, 11
DEFAULTS = [
    "arch=resnet18",
    "norm=an",
    "data=synthetic",
    "data.image_size=64",
    f"data.train_images={32 * STEPS}",
    "batch_size=32",
    "optim.global_batch=32",
    f"epochs={ROUNDS + 2}",
    "schedule.warmup_epochs=1",
    "checkpoint.every_minutes=0",
]


def main(argv: list[str]) -> int:
    """Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="arguments of train.py")
    argv = parser.parse_args(argv).overrides
    with user_errors() as outcome:
        config = Config.compose(ROOT / "configs", [*DEFAULTS, *argv]).on()
        with enter(None, config.settings.hardware.device) as world, tempfile.TemporaryDirectory() as folder:
            run = build(config, Path(folder), "benchmark", world, None)
            bare = bare_loop(run)
            with garbage_collected_at_reports():
                ratios = [ratio(run, bare, epoch) for epoch in range(ROUNDS + 2)][2:]
            run.close()
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"images/s of the training loop / of a bare loop: {middle:.3f} [{low:.3f}, {high:.3f}]")
    return outcome.status


def ratio(run: Run, bare, epoch: int) -> float:
    """Seconds of the bare loop / seconds of ours, for an epoch's steps."""
    agreement, clock = Agreement(run.world), Clock(run.progress)
    start = time.perf_counter()
    train_epoch(run, epoch, 0, agreement, SaveTimer(run.settings), clock)
    ours = time.perf_counter() - start
    agreement.close()
    start = time.perf_counter()
    bare(run.train.steps_per_epoch)
    return (time.perf_counter() - start) / ours


def bare_loop(run: Run):
    """(steps) -> None: what a first script would hold."""
    model = copy.deepcopy(run.model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    images, labels, _ = next(iter(run.train.epoch(0, 0)))[0]

    def steps(number: int) -> None:
        for _ in range(number):
            with run.autocast():
                loss = F.cross_entropy(model(images), labels)
            run.scaler.scale(loss).backward()
            run.scaler.step(optimizer)
            run.scaler.update()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # a GPU is asked to finish

    return steps


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
