"""The interface of a feed."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anorm.data.random import stream
from anorm.data.sources.base import Fetched

log = logging.getLogger(__name__)


class Request(NamedTuple):
    """Asks for the samples of one batch: indices (n,) int64; epoch None for the evaluation transform."""

    epoch: int | None
    indices: Tensor


def generators(request: Request, seed: int) -> Sequence[torch.Generator] | None:
    """Return one augmentation stream a sample, None for evaluation."""
    if request.epoch is None:
        return None
    return [stream(seed, "augment", request.epoch, index) for index in request.indices.tolist()]


class Feed(ABC):
    """Answers requests in their order. bad: samples that could not be read so far, index -> message."""

    def __init__(self) -> None:
        self.bad: dict[int, str] = {}

    @abstractmethod
    def run(self, requests: Iterable[Request]) -> Iterator[Fetched]:
        """Yield an answer a request. Another run ends an earlier, unfinished one."""

    def close(self) -> None:
        """Free what the feed holds."""

    def note(self, bad: list[tuple[int, str]]) -> None:
        """Record bad samples; log each once."""
        for index, message in bad:
            if index not in self.bad:
                self.bad[index] = message
                log.warning("skipped (%d so far): %s", len(self.bad), message)
