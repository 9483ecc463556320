"""How images get from where they lie to the device; a feed decides nothing about which images, or how they are cropped."""

from __future__ import annotations

import torch

from anorm.data.feeds.base import Feed, Request
from anorm.data.sources.base import Dataset

__all__ = ["Feed", "Request", "open_feed", "LOADERS"]

LOADERS = ("torch", "device", "dali")


def open_feed(dataset: Dataset, seed: int, batch: int, workers: int, device: torch.device) -> Feed:
    """The feed that `dataset.loader` names. batch: the largest number of images that will be asked for at once."""
    if workers < 0:
        raise ValueError(f"hardware.workers={workers} must not be negative")
    if dataset.loader not in LOADERS:
        raise ValueError(f"data.loader={dataset.loader!r} is unknown: choose one of {', '.join(LOADERS)}")
    if dataset.loader == "device":
        from anorm.data.feeds.device import DeviceFeed

        return DeviceFeed(dataset, seed, workers, device)
    if dataset.loader == "dali":
        from anorm.data.feeds.dali import DaliFeed

        return DaliFeed(dataset, seed, batch, workers, device)
    from anorm.data.feeds.workers import WorkerFeed

    return WorkerFeed(dataset, seed, 0 if dataset.in_memory else workers, device)
