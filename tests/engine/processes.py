"""train.py in processes of its own, and what they leave."""


import fake_slurm
import torch
from commands import (
    ROOT,
    SMALL,
    children_of,
    environment,
    run_train,
    script,
    start_torchrun,
    start_train,
    train,
)

from anorm.engine.record import read_metrics

__all__ = [
    "ROOT",
    "SMALL",
    "children_of",
    "environment",
    "events",
    "fake_slurm",
    "ranks_of",
    "run_train",
    "script",
    "start_torchrun",
    "start_train",
    "train",
    "weights",
]


def events(folder, kind):
    return [line for line in read_metrics(folder) if line["event"] == kind]


def weights(folder, name="last.ckpt"):
    return torch.load(folder / name, weights_only=True)


def ranks_of(launcher):
    """Process ids of the ranks of our launcher, in the order of their start."""
    return children_of(launcher, "spawn_main")
