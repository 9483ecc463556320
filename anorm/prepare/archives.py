"""Where the images of ImageNet lie before they are prepared: in the official tar files, or in class folders.

Either way an image is bytes at a place in a file, so that nothing is unpacked to be read.
"""

from __future__ import annotations

import csv
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from anorm.data.index import index_folder

TRAIN_TAR, VAL_TAR, DEVKIT = (
    "ILSVRC2012_img_train.tar",
    "ILSVRC2012_img_val.tar",
    "ILSVRC2012_devkit_t12.tar.gz",
)
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
            raise ValueError(f"{self.file} ends before {self.name}: copy or download it again")
        return content


def find(source: Path) -> dict[str, list[Item]]:
    """{"train": items, "val": items} of the official tars in `source`, or of its class folders; sorted by class and name."""
    if (source / TRAIN_TAR).is_file():
        return {"train": train_items(source / TRAIN_TAR), "val": val_items(source)}
    if (source / "train").is_dir():
        return {split: folder_items(source / split) for split in ("train", "val")}
    raise ValueError(
        f"{source} holds neither {TRAIN_TAR} nor a train folder: give the folder with the official tar files "
        "(image-net.org, ILSVRC2012), or one with train/CLASS/IMAGE and val/CLASS/IMAGE"
    )


def folder_items(folder: Path) -> list[Item]:
    index = index_folder(folder, cache=False)
    return [
        Item(index.classes[index.labels[i]], Path(index.path(i)).name, index.path(i), 0, int(index.sizes[i]))
        for i in range(len(index))
    ]


def train_items(path: Path) -> list[Item]:
    """The training tar holds one tar a class (n01440764.tar), each of which holds the images of that class."""
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
    """The validation tar holds 50,000 images side by side; their classes come from `val_classes`."""
    path = source / VAL_TAR
    if not path.is_file():
        raise ValueError(f"{path} is missing: it belongs beside {TRAIN_TAR}")
    with _open(path) as images:
        members = sorted(
            ((m.name, m.offset_data, m.size) for m in images if m.isfile()), key=lambda member: member[0]
        )
    classes = val_classes(source, [name for name, _, _ in members])
    return sorted(Item(classes[name], name, str(path), offset, size) for name, offset, size in members)


def val_classes(source: Path, names: list[str]) -> dict[str, str]:
    """File name -> class folder, from the official devkit, from Kaggle's LOC_val_solution.csv, or from val_classes.txt.

    The devkit's ground truth is a line an image, in the order of the file names, with the ILSVRC2012 id of its class;
    its meta.mat says which WordNet id that is. val_classes.txt: a class folder a line in the order of the file names.
    """
    if (source / DEVKIT).is_file():
        return dict(zip(names, _devkit_classes(source / DEVKIT, len(names)), strict=True))
    if (source / "LOC_val_solution.csv").is_file():
        with open(source / "LOC_val_solution.csv", newline="") as file:
            found = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)}
        missing = [name for name in names if Path(name).stem not in found]
        if missing:
            raise ValueError(f"{source / 'LOC_val_solution.csv'} has no line for {missing[0]}")
        return {name: found[Path(name).stem] for name in names}
    if (source / "val_classes.txt").is_file():
        classes = (source / "val_classes.txt").read_text().split()
        if len(classes) != len(names):
            raise ValueError(
                f"{source / 'val_classes.txt'} has {len(classes)} lines for {len(names)} validation images"
            )
        return dict(zip(names, classes, strict=True))
    raise ValueError(
        f"the classes of the validation images are missing: put {DEVKIT} (official), LOC_val_solution.csv "
        f"(Kaggle) or val_classes.txt (a class folder a line) into {source}"
    )


def _devkit_classes(path: Path, count: int) -> list[str]:
    import scipy.io

    with _open(path) as devkit:
        parts = {Path(member.name).name: member for member in devkit if member.isfile()}
        try:
            truth, meta = parts["ILSVRC2012_validation_ground_truth.txt"], parts["meta.mat"]
        except KeyError as error:
            raise ValueError(f"{path} holds no {error.args[0]}: is it the official {DEVKIT}?") from error
        numbers = [int(line) for line in devkit.extractfile(truth).read().split()]
        synsets = scipy.io.loadmat(io.BytesIO(devkit.extractfile(meta).read()), squeeze_me=True)["synsets"]
    folders = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    if len(numbers) != count:
        raise ValueError(f"{path} has the classes of {len(numbers)} validation images, but there are {count}")
    return [folders[number] for number in numbers]


@contextmanager
def _open(path: Path) -> Iterator[tarfile.TarFile]:
    """The tar file; damage that is met within, too, is an error in words."""
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a readable tar file ({str(error).splitlines()[0]}): download it again"
        ) from error
