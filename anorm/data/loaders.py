"""Which images, in which order, in which batches: exact for any number of processes and workers, resumable at any step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from anorm.data.feeds import Request, open_feed
from anorm.data.random import stream
from anorm.data.sources.base import Batch, Dataset, Fetched, Source


class TrainLoader:
    """The training images of `source`, one list of micro-batches an optimizer step.

    A global batch is `global_batch` images next to each other in the epoch's order; it is cut, in that order, into
    micro-batches of `micro_batch` images numbered j = 0 .. global_batch / micro_batch - 1. Rank r of `world` takes the
    micro-batches r, r + world, ...: 1, 4 or 8 processes work on the same micro-batches. The images left over at the
    end of an epoch, fewer than a global batch, are dropped (every epoch others, as the order changes).
    The order is drawn from (seed, "order", epoch), an image's augmentation from (seed, "augment", epoch, index).

    workers: processes that read and decode; none are used for a source in memory, 0 reads in this process.
    Raises ValueError for sizes that do not fit together or are not positive.
    """

    def __init__(
        self,
        source: Source,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ):
        _check_positive(global_batch=global_batch, micro_batch=micro_batch, world=world)
        assert 0 <= rank < world, (rank, world)
        if global_batch % (micro_batch * world):
            raise ValueError(
                f"a global batch of {global_batch} images is not a multiple of {world} processes x "
                f"{micro_batch} images: change optim.global_batch or batch_size"
            )
        self.count = len(source.train)
        self.steps_per_epoch = self.count // global_batch
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"the training set has {self.count} images, fewer than one global batch of {global_batch}: "
                "lower optim.global_batch (and batch_size), or add images"
            )
        self.seed, self.global_batch, self.micro_batch = seed, global_batch, micro_batch
        self.rank, self.world = rank, world
        self._order = source.train.order
        self._feed = open_feed(source.train, seed, micro_batch, workers, torch.device(device))
        self._finish = _to_batches_on(device, source.train, channels_last)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step from start_step on; nothing before start_step is read."""
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        fetched = self._feed.run(self._requests(epoch, start_step))
        for _ in range(start_step, self.steps_per_epoch):
            mine = self.global_batch // self.micro_batch // self.world
            yield [self._finish(next(fetched)) for _ in range(mine)]

    def micro_batch_number(self, k: int) -> int:
        """Return the number j in the global batch of the k-th micro-batch that this rank is given in a step."""
        return self.rank + k * self.world

    def _requests(self, epoch: int, start_step: int) -> Iterator[Request]:
        order = self._order(stream(self.seed, "order", epoch), self.global_batch)
        assert order.shape == (self.count,), (order.shape, self.count)
        for step in range(start_step, self.steps_per_epoch):
            global_batch = order[step * self.global_batch : (step + 1) * self.global_batch]
            for indices in global_batch.split(self.micro_batch)[self.rank :: self.world]:
                yield Request(epoch, indices)

    @property
    def skipped(self) -> dict[int, str]:
        """Bad samples met so far by this process (data.on_error=skip): index -> message."""
        return self._feed.bad

    def close(self) -> None:
        """End the workers."""
        self._feed.close()


class Batches(NamedTuple):
    """How the images of an evaluation come together, where an answer depends on the others in the batch.

    order: "shuffled" (a permutation of the set, drawn from seed) or "classes" (class by class, as a folder lies).
    """

    size: int
    order: str = "shuffled"
    seed: int = 0

    def __str__(self) -> str:
        return f"batches of {self.size}, " + (
            f"shuffled by seed {self.seed}" if self.order == "shuffled" else "by class"
        )

    def indices(self, dataset: Dataset) -> list[tuple[Tensor, int]]:
        """Return the samples of each batch and how many of them, from its first on, count in it.

        Each sample counts once. The last batch is filled with samples from the start of the order, which do not count in
        it, so that none is smaller than asked; a set smaller than a batch is one batch.
        """
        count = len(dataset)
        if self.order == "shuffled":
            order = torch.randperm(count, generator=stream(self.seed, "evaluation order"))
        else:
            assert self.order == "classes", self.order
            if not hasattr(dataset, "labels"):
                raise ValueError("eval.order=classes is for images with one class each: use eval.order=shuffled")
            order = torch.argsort(dataset.labels, stable=True)
        found = [(part, len(part)) for part in order.split(self.size)]
        last, counted = found[-1]
        if len(found) > 1:
            found[-1] = (torch.cat([last, order[: self.size - counted]]), counted)
        return found


class EvalLoader:
    """Every image of `dataset` once over all ranks: rank r of `world` takes an unpadded slice, r n/world .. (r+1) n/world.

    ``together`` gives the same images in whole batches, for evaluations in which a batch's images matter to each other.
    identity: of the dataset. Yields `Batch`es; the last may be smaller, and a rank may have none. `skipped`
    lists images left out because data.on_error=skip; with data.on_error=error (the default) the sum over
    ranks is exactly len(dataset).
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ):
        _check_positive(batch=batch, world=world)
        assert 0 <= rank < world, (rank, world)
        self.batch, self.dataset, self.identity = batch, dataset, dataset.identity
        self._rank, self._world, self._together = rank, world, None
        self._first, self._stop = len(dataset) * rank // world, len(dataset) * (rank + 1) // world
        self._feed = open_feed(dataset, 0, batch, workers, torch.device(device))
        self._finish = _to_batches_on(device, dataset, channels_last)

    def together(self, batches: Batches) -> EvalLoader:
        """Return a loader of the same images in ``batches``: rank r takes the batches r, r + world, ..., so that every
        batch is the same for any number of processes. It has the same workers.

        An image that only fills a batch is in ``Batch.inputs`` and ``targets``, behind those that count, and not in
        ``Batch.indices``.
        """
        found = copy.copy(self)
        found.batch, found._together = batches.size, batches.indices(self.dataset)[self._rank :: self._world]
        return found

    def __len__(self) -> int:
        if self._together is not None:
            return len(self._together)
        return -(-(self._stop - self._first) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        images, wanted = 0, self._stop - self._first
        if self._together is not None:
            wanted = sum(counted for _, counted in self._together)
        for number, fetched in enumerate(self._feed.run(self._requests())):
            if not len(fetched.indices):
                continue
            batch = self._finish(fetched)
            if self._together is not None:
                indices, counted = self._together[number]
                if counted < len(indices):
                    batch = batch._replace(
                        indices=fetched.indices[torch.isin(fetched.indices, indices[:counted])]
                    )
            images += len(batch.indices)
            yield batch
        assert wanted - len(self.skipped) <= images <= wanted, (images, wanted, len(self.skipped))

    def _requests(self) -> Iterator[Request]:
        if self._together is not None:
            yield from (Request(None, indices) for indices, _ in self._together)
            return
        for start in range(self._first, self._stop, self.batch):
            yield Request(None, torch.arange(start, min(start + self.batch, self._stop)))

    def batch_of(self, indices: Tensor) -> Batch:
        """Return some images as a batch, read in this process."""
        return self._finish(self.dataset.fetch(indices.tolist(), None))

    @property
    def skipped(self) -> dict[int, str]:
        return self._feed.bad

    def close(self) -> None:
        self._feed.close()


def _to_batches_on(
    device: torch.device | str, dataset: Dataset, channels_last: bool
) -> Callable[[Fetched], Batch]:
    """Return what makes a batch on the device of samples that were fetched."""
    device, layout = torch.device(device), torch.channels_last if channels_last else torch.contiguous_format
    return lambda fetched: dataset.finish(fetched, device, layout)


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
