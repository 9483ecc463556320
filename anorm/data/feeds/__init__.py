"""Ways of samples from where they lie to the training process. A feed decides neither which samples, nor their crops."""

from __future__ import annotations

import torch

from anorm.data.feeds.base import Feed, Request
from anorm.data.sources.base import Dataset, LabelledImages

__all__ = ["Feed", "Request", "open_feed", "LOADERS"]

LOADERS = ("torch", "device", "dali")


def open_feed(dataset: Dataset, seed: int, batch: int, workers: int, device: torch.device) -> Feed:
    """Return the feed that the data set names; only labelled images have a choice. batch: samples asked for at once, at most."""
    if workers < 0:
        raise ValueError(f"hardware.workers={workers} must not be negative")
    loader = dataset.loader if isinstance(dataset, LabelledImages) else "torch"
    if loader not in LOADERS:
        raise ValueError(f"data.loader={loader!r} is unknown: choose one of {', '.join(LOADERS)}")
    if loader == "device":
        from anorm.data.feeds.device import DeviceFeed

        return DeviceFeed(dataset, seed, workers, device)
    if loader == "dali":
        from anorm.data.feeds.dali import DaliFeed

        return DaliFeed(dataset, seed, batch, workers, device)
    from anorm.data.feeds.workers import WorkerFeed

    return WorkerFeed(dataset, seed, 0 if dataset.in_memory else workers, device)
