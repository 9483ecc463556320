"""What a source of samples is: its data sets, and what the loaders need to know about them."""

from __future__ import annotations

import errno
import functools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from anorm.data import jpeg
from anorm.data.decode import BadImage, decode, decode_window, jpeg_decoder
from anorm.data.transforms import Crop

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ON_ERROR = ("error", "skip")


class Batch(NamedTuple):
    """One micro-batch on its device: what the network takes, what the loss takes, and which samples they are.

    Of labelled images: inputs (n,C,S,S) float32, normalised; targets (n,) int64. Other data sets give whatever their
    task takes. indices (n,) int64, always on the CPU.
    """

    inputs: Any
    targets: Any
    indices: Tensor


class Fetched(Protocol):
    """What loaders and feeds know of the samples that a data set has read, on their way to ``Dataset.finish``.

    indices (n,) int64 on the CPU: the samples that are really there, so n is their count. bad: unreadable samples met on
    the way, (index, message) each. A worker process pickles the whole object. For a GPU torch's DataLoader pins it:
    tensors in named tuples, lists and dicts by itself, an object of another class by its method ``pin_memory()``.
    """

    indices: Tensor
    bad: list[tuple[int, str]]


class Dataset(ABC):
    """The samples of one split, in whatever form their task takes them; loaders know no more of them than this.

    identity: a digest that changes with the samples (names and sizes, or version) and with their classes.
    in_memory: fetching costs so little that worker processes would only slow it down.
    """

    identity: str
    in_memory: bool = False
    holds: ClassVar[str]
    """In words what its samples are."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    def order(self, rng: torch.Generator, global_batch: int) -> Tensor:
        """Return the order of an epoch: a permutation of 0 .. len - 1, int64, drawn from ``rng`` alone.

        The samples k global_batch .. (k+1) global_batch - 1 of it make step k and are cut, in this order, into
        micro-batches. A data set may therefore sort within each step (detection: by aspect ratio, so that a micro-batch
        needs little padding) without changing the step's gradient.
        """
        return torch.randperm(len(self), generator=rng)

    @abstractmethod
    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> Fetched:
        """Read the samples at ``indices`` in a worker: for training with one generator each, for evaluation with None."""

    @abstractmethod
    def finish(self, fetched: Fetched, device: torch.device, memory_format: torch.memory_format) -> Batch:
        """Bring what was fetched to the device, in the training process; n samples may differ in shape until here."""


class FetchedImages(NamedTuple):
    """images uint8 (n,C,S,S), labels (n,) and indices (n,) int64, and the bad files met, (index, message) each.

    With on_error=skip a bad training image is replaced by its next good neighbour (so batches keep their size) and a
    bad evaluation image is left out; `indices` says what is really there.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: list[tuple[int, str]]


class LabelledImages(Dataset):
    """Images of one size with a class each. `labels` is int64 (N,); mean and std (in units of 0..1) have one value a channel.

    loader: which feed brings them to the device, one of `feeds.LOADERS`.
    """

    labels: Tensor
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    loader: str = "torch"
    holds = "images with one class each"

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> FetchedImages: ...

    def finish(
        self, fetched: FetchedImages, device: torch.device, memory_format: torch.memory_format
    ) -> Batch:
        """Copy uint8 to the device and normalise there: (x / 255 - mean) / std."""
        assert len(fetched.images) == len(fetched.labels) == len(fetched.indices), fetched.indices
        images = fetched.images.to(device, non_blocking=True)
        images = torch.sub(images, _levels(self.mean, device)).div_(_levels(self.std, device))
        labels = fetched.labels.to(device, non_blocking=True)
        return Batch(images.contiguous(memory_format=memory_format), labels, fetched.indices)

    def sample(self, index: int, rng: torch.Generator | None) -> tuple[Tensor, int]:
        """Return one image, uint8 (C,S,S), and its label. Raises BadImage."""
        fetched = self.fetch([index], None if rng is None else [rng])
        if not len(fetched.images):
            raise BadImage(fetched.bad[0][1])
        return fetched.images[0], int(fetched.labels[0])


@functools.cache
def _levels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A value a channel in units of 0..255, (1,C,1,1) on the device: sent there once, not with every batch."""
    return (torch.tensor(values) * 255).view(1, -1, 1, 1).to(device)


class Absent(Dataset):
    """In place of a training set that is not there: whatever is asked of it raises ValueError with ``words``.

    A source without one can still be evaluated on.
    """

    identity = "absent"

    def __init__(self, words: str):
        self.words = words

    def __len__(self) -> int:
        raise ValueError(self.words)

    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> Fetched:
        raise ValueError(self.words)

    def finish(self, fetched: Fetched, device: torch.device, memory_format: torch.memory_format) -> Batch:
        raise ValueError(self.words)


@dataclass(frozen=True)
class Source:
    """What a run trains on and is judged by.

    evals: evaluation sets by name; the first, `val`, is the one that chooses the best weights. classes: their names.
    identity: a digest that changes with the data (file names and sizes, or version).
    """

    train: Dataset
    evals: dict[str, Dataset]
    classes: list[str]
    identity: str

    def __post_init__(self):
        assert self.evals, "a source needs an evaluation set"

    @property
    def val(self) -> Dataset:
        return next(iter(self.evals.values()))

    @property
    def mean(self) -> tuple[float, ...]:
        return self.val.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.val.std

    @property
    def image_size(self) -> int:
        return self.val.image_size

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class Store(Protocol):
    """Where encoded images lie: in files, in tar shards, behind a timm reader."""

    labels: Tensor

    def read(self, index: int) -> Tensor:
        """Return the file's bytes, uint8 (n,). Several threads may call it at once."""

    def name(self, index: int) -> str:
        """Return what messages and lists call it; printable."""

    def digest(self) -> str:
        """Return a digest that changes with the images and their classes."""


class EncodedImages(LabelledImages):
    """Image files of any store, decoded and cropped when fetched."""

    def __init__(
        self,
        store: Store,
        crop: Crop,
        on_error: str,
        loader: str = "torch",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        if on_error not in ON_ERROR:
            raise ValueError(
                f"data.on_error={on_error!r} is unknown: choose error (stop) or skip (count and list)"
            )
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"data.mean={list(mean)} and data.std={list(std)} need three values each, std above zero"
            )
        self.store, self.crop, self.on_error, self.loader = store, crop, on_error, loader
        self.labels, self.image_size = store.labels, crop.image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.identity = store.digest()
        # compiled and imported now, once, and not in every worker
        jpeg.why_not()
        jpeg_decoder()

    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> FetchedImages:
        size = self.image_size
        # the layout that the resize kernel writes, so that this is one plain copy an image
        images = torch.empty(
            (len(indices), 3, size, size), dtype=torch.uint8, memory_format=torch.channels_last
        )
        kept, bad = [], []
        for position, index in enumerate(indices):
            found = self._sample(int(index), None if rngs is None else rngs[position], bad)
            if found is not None:
                images[len(kept)], at = found
                kept.append(at)
        kept = torch.tensor(kept, dtype=torch.int64)
        return FetchedImages(images[: len(kept)], self.labels[kept], kept, bad)

    def decoded(self, index: int) -> Tensor:
        """Return the whole image, uint8 (3,H,W). Raises BadImage."""
        return decode(self.read(index), self.store.name(index))

    def read(self, index: int) -> Tensor:
        """Return the file's bytes, uint8 (n,). Raises BadImage for a file that is gone, or that its disk does not give."""
        try:
            return self.store.read(index)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise  # nothing is wrong with the file
            raise BadImage(f"{self.store.name(index)} cannot be read ({error.strerror or error})") from error

    def _sample(
        self, index: int, rng: torch.Generator | None, bad: list[tuple[int, str]]
    ) -> tuple[Tensor, int] | None:
        """Return the image, uint8 (3,S,S), and its index. If it is bad: in training the next good one, else None."""
        for at in (index,) if rng is None else range(index, index + len(self)):
            at %= len(self)
            try:
                if rng is None:
                    return self.crop.evaluate(self.decoded(at)), at
                # a clone: a bad file takes no draws from its neighbour
                return self._cropped(at, rng.clone_state()), at
            except BadImage as error:
                if self.on_error == "error":
                    raise error.with_advice from error
                bad.append((at, str(error)))
        if rng is None:
            return None
        raise BadImage(f"every one of the {len(self)} training images is unreadable; the first: {bad[0][1]}")

    def _cropped(self, index: int, rng: torch.Generator) -> Tensor:
        pixels, window = decode_window(
            self.read(index),
            self.store.name(index),
            lambda height, width: self.crop.window(height, width, rng),
        )
        return self.crop.train(pixels, window)
