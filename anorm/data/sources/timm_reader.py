"""Whatever timm's dataset readers with random access read: Hugging Face sets (hfds/...), folders, tars of a class each."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from anorm.data.index import is_service
from anorm.data.sources.base import IMAGENET_MEAN, IMAGENET_STD, EncodedImages, Source
from anorm.data.sources.folder import check_same_classes
from anorm.data.transforms import Crop
from anorm.words import printable

STREAMS = ("hfids", "tfds", "wds")


class TimmStore:
    """Images of a reader of timm that gives (file, label) for an index."""

    def __init__(self, reader, title: str):
        self.reader, self.title = reader, title
        self.labels = torch.from_numpy(numpy.asarray(_labels(reader), dtype=numpy.int64))
        self._one_at_a_time = threading.Lock()  # the images of a tar share a position in it

    def read(self, index: int) -> Tensor:
        with self._one_at_a_time:
            file, _ = self.reader[index]
            with file:
                return torch.frombuffer(bytearray(file.read()) or bytearray(1), dtype=torch.uint8)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_one_at_a_time"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__ = state | {"_one_at_a_time": threading.Lock()}

    def name(self, index: int) -> str:
        return f"{self.title}: image {index}"

    def digest(self) -> str:
        """Return a digest of title, classes, labels and, where the reader lists files, their names.

        The names of Hugging Face's images are not known without reading them.
        """
        found = hashlib.blake2b(self.title.encode(), digest_size=16)
        found.update(os.fsencode("\n".join(self.classes())) + self.labels.numpy().tobytes())
        if hasattr(self.reader, "samples"):
            for index in range(len(self.labels)):
                found.update(os.fsencode(self.reader.filename(index, basename=True)) + b"\n")
        return found.hexdigest()

    def classes(self) -> list[str]:
        """Return the reader's names in the order of their labels, else the labels' numbers."""
        names = getattr(self.reader, "class_to_idx", None) or getattr(self.reader, "class_name_to_idx", None)
        if names:
            return [str(name) for name, _ in sorted(names.items(), key=lambda item: item[1])]
        return [str(label) for label in range(int(self.labels.max()) + 1)]


def _labels(reader) -> Sequence[int]:
    """Return all labels without reading an image."""
    if hasattr(reader, "label_key"):
        return reader.dataset[reader.label_key]
    if hasattr(reader, "targets"):
        return reader.targets
    return [label for _, label in reader.samples]


def timm(
    reader: str | None = None,
    root: str | Path | None = None,
    train: str = "train",
    val: str = "validation",
    image_size: int = 224,
    eval_resize: int | None = None,
    interpolation: str = "bilinear",
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    on_error: str = "error",
    loader: str = "torch",
) -> Source:
    """reader: timm's name of a data set, "hfds/OWNER/NAME" (needs the package datasets; root is its cache, optional) or
    "folder" (root/train, root/val: folders, or tars, given by train and val). Other options as of `imagefolder`.

    Raises ValueError for the readers that only stream (hfids, tfds, wds): their epochs are not exact.
    """
    from timm.data.readers import create_reader

    if reader is None:
        raise ValueError("data.reader is not set: give timm's name of a data set, such as hfds/OWNER/NAME")
    prefix = reader.partition("/")[0].lower()
    if prefix in STREAMS:
        raise ValueError(
            f"data.reader={reader} only streams, so epochs and resume would not be exact: use hfds/... for "
            "Hugging Face sets, data=imagenet_shards for WebDataset tars"
        )
    if prefix not in ("hfds", "folder"):
        raise ValueError(f"data.reader={reader} is unknown: use hfds/OWNER/NAME or folder")
    if prefix == "folder" and not root:
        raise ValueError("data.reader=folder needs data.root, the folder that holds data.train and data.val")
    crop = Crop(image_size, eval_resize, interpolation, tuple(crop_scale), tuple(crop_ratio), flip)
    stores = []
    for split in (train, val):
        place = os.path.join(root, split) if prefix == "folder" else root
        if prefix == "folder" and not os.path.exists(place):
            raise ValueError(f"{place} does not exist: set data.root, data.train and data.val")
        try:
            found = create_reader("" if prefix == "folder" else reader, root=place, split=split)
        except ImportError as error:
            raise ValueError(
                f"data.reader={reader} needs a package that is not installed ({error.name}): "
                "pip install datasets"
            ) from error
        stores.append(TimmStore(found, f"{reader} {split}"))
    classes = stores[0].classes()
    check_same_classes(classes, stores[1].classes(), (f"data.train={train}", f"data.val={val}"))
    service = [name for name in classes if is_service(name)] if prefix == "folder" else []
    if service:
        raise ValueError(
            f"timm's reader takes the folder {service[0]} for a class: remove it, or set data=imagefolder, which passes "
            "such folders over"
        )
    digest = hashlib.blake2b("".join(store.digest() for store in stores).encode(), digest_size=16)
    train_images, val_images = (EncodedImages(store, crop, on_error, loader, mean, std) for store in stores)
    return Source(
        train_images,
        {"val": val_images},
        [printable(name) for name in classes],
        f"timm-{digest.hexdigest()}",
    )


SOURCES = {"timm": timm}
