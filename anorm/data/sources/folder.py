"""Images in folders: ROOT/train/CLASS/IMAGE and ROOT/val/CLASS/IMAGE."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from anorm.data.index import FileIndex, index_folder
from anorm.data.sources.base import IMAGENET_MEAN, IMAGENET_STD, Absent, EncodedImages, Source
from anorm.data.transforms import Crop
from anorm.words import printable

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
        return printable(self.index.path(index))

    def digest(self) -> str:
        return self.index.digest()


def imagefolder(
    root: str | Path | None = None,
    train: str = "train",
    val: str = "val",
    image_size: int = 224,
    eval_resize: int | None = None,
    interpolation: str = "bilinear",
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    on_error: str = "error",
    cache: bool = True,
    loader: str = "torch",
) -> Source:
    """Any number of classes and images. train, val: the two folders, in root. The rest: `Crop`, `EncodedImages`.
    Where the folder of train is missing, the source can be evaluated on and not trained on.

    Labels follow the class folders' names as text (0, 1, 10, 2). Names of classes come from ROOT/LOC_synset_mapping.txt or
    ROOT/classes.txt where one is there: a line a class, either "folder name" or names alone (line n for folder n where the
    folders are numbers, else in the order of the folders); and else from the folders.
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
            f"data.root={printable(root)} is not a folder: set it (for data=imagenet also $IMAGENET_DIR) to the one with "
            "train and val"
        )
    crop = Crop(image_size, eval_resize, interpolation, tuple(crop_scale), tuple(crop_ratio), flip)
    train_index = index_folder(folder / train, on_error, cache) if (folder / train).exists() else None
    val_index = index_folder(folder / val, on_error, cache)
    val_images = EncodedImages(FolderStore(val_index), crop, on_error, loader, mean, std)
    if train_index is None:
        absent = Absent(
            f"{printable(folder / train)} is not a folder: without training images the network can be evaluated only"
        )
        return Source(
            absent, {"val": val_images}, class_names(folder, val_index.classes), f"val-{val_index.digest()}"
        )
    check_same_classes(train_index.classes, val_index.classes, (str(train_index.folder), str(val_index.folder)))
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


def check_same_classes(train: list[str], val: list[str], names: tuple[str, str] = ("train", "val")) -> None:
    """Raise ValueError, naming classes, unless both splits have the same. names: what the splits are called."""
    differences = [
        f"only in {name}: {_some(sorted(only))}"
        for name, only in zip(names, (set(train) - set(val), set(val) - set(train)), strict=True)
        if only
    ]
    if differences:
        raise ValueError(
            f"the classes of {names[0]} and {names[1]} differ, so their labels would not agree: {'; '.join(differences)}"
        )
    if train != val:
        raise ValueError(f"{names[0]} and {names[1]} hold the same classes in another order: make both from one set")


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(printable(name) for name in names[:count]) + more


def class_names(folder: Path, classes: list[str]) -> list[str]:
    """Return readable names in the order of `classes`, from a name file in `folder`, or the class folders' own names."""
    for name_file in NAME_FILES:
        path = folder / name_file
        if path.is_file():
            return [printable(name) for name in _read_names(path, classes)]
    return [printable(name) for name in classes]


def _read_names(path: Path, classes: list[str]) -> list[str]:
    """Return a name for each class folder, from a file of "folder name" lines in any order or of names alone.

    A name alone belongs to a folder by its place. Where folders are numbers, line n belongs to folder n, counted from 0 or
    1; else line n belongs to the n-th folder. Raises ValueError, with both orders, where numbers in the folders' names
    leave in doubt which folder is the n-th, and where lines and folders do not match.
    """
    text = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors begin a file with this mark
    lines = [line.strip() for line in text.decode("utf-8", "surrogateescape").splitlines() if line.strip()]
    file, advice = printable(path), "write 'folder name' on each line, one line a class, or remove the file"
    by_folder = _by_folder(lines, classes)
    if len(by_folder) == len(classes):
        return [by_folder[name] for name in classes]
    if any(by_folder[name] != name for name in by_folder):
        missing = [name for name in classes if name not in by_folder]
        raise ValueError(f"{file} has no line for the class folder {_some(missing)}: {advice}")

    numbers = [int(name) for name in classes] if all(map(_is_number, classes)) else []
    first = 0 if 0 in numbers else 1
    whole = sorted(numbers) == list(range(first, first + len(lines)))
    if numbers and (whole or (first == 0 and max(numbers) < len(lines))):
        return [lines[number - first] for number in numbers]
    if len(lines) != len(classes):
        raise ValueError(f"{file} names {len(lines)} classes, but there are {len(classes)} class folders: {advice}")
    other = sorted(classes, key=_natural)
    misplaced = [name for name, line in zip(classes, lines, strict=True) if line in by_folder and line != name]
    if other != classes or misplaced:
        raise ValueError(
            f"{file} holds names alone, in an order that is in doubt. The class folders by path: {_some(classes, 6)}; by "
            f"number: {_some(other, 6)}; the names: {_some(lines, 6)}. To be clear, {advice}"
        )
    return lines


def _by_folder(lines: list[str], classes: list[str]) -> dict[str, str]:
    """Return folder -> name of the lines that begin with a class folder; a folder alone is its own name.

    Where the folders are numbers, 007 may be called 7.
    """
    numbers = all(map(_is_number, classes)) and len(set(map(int, classes))) == len(classes)

    def key(name: str) -> str | int:
        return int(name) if numbers and _is_number(name) else name

    folders, found = {key(name): name for name in classes}, {}
    for line in lines:
        ends = [len(line), *(space.start() for space in reversed([*re.finditer(r"\s+", line)]))]
        for end in ends:  # a folder's name may hold spaces: the longest that fits
            folder = folders.get(key(line[:end]))
            if folder is not None:
                found[folder] = line[end:].strip() or folder
                break
    return found


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _natural(name: str) -> list[str | int]:
    """The key that sorts 2 before 10."""
    return [int(part) if _is_number(part) else part for part in re.split("([0-9]+)", name)]


SOURCES = {"imagefolder": imagefolder, "imagenet": imagenet}
