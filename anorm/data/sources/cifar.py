"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), as torchvision downloads them or as class folders, and their corrupted sets."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy
import torch
from torch import Tensor

from anorm.data.augment import Augment
from anorm.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from anorm.data.decode import decode
from anorm.data.index import index_folder
from anorm.data.random import stream
from anorm.data.sources.base import Absent, Dataset, FetchedImages, LabelledImages, Source
from anorm.data.sources.folder import FolderStore, check_same_classes
from anorm.data.sources.stored import StoredImages, content_digest
from anorm.words import nearest

LIKE = "like"
MEANS = {10: (0.4914, 0.4822, 0.4465), 100: (0.5071, 0.4865, 0.4409)}
STDS = {10: (0.2470, 0.2435, 0.2616), 100: (0.2673, 0.2564, 0.2762)}
"""Of all pixels of the training images. The widespread (0.2023, 0.1994, 0.2010) is the mean of the images' own."""


def cifar10(
    root: str | Path | None = None,
    held_out: int = 0,
    pad: int = 4,
    flip: bool = True,
    rotation: float = 0.0,
    autoaugment: str | None = None,
    jitter: float = 0.0,
    grayscale: float = 0.0,
    mean: Sequence[float] = MEANS[10],
    std: Sequence[float] = STDS[10],
    corrupted: Path | Literal["like"] | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    corrupted_images: int | None = None,
) -> Source:
    """CIFAR-10 in ``root``: ``cifar-10-batches-py``, as torchvision downloads it, or class folders in train and test (or val).

    held_out: training images, as many of each class, drawn once whatever the run's seed, that are kept from training to
    be the evaluation set ``val``; ``test`` is then the second set. With 0, as in most papers, there is ``test`` alone,
    and the best epoch is chosen on it.
    pad, flip: random shift and mirroring in training (He et al., 2016); rotation .. grayscale: see ``Augment``.
    corrupted: a folder with CIFAR-10-C's npy files, whose sets are then called cifar10_c-NAME-SEVERITY, or "like" for
    corruptions made here (``anorm.data.corruptions``), cifar10_c_like-NAME-SEVERITY. corruptions, severities: some of
    them only. corrupted_images: only so many images of each set, the same ones in all.
    Raises ValueError, in words, for files that are missing or broken and for impossible options.
    """
    return _cifar(10, **locals())


def cifar100(
    root: str | Path | None = None,
    held_out: int = 0,
    pad: int = 4,
    flip: bool = True,
    rotation: float = 0.0,
    autoaugment: str | None = None,
    jitter: float = 0.0,
    grayscale: float = 0.0,
    mean: Sequence[float] = MEANS[100],
    std: Sequence[float] = STDS[100],
    corrupted: Path | Literal["like"] | None = None,
    corruptions: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    corrupted_images: int | None = None,
) -> Source:
    """CIFAR-100 in ``root`` (``cifar-100-python``, or class folders), its fine labels; else as ``cifar10``."""
    return _cifar(100, **locals())


def _cifar(
    count: int,
    root: str | Path | None,
    held_out: int,
    pad: int,
    flip: bool,
    rotation: float,
    autoaugment: str | None,
    jitter: float,
    grayscale: float,
    mean: Sequence[float],
    std: Sequence[float],
    corrupted: Path | str | None,
    corruptions: Sequence[str] | None,
    severities: Sequence[int],
    corrupted_images: int | None,
) -> Source:
    if root is None:
        raise ValueError(
            f"data.root is not set: give the folder that holds {_published(count)[0]}, or train and test"
        )
    folder = Path(root).expanduser()
    learned, (test_images, test_labels), classes = _read(folder, count)
    augment = Augment(rotation, autoaugment, jitter, grayscale)
    levels = {"mean": mean, "std": std}
    test = StoredImages(test_images, test_labels, **levels)
    evals: dict[str, LabelledImages] = {"test": test}
    train: Dataset = Absent(
        f"{folder} has test images and no folder train: without training images the network can be evaluated only"
    )
    if learned:
        images, labels = learned
        keep, out = _split(labels, held_out, count)
        train = StoredImages(images[keep], labels[keep], pad=pad, flip=flip, augment=augment, **levels)
    if learned and held_out:
        evals = {"val": StoredImages(images[out], labels[out], **levels)} | evals
    if corrupted is not None:
        evals |= _corrupted(count, test, corrupted, corruptions, severities, corrupted_images)
    elif corruptions is not None or corrupted_images is not None:
        raise ValueError(
            "data.corruptions and data.corrupted_images choose among corrupted sets: set data.corrupted=like, or to the "
            f"folder with CIFAR-{count}-C's npy files"
        )
    identity = hashlib.blake2b((train.identity + test.identity).encode(), digest_size=16).hexdigest()
    return Source(train, evals, classes, f"cifar{count}-{identity}")


# ---- reading


def _published(count: int) -> tuple[str, str]:
    """The folder that torchvision unpacks, and its class of that set."""
    return ("cifar-10-batches-py", "CIFAR10") if count == 10 else ("cifar-100-python", "CIFAR100")


def _read(folder: Path, count: int) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor], list[str]]:
    """(training images and labels, or None where there is no folder of them, test images and labels, classes)."""
    unpacked, reader = _published(count)
    if (folder / unpacked).is_dir():
        return _from_torchvision(folder, reader)
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if test is None:
        raise ValueError(
            f"{folder} holds neither {unpacked} nor the class folders train and test. To fetch it:\n"
            f'  python -c "from torchvision.datasets import {reader}; {reader}({str(folder)!r}, download=True)"'
        )
    indices = [index_folder(test)]
    if (folder / "train").is_dir():
        indices = [index_folder(folder / "train"), *indices]
        check_same_classes(*(index.classes for index in indices))
    if len(indices[0].classes) != count:
        raise ValueError(
            f"{indices[0].folder} has {len(indices[0].classes)} class folders; CIFAR-{count} has {count}: set "
            "data.root, or use data=imagefolder for another set"
        )
    parts = []
    for index in indices:
        store = FolderStore(index)
        images = torch.empty(len(index), 3, 32, 32, dtype=torch.uint8)
        for i in range(len(index)):
            image = decode(store.read(i), store.name(i))
            if image.shape != (3, 32, 32):
                raise ValueError(
                    f"{store.name(i)} is {image.shape[1]} x {image.shape[2]} pixels; CIFAR has 32 x 32"
                )
            images[i] = image
        parts.append((images, store.labels))
    return (parts[0] if len(parts) == 2 else None), parts[-1], list(indices[0].classes)


def _from_torchvision(
    folder: Path, reader: str
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], list[str]]:
    from torchvision import datasets

    parts = []
    try:
        for train in (True, False):
            found = getattr(datasets, reader)(str(folder), train=train, download=False)
            images = torch.from_numpy(numpy.ascontiguousarray(found.data.transpose(0, 3, 1, 2)))
            parts.append((images, torch.tensor(found.targets)))
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{folder} holds a {reader} that cannot be read ({error}): remove it and fetch it anew:\n"
            f'  python -c "from torchvision.datasets import {reader}; {reader}({str(folder)!r}, download=True)"'
        ) from error
    return parts[0], parts[1], list(found.classes)


def _split(labels: Tensor, held_out: int, classes: int) -> tuple[Tensor, Tensor]:
    """(indices to train on, indices held out: as many of each class, drawn by a seed of its own)."""
    smallest = int(torch.bincount(labels, minlength=classes).min())
    if held_out < 0 or held_out % classes or held_out // classes >= smallest:
        raise ValueError(
            f"data.held_out={held_out} must be a multiple of the {classes} classes, and leave images of each "
            f"({smallest} of the smallest)"
        )
    out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(classes):
        members = torch.nonzero(labels == label).flatten()
        draws = stream(0, "cifar held out", label)
        out[members[torch.randperm(len(members), generator=draws)[: held_out // classes]]] = True
    return torch.nonzero(~out).flatten(), torch.nonzero(out).flatten()


# ---- corrupted sets


class CorruptedImages(LabelledImages):
    """Images of another set, corrupted when they are fetched. Only for evaluation. There may be 95 such sets, too many for
    workers of their own.
    """

    in_memory = True

    def __init__(self, clean: StoredImages, chosen: Tensor, name: str, severity: int):
        self.clean, self.chosen, self.name, self.severity = clean, chosen, name, severity
        self.labels, self.image_size, self.mean, self.std = clean.labels[chosen], 32, clean.mean, clean.std
        words = f"{clean.identity} {name} {severity} {_digest(chosen)}"
        self.identity = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()

    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> FetchedImages:
        assert rngs is None, "corrupted images are for evaluation"
        index = torch.as_tensor(indices, dtype=torch.int64)
        numbers = self.chosen[index]
        images = corrupt(self.clean.images[numbers], self.name, self.severity, numbers.tolist())
        return FetchedImages(images, self.labels[index], index, [])


class PublishedCorruption(LabelledImages):
    """One severity of an npy file of CIFAR-10-C: 10,000 rows a severity, read when they are fetched."""

    in_memory = True

    def __init__(self, rows: numpy.ndarray, labels: Tensor, chosen: Tensor, path: Path, like: StoredImages):
        self.rows, self.chosen, self.labels = rows, chosen, labels[chosen]
        self.image_size, self.mean, self.std = 32, like.mean, like.std
        words = f"{path.name} {path.stat().st_size} {_digest(labels)} {_digest(chosen)}"
        self.identity = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()

    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> FetchedImages:
        assert rngs is None, "corrupted images are for evaluation"
        index = torch.as_tensor(indices, dtype=torch.int64)
        images = torch.from_numpy(self.rows[self.chosen[index].numpy()]).permute(0, 3, 1, 2)
        return FetchedImages(images, self.labels[index], index, [])


def _corrupted(
    count: int,
    test: StoredImages,
    place: Path | str,
    names: Sequence[str] | None,
    severities: Sequence[int],
    images: int | None,
) -> dict[str, LabelledImages]:
    names = list(CORRUPTIONS) if names is None else list(names)
    for name in names:
        if name not in CORRUPTIONS:
            raise ValueError(
                f"data.corruptions: {name!r} is unknown{nearest(name, CORRUPTIONS, 'corruptions')}"
            )
    if not severities or not set(severities) <= set(SEVERITIES):
        raise ValueError(f"data.severities={list(severities)} must be some of 1, 2, 3, 4, 5")
    if place == LIKE:
        chosen = _chosen(len(test), images)
        return {
            f"cifar{count}_c_like-{name}-{severity}": CorruptedImages(test, chosen, name, severity)
            for name in names
            for severity in severities
        }
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"data.corrupted={place} is not a folder: give the one that holds CIFAR-{count}-C's npy files "
            "(zenodo.org/records/2535967 for CIFAR-10-C, 3555552 for CIFAR-100-C), or data.corrupted=like"
        )
    missing = [f"{name}.npy" for name in (*names, "labels") if not (folder / f"{name}.npy").is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {', '.join(missing[:3])}{f' and {len(missing) - 3} more' if len(missing) > 3 else ''} of "
            f"CIFAR-{count}-C: unpack the whole archive there, or choose data.corruptions"
        )
    labels = torch.from_numpy(_load(folder / "labels.npy").astype(numpy.int64))
    if labels.ndim != 1 or len(labels) % 5 or not len(labels) or labels.min() < 0 or labels.max() >= count:
        raise ValueError(
            f"{folder / 'labels.npy'} must hold five times the labels of the test images, 0 to {count - 1}"
        )
    each = len(labels) // 5
    chosen, found = _chosen(each, images), {}
    for name in names:
        path = folder / f"{name}.npy"
        rows = _load(path)
        if rows.dtype != numpy.uint8 or rows.shape != (5 * each, 32, 32, 3):
            raise ValueError(
                f"{path} holds {rows.dtype} {list(rows.shape)}; of {5 * each} labels it must be uint8 "
                f"[{5 * each}, 32, 32, 3]"
            )
        for severity in severities:
            at = slice((severity - 1) * each, severity * each)
            found[f"cifar{count}_c-{name}-{severity}"] = PublishedCorruption(
                rows[at], labels[at], chosen, path, test
            )
    return found


def _load(path: Path) -> numpy.ndarray:
    try:
        return numpy.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole npy file ({error}): fetch it again") from error


def _chosen(count: int, images: int | None) -> Tensor:
    """Which images of a set of ``count``: all, or ``images`` of them drawn once, rising."""
    if images is None:
        return torch.arange(count)
    if not 0 < images <= count:
        raise ValueError(f"data.corrupted_images={images} must lie between 1 and the {count} images of a set")
    return torch.randperm(count, generator=stream(0, "corrupted images"))[:images].sort().values


def _digest(values: Tensor) -> str:
    return content_digest(numpy.empty(0), values)


SOURCES = {"cifar10": cifar10, "cifar100": cifar100}
