"""A run as plain objects: what ``build`` makes and ``fit`` uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anorm.config.settings import Settings
from anorm.data.loaders import TrainLoader
from anorm.data.mixing import Mixing
from anorm.engine.device import Autocast
from anorm.engine.ema import Ema
from anorm.engine.evaluate import Evaluator
from anorm.engine.record import Record
from anorm.engine.schedule import WarmupCosine
from anorm.processes.world import World


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
    skipped_in_a_row: int = 0


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
    autocast: Autocast
    evaluator: Evaluator
    ema: Ema | None
    record: Record
    progress: Progress
    sums: Tensor  # on the device, since the last reading: loss, steps, steps skipped, first bad step + 1
    saved_step: int = -1  # of the last checkpoint that this process wrote

    @property
    def total_steps(self) -> int:
        return self.train.steps_per_epoch * self.settings.epochs

    def close(self) -> None:
        """End the loaders' workers, close the log."""
        self.train.close()
        self.evaluator.val.close()
        self.record.close()
