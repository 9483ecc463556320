"""Which images, in which order, in which batches: exact for any number of processes and workers, resumable at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

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
        self.seed, self.global_batch, self.micro_batch, self.rank, self.world = (
            seed,
            global_batch,
            micro_batch,
            rank,
            world,
        )
        self._order = source.train.order
        self._feed = open_feed(source.train, seed, micro_batch, workers, torch.device(device))
        self._finish = _finisher(source.train, device, channels_last)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[Batch]]:
        """This rank's micro-batches of each step from start_step on; nothing before start_step is read."""
        assert 0 <= start_step <= self.steps_per_epoch, (start_step, self.steps_per_epoch)
        fetched = self._feed.run(self._requests(epoch, start_step))
        for _ in range(start_step, self.steps_per_epoch):
            yield [
                self._finish(next(fetched))
                for _ in range(self.global_batch // self.micro_batch // self.world)
            ]

    def micro_batch_number(self, k: int) -> int:
        """The number j in the global batch of the k-th micro-batch that this rank is given in a step."""
        return self.rank + k * self.world

    def _requests(self, epoch: int, start_step: int) -> Iterator[Request]:
        order = self._order(stream(self.seed, "order", epoch), self.global_batch)
        assert order.shape == (self.count,), (order.shape, self.count)
        for step in range(start_step, self.steps_per_epoch):
            micro_batches = order[step * self.global_batch : (step + 1) * self.global_batch].split(
                self.micro_batch
            )
            for indices in micro_batches[self.rank :: self.world]:
                yield Request(epoch, indices)

    @property
    def skipped(self) -> dict[int, str]:
        """Bad files met so far by this process (data.on_error=skip): index -> message."""
        return self._feed.bad

    def close(self) -> None:
        """Ends the workers."""
        self._feed.close()


class EvalLoader:
    """Every image of `dataset` once over all ranks: rank r of `world` takes an unpadded slice, r n/world .. (r+1) n/world.

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
        self._first, self._stop = len(dataset) * rank // world, len(dataset) * (rank + 1) // world
        self._feed = open_feed(dataset, 0, batch, workers, torch.device(device))
        self._finish = _finisher(dataset, device, channels_last)

    def __len__(self) -> int:
        return -(-(self._stop - self._first) // self.batch)

    def __iter__(self) -> Iterator[Batch]:
        images, wanted = 0, self._stop - self._first
        for fetched in self._feed.run(self._requests()):
            images += len(fetched.indices)
            if len(fetched.indices):
                yield self._finish(fetched)
        assert wanted - len(self.skipped) <= images <= wanted, (images, wanted, len(self.skipped))

    def _requests(self) -> Iterator[Request]:
        for start in range(self._first, self._stop, self.batch):
            yield Request(None, torch.arange(start, min(start + self.batch, self._stop)))

    @property
    def skipped(self) -> dict[int, str]:
        return self._feed.bad

    def close(self) -> None:
        self._feed.close()


def _finisher(
    dataset: Dataset, device: torch.device | str, channels_last: bool
) -> Callable[[Fetched], Batch]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return lambda fetched: dataset.finish(fetched, torch.device(device), layout)


def _check_positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
