"""MNIST, USPS, SVHN and MNIST-M in the formats in which they are published, each recognised by its files in a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor

from anorm.data.decode import decode

DIGITS = [str(digit) for digit in range(10)]


class Arrays(NamedTuple):
    """uint8 images (n,3,H,W) and labels (n,) int64, 0 to 9."""

    images: Tensor
    labels: Tensor


def published_digits(folder: Path) -> dict[str, Arrays] | None:
    """Return {"train": ..., "test": ...} of the published set that lies in ``folder``; None where none does.

    MNIST: ``MNIST/raw/train-images-idx3-ubyte`` and so on, or ``raw/``, or the idx files themselves. USPS: ``usps.bz2`` and
    ``usps.t.bz2``. SVHN: ``train_32x32.mat`` and ``test_32x32.mat``; its label 10 is the digit 0. These are read by
    torchvision. MNIST-M (Ganin et al., 2016): ``mnist_m_train/`` and ``mnist_m_test/`` with ``mnist_m_train_labels.txt``
    ("NAME LABEL" a line). Raises ValueError for files that are missing or broken.
    """
    for known, read in FORMATS.items():
        if any((folder / name).exists() for name in known):
            try:
                return {"train": read(folder, True), "test": read(folder, False)}
            except (RuntimeError, OSError, EOFError, LookupError, AssertionError, ValueError) as error:
                raise ValueError(
                    f"{folder} has {known[0]} but not the whole set, or a broken file: {error or type(error).__name__}"
                ) from error
    return None


def _rgb(images: numpy.ndarray) -> Tensor:
    """(n,H,W) gray -> (n,3,H,W)."""
    return torch.from_numpy(numpy.ascontiguousarray(images))[:, None].expand(-1, 3, -1, -1)


def _mnist(folder: Path, train: bool) -> Arrays:
    from torchvision.datasets import mnist

    places = [
        place
        for place in (folder / "MNIST" / "raw", folder / "raw", folder)
        if list(place.glob("*idx3-ubyte"))
    ]
    raw, part = places[0] if places else folder, "train" if train else "t10k"

    def path(kind: str) -> str:
        """Unpacking gives the one name, the published archives the other."""
        dotted = raw / f"{part}-{kind.replace('-idx', '.idx')}-ubyte"
        return str(dotted if dotted.is_file() else raw / f"{part}-{kind}-ubyte")

    images, labels = mnist.read_image_file(path("images-idx3")), mnist.read_label_file(path("labels-idx1"))
    return Arrays(_rgb(images.numpy()), labels)


def _usps(folder: Path, train: bool) -> Arrays:
    from torchvision.datasets import USPS

    found = USPS(str(folder), train=train, download=False)
    return Arrays(_rgb(found.data), torch.tensor(found.targets))


def _svhn(folder: Path, train: bool) -> Arrays:
    from torchvision.datasets import SVHN

    found = SVHN(str(folder), split="train" if train else "test", download=False)
    return Arrays(torch.from_numpy(found.data), torch.from_numpy(found.labels.astype(numpy.int64)))


def _mnist_m(folder: Path, train: bool) -> Arrays:
    part = "train" if train else "test"
    listed = folder / f"mnist_m_{part}_labels.txt"
    names, labels = [], []
    for number, line in enumerate(listed.read_text().splitlines(), 1):
        words = line.split()
        if len(words) != 2 or words[1] not in DIGITS:
            raise ValueError(f"{listed}, line {number}: {line!r} is not 'NAME LABEL' with a label of 0 to 9")
        names.append(words[0])
        labels.append(int(words[1]))
    images = []
    for name in names:
        path = folder / f"mnist_m_{part}" / name
        images.append(decode(torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8), str(path)))
    return Arrays(torch.stack(images), torch.tensor(labels))


FORMATS: dict[tuple[str, ...], Callable[[Path, bool], Arrays]] = {
    ("MNIST/raw", "raw", "train-images-idx3-ubyte", "train-images.idx3-ubyte"): _mnist,
    ("usps.bz2", "usps.t.bz2"): _usps,
    ("train_32x32.mat", "test_32x32.mat"): _svhn,
    ("mnist_m_train_labels.txt", "mnist_m_test_labels.txt"): _mnist_m,
}
