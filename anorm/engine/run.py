"""A run as plain objects: what ``build`` makes and ``fit`` uses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anorm.config.settings import Settings
from anorm.data.loaders import TrainLoader
from anorm.engine.device import Autocast
from anorm.engine.ema import Ema
from anorm.engine.evaluate import Evaluator
from anorm.engine.record import Record
from anorm.engine.schedule import Schedule
from anorm.processes.world import World
from anorm.tasks.base import Task


@dataclass
class Progress:
    """Where a run stands; all of it is in a checkpoint. seconds: of training and evaluation, over all its parts."""

    step: int = 0
    evaluated: int = 0  # epochs evaluated
    last: dict[str, dict[str, float]] = field(default_factory=dict)  # of the last evaluation: pair -> metrics
    best: float | None = None  # of the task's ``best`` in the first pair
    best_epoch: int = 0
    seconds: float = 0.0
    train_seconds: float = 0.0  # of these, reading and computing training steps that were reported
    train_images: int = 0  # in them
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    epoch_loss: float = 0.0  # of the steps of this epoch that were reported, summed
    epoch_steps: float = 0.0

    @property
    def first(self) -> dict[str, float]:
        """Return the last evaluation's metrics in the first pair of set and statistics; {} before one."""
        return next(iter(self.last.values()), {})

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        """Return what a checkpoint holds. Those of version 0.1, which knew classification alone, have top1, top5, best_top1."""
        if "best_top1" in state:
            state = dict(state)
            best, last = state.pop("best_top1"), {name: state.pop(name) for name in ("top1", "top5")}
            state |= {"best": best, "last": {"val": last}} if best >= 0 else {}
        return cls(**state)


@dataclass
class Run:
    """The parts that ``build`` makes for one process."""

    settings: Settings
    folder: Path
    signature: str
    arch: str
    world: World
    task: Task
    model: nn.Module  # the plain network: its names are those of checkpoints
    plain: (
        nn.Module
    )  # what is called in training, neither compiled nor distributed: the task's module around the model
    network: nn.Module  # what is called in training: compiled, distributed
    evaluated: nn.Module  # what is called in evaluation
    train: TrainLoader
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    autocast: Autocast
    evaluator: Evaluator
    ema: Ema | None
    record: Record
    progress: Progress
    sums: Tensor  # on the device, since the last reading: see Meter
    saved_step: int = -1  # of the last checkpoint that this process wrote

    @property
    def total_steps(self) -> int:
        return self.train.steps_per_epoch * self.settings.epochs

    def close(self) -> None:
        """End the loaders' workers, close the log."""
        self.train.close()
        self.evaluator.close()
        self.record.close()
