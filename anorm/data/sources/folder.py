"""Images in folders: ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from anorm.data.index import FileIndex, index_folder
from anorm.data.sources.base import IMAGENET_MEAN, IMAGENET_STD, Absent, EncodedImages, Source
from anorm.data.transforms import Crop

IMAGENET_CLASSES = 1000
NAME_FILES = ("LOC_synset_mapping.txt", "classes.txt")


class FolderStore:
    """The files of a FileIndex."""

    def __init__(self, index: FileIndex):
        self.index, self.labels = index, torch.from_numpy(index.labels)

    def read(self, index: int) -> Tensor:
        with open(self.index.path(index), "rb") as file:
            return torch.frombuffer(bytearray(file.read()) or bytearray(1), dtype=torch.uint8)

    def name(self, index: int) -> str:
        return self.index.path(index)

    def digest(self) -> str:
        return self.index.digest()


def imagefolder(
    root: str | None = None,
    train: str = "train",
    val: str = "val",
    image_size: int = 224,
    eval_resize: int | None = None,
    interpolation: str = "bilinear",
    crop_scale: Sequence[float] = (0.08, 1.0),
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    on_error: str = "error",
    cache: bool = True,
    loader: str = "torch",
) -> Source:
    """Any number of classes and images. train, val: the two folders, in root. The rest: `Crop`, `EncodedImages`.
    Where the folder of train is missing, the source can be evaluated on and not trained on.

    Class names come from ROOT/classes.txt or ROOT/LOC_synset_mapping.txt where one is there (a line a class, either
    "folder name" or the names alone in the order of the folders), and else from the folders.
    Raises ValueError where train and val differ in their class folders, and where `index_folder` does.
    """
    if root is None:
        raise ValueError(
            "data.root is not set: give the folder that holds train and val "
            "(data=imagenet also reads it from $IMAGENET_DIR)"
        )
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"data.root={root} is not a folder: set it (for data=imagenet also $IMAGENET_DIR) to the one with train and val"
        )
    crop = Crop(image_size, eval_resize, interpolation, tuple(crop_scale), tuple(crop_ratio), flip)
    val_index = index_folder(folder / val, on_error, cache)
    val_images = EncodedImages(FolderStore(val_index), crop, on_error, loader, mean, std)
    if not (folder / train).exists():
        absent = Absent(
            f"{folder / train} is not a folder: without training images the network can be evaluated only"
        )
        return Source(
            absent, {"val": val_images}, class_names(folder, val_index.classes), f"val-{val_index.digest()}"
        )
    train_index = index_folder(folder / train, on_error, cache)
    check_same_classes(train_index, val_index)
    digest = hashlib.blake2b((train_index.digest() + val_index.digest()).encode(), digest_size=16).hexdigest()
    return Source(
        EncodedImages(FolderStore(train_index), crop, on_error, loader, mean, std),
        {"val": val_images},
        class_names(folder, train_index.classes),
        f"files-{digest}",
    )


@functools.wraps(imagefolder, assigned=())  # the same options
def imagenet(*args, **options) -> Source:
    """ImageNet-1k as an `imagefolder`; raises ValueError unless there are 1,000 classes."""
    source = imagefolder(*args, **options)
    if source.num_classes != IMAGENET_CLASSES:
        raise ValueError(
            f"data=imagenet expects {IMAGENET_CLASSES} class folders, found {source.num_classes}: "
            "use data=imagefolder for another set"
        )
    return source


def check_same_classes(train: FileIndex, val: FileIndex) -> None:
    differences = []
    for here, there in ((train, val), (val, train)):
        only = sorted(set(here.classes) - set(there.classes))
        if only:
            shown = ", ".join(only[:3]) + (f" and {len(only) - 3} more" if len(only) > 3 else "")
            differences.append(f"only in {here.folder}: {shown}")
    if differences:
        raise ValueError(
            "the class folders of train and val differ, so their labels would not agree: "
            + "; ".join(differences)
        )


def class_names(folder: Path, classes: list[str]) -> list[str]:
    """Readable names in the order of `classes`, from a name file in `folder`, or the class folders' own names."""
    for name_file in NAME_FILES:
        path = folder / name_file
        if path.is_file():
            return _read_names(path, classes)
    return list(classes)


def _read_names(path: Path, classes: list[str]) -> list[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    named = {parts[0]: parts[1] for parts in (line.split(maxsplit=1) for line in lines) if len(parts) == 2}
    if set(classes) <= set(named):
        return [named[folder] for folder in classes]
    if len(lines) == len(classes):
        return lines
    raise ValueError(
        f"{path} names {len(lines)} classes, but there are {len(classes)} class folders: "
        "write 'folder name' on each line, one line a class, or remove the file"
    )


SOURCES = {"imagefolder": imagefolder, "imagenet": imagenet}
