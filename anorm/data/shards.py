"""Indexed tar shards in WebDataset's layout: KEY.jpg and KEY.cls side by side, read at any position by their offsets.

FOLDER/train-000000.tar, ..., FOLDER/train.index.npz, and the same for val. Any WebDataset reader reads the tars in
sequence; the index beside them gives exact epochs and exact resume, which a stream of shards cannot.
"""

from __future__ import annotations

import glob
import hashlib
import io
import logging
import os
import re
import resource
import shlex
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy
import torch
from torch import Tensor

from anorm.data.decode import EXTENSIONS
from anorm.files import replacing
from anorm.words import printable

log = logging.getLogger(__name__)


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, int]]) -> None:
    """Write a shard, whole or not at all. samples: (key, JPEG bytes, label); equal samples give equal bytes.

    Keys are of any length and bytes: such as plain (ustar) headers do not hold have an extended one before them.
    """
    with replacing(path) as partial, tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, encoded, label in samples:
            for name, content in ((f"{key}.jpg", encoded), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def index_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.index.npz"


def write_index(
    folder: Path,
    split: str,
    classes: list[str] | None = None,
    progress: Callable[[int], None] = lambda shards: None,
) -> int:
    """Index FOLDER/SPLIT-*.tar, whoever wrote them; return the number of images.

    classes: their names in the order of the labels; None names them by their numbers.
    Raises ValueError for a sample without a label or a label without an image.
    """
    shards = sorted(folder.glob(f"{glob.escape(split)}-*.tar"))
    if not shards:
        raise ValueError(f"{printable(folder)} holds no shards {split}-*.tar")
    rows: list[tuple[int, int, int, int]] = []
    keys: list[bytes] = []
    for number, shard in enumerate(shards):
        images, labels = _members(shard)
        if images.keys() != labels.keys():
            odd = sorted(images.keys() ^ labels.keys())[0]
            what = "no label" if odd in images else "a label but no image"
            raise ValueError(f"{printable(shard)}: {printable(odd)} has {what}")
        rows += [(number, *images[key], labels[key]) for key in images]
        keys += [os.fsencode(key) for key in images]
        progress(number + 1)
    if not rows:
        raise ValueError(f"{printable(shards[0])} and the other shards hold no images (KEY.jpg beside KEY.cls)")
    shard_numbers, offsets, sizes, labels_ = numpy.array(rows, dtype=numpy.int64).T
    if classes is None:
        classes = [str(label) for label in range(int(labels_.max()) + 1)]
    if labels_.min() < 0 or labels_.max() >= len(classes):
        raise ValueError(
            f"{printable(folder)}: labels run from {labels_.min()} to {labels_.max()}, for {len(classes)} classes; if their "
            "names are those of an index of an earlier set, remove it (*.index.npz) and index again"
        )
    with replacing(index_file(folder, split)) as partial, open(partial, "wb") as file:
        numpy.savez(
            file,
            shards=numpy.array([s.name for s in shards]),
            bytes=[s.stat().st_size for s in shards],
            shard=shard_numbers,
            offset=offsets,
            size=sizes,
            label=labels_,
            key=numpy.array(keys),
            classes=numpy.array(classes),
        )
    return len(keys)


def _members(shard: Path) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
    """(key -> offset and size of its image, key -> label) of a tar file. Raises ValueError for a damaged one."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                folders, slash, name = member.name.rpartition("/")
                name, dot, extension = name.partition(".")  # WebDataset's rule
                key = folders + slash + name
                if not member.isfile():
                    continue
                if (dot + extension).lower() in EXTENSIONS:
                    images[key] = (member.offset_data, member.size)
                elif extension == "cls":
                    label = tar.extractfile(member).read()
                    try:
                        labels[key] = int(label)
                    except ValueError:
                        raise ValueError(
                            f"{printable(shard)}: the label in {printable(member.name)}, {label[:20]!r}, is no number"
                        ) from None
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{printable(shard)} is not a readable tar file ({error}): restore it, or make it again"
        ) from error
    return images, labels


def splits_of(folder: Path) -> list[str]:
    """Return the splits whose shards, SPLIT-NUMBER.tar or SPLIT-NUMBER-of-NUMBER.tar, lie in a folder."""
    found = (re.match(r"(.+?)-\d[^/]*\.tar$", name) for name in os.listdir(folder))
    return sorted({match[1] for match in found if match})


def classes_of(folder: Path, split: str) -> list[str] | None:
    """Return the class names in an index that is there already and whole; tars hold numbers only."""
    path = index_file(folder, split)
    if not path.is_file():
        return None
    try:
        return _load(path, "classes")[0].tolist()
    except ValueError as error:
        log.warning("%s; it is written anew", error)
        return None


def _load(path: Path, *names: str) -> list[numpy.ndarray]:
    """Return arrays of an index. Raises ValueError for a damaged one."""
    try:
        with open(path, "rb") as file, numpy.load(file, allow_pickle=False) as saved:
            return [saved[name] for name in names]
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{printable(path)} is damaged ({error})") from error


class ShardStore:
    """Random access to the images of FOLDER/SPLIT-*.tar through their index.

    Files are read by position, so that forked workers share them without disturbing one another. As many stay open as a
    quarter of the descriptors that a process may have: ImageNet has 1,282 shards, and 1,024 is a usual limit.
    """

    def __init__(self, folder: Path, split: str):
        path, anew = index_file(folder, split), f"python tools/prepare_imagenet.py --index {shlex.quote(printable(folder))}"
        if not path.is_file():
            raise ValueError(
                f"{printable(path)} is missing: {anew} writes the index of shards that are there, and with --from and --to "
                "the tool makes both"
            )
        try:
            found = _load(path, "shards", "bytes", "shard", "offset", "size", "key", "classes", "label")
        except ValueError as error:
            raise ValueError(f"{error}: {anew} writes it again") from error
        shards, sizes, self.shard, self.offset, self.size, self.key, classes, labels = found
        self.shards, self.classes = [folder / name for name in shards.tolist()], classes.tolist()
        self.labels = torch.from_numpy(labels)
        for shard, size in zip(self.shards, sizes.tolist(), strict=True):
            if not shard.is_file() or shard.stat().st_size != size:
                raise ValueError(
                    f"{printable(shard)} is missing, or of another size than when it was indexed: restore it, or index anew "
                    f"with {anew}"
                )
        self._files: dict[int, int] = {}
        self._keep = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4

    def read(self, index: int) -> Tensor:
        number, offset = int(self.shard[index]), int(self.offset[index])
        buffer = bytearray(int(self.size[index]))
        file = self._files.get(number)
        if file is not None:
            read = os.preadv(file, [buffer], offset)
        else:
            file = os.open(self.shards[number], os.O_RDONLY | os.O_CLOEXEC)
            try:
                read = os.preadv(file, [buffer], offset)
            finally:
                # another thread may have been first
                if len(self._files) >= self._keep or self._files.setdefault(number, file) != file:
                    os.close(file)
        if read != len(buffer):
            raise ValueError(f"{printable(self.shards[number])} ended early: it changed while it was read")
        return torch.frombuffer(buffer or bytearray(1), dtype=torch.uint8)

    def name(self, index: int) -> str:
        return printable(f"{self.shards[self.shard[index]]}: {os.fsdecode(self.key[index])}")

    def digest(self) -> str:
        digest = hashlib.blake2b(os.fsencode("\n".join(self.classes)), digest_size=16)
        for array in (self.key, self.labels.numpy(), self.size):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}  # another process opens its own

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)
