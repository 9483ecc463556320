"""Indexed tar shards in WebDataset's layout: KEY.jpg and KEY.cls side by side, read at any position by their offsets.

FOLDER/train-000000.tar, ..., FOLDER/train.index.npz, and the same for val. Any WebDataset reader reads the tars in
sequence; the index beside them gives exact epochs and exact resume, which a stream of shards cannot.
"""

from __future__ import annotations

import hashlib
import io
import os
import resource
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy
import torch
from torch import Tensor

from anorm.data.decode import EXTENSIONS
from anorm.files import replacing


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, int]]) -> None:
    """samples: (key, JPEG bytes, label). Whole or not at all; equal samples give equal bytes."""
    with replacing(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as tar:
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
    """Index FOLDER/SPLIT-*.tar, whoever wrote them; returns the number of images.

    classes: their names in the order of the labels; None names them by their numbers.
    Raises ValueError for a sample without a label or a label without an image.
    """
    shards = sorted(folder.glob(f"{split}-*.tar"))
    if not shards:
        raise ValueError(f"{folder} holds no shards {split}-*.tar")
    rows: list[tuple[int, int, int, int]] = []
    keys: list[bytes] = []
    for number, shard in enumerate(shards):
        images: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
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
                    labels[key] = int(tar.extractfile(member).read())
        if images.keys() != labels.keys():
            odd = sorted(images.keys() ^ labels.keys())[0]
            raise ValueError(f"{shard}: {odd} has {'no label' if odd in images else 'a label but no image'}")
        rows += [(number, *images[key], labels[key]) for key in images]
        keys += [key.encode() for key in images]
        progress(number + 1)
    if not rows:
        raise ValueError(f"{shards[0]} and the other shards hold no images (KEY.jpg beside KEY.cls)")
    shard_numbers, offsets, sizes, labels_ = numpy.array(rows, dtype=numpy.int64).T
    if classes is None:
        classes = [str(label) for label in range(int(labels_.max()) + 1)]
    if labels_.min() < 0 or labels_.max() >= len(classes):
        raise ValueError(
            f"{folder}: labels run from {labels_.min()} to {labels_.max()}, for {len(classes)} classes"
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


def classes_of(folder: Path, split: str) -> list[str] | None:
    """The class names in an index that is there already; tars hold numbers only."""
    path = index_file(folder, split)
    if not path.is_file():
        return None
    with numpy.load(path, allow_pickle=False) as saved:
        return saved["classes"].tolist()


class ShardStore:
    """Random access to the images of FOLDER/SPLIT-*.tar through their index.

    Files are read by position, so that forked workers share them without disturbing one another. As many stay open as a
    quarter of the descriptors that a process may have: ImageNet has 1,282 shards, and 1,024 is a usual limit.
    """

    def __init__(self, folder: Path, split: str):
        path = index_file(folder, split)
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: python tools/prepare_imagenet.py --index {folder} writes the index of shards "
                "that are there, and with --from and --to it makes both"
            )
        with numpy.load(path, allow_pickle=False) as saved:
            self.shards, sizes = [folder / name for name in saved["shards"].tolist()], saved["bytes"].tolist()
            self.shard, self.offset, self.size = saved["shard"], saved["offset"], saved["size"]
            self.key, self.classes = saved["key"], saved["classes"].tolist()
            self.labels = torch.from_numpy(saved["label"])
        for shard, size in zip(self.shards, sizes, strict=True):
            if not shard.is_file() or shard.stat().st_size != size:
                raise ValueError(
                    f"{shard} is missing, or of another size than when it was indexed: restore it, or index anew "
                    f"with python tools/prepare_imagenet.py --index {folder}"
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
            raise ValueError(f"{self.shards[number]} ended early: it changed while it was read")
        return torch.frombuffer(buffer or bytearray(1), dtype=torch.uint8)

    def name(self, index: int) -> str:
        return f"{self.shards[self.shard[index]]}: {self.key[index].decode()}"

    def digest(self) -> str:
        digest = hashlib.blake2b("\n".join(self.classes).encode(), digest_size=16)
        for array in (self.key, self.labels.numpy(), self.size):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}  # another process opens its own

    def __del__(self) -> None:
        for file in self.__dict__.get("_files", {}).values():
            os.close(file)
