"""Where the images of ImageNet lie before they are prepared: in the official tar files, or in folders.

Either way an image is bytes at a place in a file, so nothing is unpacked to be read.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from anorm.data.decode import EXTENSIONS
from anorm.data.index import index_folder, is_service
from anorm.words import printable

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT, TRUTH, META = "ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
KAGGLE, SOLUTION = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv"
# as torchvision's ImageNet data set lists them
MD5 = {
    TRAIN_TAR: "1d675b47d978889d74fa0da5fadfb00e",
    VAL_TAR: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}


class Item(NamedTuple):
    """One image: its class folder, its file name, and where its bytes are."""

    class_name: str
    name: str
    file: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise ValueError(f"{printable(self.file)} ends before {printable(self.name)}: copy or download it again")
        return content


def find(source: Path) -> dict[str, list[Item]]:
    """Return {"train": items, "val": items} of what lies in `source`, sorted by class and name.

    That is the official tar files, or train/CLASS/IMAGE with val/CLASS/IMAGE, with val/IMAGE and a file of their classes
    (`val_classes`) or with the official tar file of val; all as Kaggle lays them out, too. Raises ValueError for the rest.
    """
    if (source / TRAIN_TAR).is_file():
        return {"train": train_items(source / TRAIN_TAR), "val": val_items(source)}
    base = source / KAGGLE if (source / KAGGLE / "train").is_dir() else source
    if not (base / "train").is_dir():
        raise ValueError(
            f"{printable(source)} holds neither {TRAIN_TAR} nor a train folder: give the folder with the official tar files "
            "(image-net.org, ILSVRC2012), or one with train/CLASS/IMAGE and val/CLASS/IMAGE"
        )
    train, val = folder_items(base / "train"), base / "val"
    if not val.is_dir():
        if (source / VAL_TAR).is_file():
            return {"train": train, "val": val_items(source)}
        raise ValueError(f"{printable(base)} holds train, but neither a val folder nor {VAL_TAR}: put one there")
    flat = flat_items(val)
    if not flat:
        return {"train": train, "val": folder_items(val)}
    classes = val_classes([source, base, val], [item.name for item in flat])
    return {"train": train, "val": sorted(item._replace(class_name=classes[item.name]) for item in flat)}


def folder_items(folder: Path) -> list[Item]:
    index = index_folder(folder, cache=False, preparing=True)
    return [
        Item(index.classes[index.labels[i]], Path(index.path(i)).name, index.path(i), 0, int(index.sizes[i]))
        for i in range(len(index))
    ]


def flat_items(folder: Path) -> list[Item]:
    """Return the images of a folder that has no folders in it, sorted by name and without classes; else none."""
    with os.scandir(folder) as entries:
        found = sorted((e for e in entries if not is_service(e.name)), key=lambda entry: entry.name)
    if any(entry.is_dir() for entry in found):
        return []
    return [
        Item("", entry.name, entry.path, 0, entry.stat().st_size)
        for entry in found
        if entry.name.lower().endswith(EXTENSIONS)
    ]


def train_items(path: Path) -> list[Item]:
    """Return the images of the training tar, which holds one tar a class (n01440764.tar) with the images of that class."""
    items = []
    with _open(path) as outer:
        for inner in outer:
            if not inner.name.endswith(".tar"):
                raise ValueError(
                    f"{path} holds {inner.name}, not one tar a class: is it the official {TRAIN_TAR}?"
                )
            try:
                with tarfile.open(fileobj=outer.extractfile(inner), mode="r:") as images:
                    items += [
                        Item(
                            Path(inner.name).stem,
                            image.name,
                            str(path),
                            inner.offset_data + image.offset_data,
                            image.size,
                        )
                        for image in images
                        if image.isfile()
                    ]
            except tarfile.TarError as error:
                raise ValueError(f"{path} is damaged at {inner.name} ({error}): download it again") from error
    return sorted(items)


def val_items(source: Path) -> list[Item]:
    """Return the images of the validation tar, which holds 50,000 side by side; their classes come from `val_classes`."""
    path = source / VAL_TAR
    if not path.is_file():
        raise ValueError(f"{path} is missing: it belongs beside {TRAIN_TAR}")
    with _open(path) as images:
        members = sorted(
            ((m.name, m.offset_data, m.size) for m in images if m.isfile()), key=lambda member: member[0]
        )
    classes = val_classes([source], [name for name, _, _ in members])
    return sorted(Item(classes[name], name, str(path), offset, size) for name, offset, size in members)


def val_classes(places: list[Path], names: list[str]) -> dict[str, str]:
    """Return file name -> class folder of validation images, from the first of these files that lies in one of `places`:

    the official devkit, as a tar file or unpacked: ILSVRC2012_validation_ground_truth.txt (a line an image, in the order
    of the official numbers, with the ILSVRC2012 id of its class) beside meta.mat (which WordNet id that is); Kaggle's
    LOC_val_solution.csv; val_classes.txt (a class folder a line, in the order of the file names).
    names: sorted. Raises ValueError where there is none, or it does not fit the images.
    """
    for place in places:
        if (place / DEVKIT).is_file():
            with _open(place / DEVKIT) as devkit:
                parts = {Path(m.name).name: devkit.extractfile(m).read() for m in devkit if m.isfile()}
            missing = [name for name in (TRUTH, META) if name not in parts]
            if missing:
                raise ValueError(f"{printable(place / DEVKIT)} holds no {missing[0]}: is it the official file?")
            return _in_order(names, _devkit_classes(place / DEVKIT, parts[TRUTH], parts[META]), place / DEVKIT)
    for place in places:
        for folder in (place, place / "data", place / DEVKIT.removesuffix(".tar.gz") / "data"):
            truth, meta = folder / TRUTH, folder / META
            if truth.is_file():
                if not meta.is_file():
                    raise ValueError(
                        f"{printable(truth)} gives classes by their ILSVRC2012 ids: put the devkit's {META}, which says "
                        f"which WordNet ids those are, beside it (or the whole {DEVKIT} into {printable(places[0])})"
                    )
                return _in_order(names, _devkit_classes(truth, truth.read_bytes(), meta.read_bytes()), truth)
    for place in places:
        if (place / SOLUTION).is_file():
            return _kaggle_classes(place / SOLUTION, names)
    for place in places:
        if (place / "val_classes.txt").is_file():
            path = place / "val_classes.txt"
            return _in_order(names, [os.fsdecode(line) for line in path.read_bytes().split()], path)
    raise ValueError(
        f"the classes of the validation images are missing: put {DEVKIT} (official), {SOLUTION} (Kaggle) or "
        f"val_classes.txt (a class folder a line, in the order of the file names) into {printable(places[0])}"
    )


def _in_order(names: list[str], classes: list[str], file: Path) -> dict[str, str]:
    """Return name -> class: by the official number in a name where all have one, else by position."""
    numbers = [re.search(r"ILSVRC2012_val_(\d{8})", name) for name in names]
    if all(numbers):
        places = [int(number[1]) - 1 for number in numbers]
        odd = [name for name, place in zip(names, places, strict=True) if not 0 <= place < len(classes)]
        if odd:
            raise ValueError(f"{printable(file)} has the classes of {len(classes)} images, and none for {odd[0]}")
        return {name: classes[place] for name, place in zip(names, places, strict=True)}
    if len(classes) != len(names):
        raise ValueError(
            f"{printable(file)} has the classes of {len(classes)} validation images, but there are {len(names)}"
        )
    return dict(zip(names, classes, strict=True))


def _kaggle_classes(path: Path, names: list[str]) -> dict[str, str]:
    """Return name -> class from ImageId (a name without its ending), PredictionString (class and box of each object)."""
    found = {}
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        for row in csv.DictReader(file):
            words = (row.get("PredictionString") or "").split()
            if "ImageId" not in row or not words:
                raise ValueError(
                    f"{printable(path)} is no list of ImageId,PredictionString such as Kaggle's: download it again"
                )
            found[row["ImageId"]] = words[0]
    missing = [name for name in names if Path(name).stem not in found]
    if missing:
        raise ValueError(f"{printable(path)} has no line for {printable(missing[0])}")
    return {name: found[Path(name).stem] for name in names}


def _devkit_classes(file: Path, truth: bytes, meta: bytes) -> list[str]:
    """Return a WordNet id an image, in the order of the official numbers."""
    import scipy.io
    from scipy.io.matlab import MatReadError

    try:
        synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        folders = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
        return [folders[int(line)] for line in truth.split()]
    except (MatReadError, ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{printable(file)} and {META} do not fit together ({type(error).__name__}: {error}): take both from the "
            "official devkit"
        ) from error


@contextmanager
def _open(path: Path) -> Iterator[tarfile.TarFile]:
    """Open a tar file. Damage, also such as is met within, raises ValueError in words."""
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a readable tar file ({str(error).splitlines()[0]}): download it again"
        ) from error
