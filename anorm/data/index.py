"""The list of images under a folder of class folders, kept in a cache that notices every change of a folder."""

from __future__ import annotations

import hashlib
import logging
import os
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy

from anorm.data.decode import EXTENSIONS
from anorm.files import replacing

log = logging.getLogger(__name__)

SETTLED = 2.0  # seconds: a folder changed more recently than this may change again within its clock's tick


@dataclass(frozen=True)
class FileIndex:
    """Images of one split. All names lie in one byte array, because 1.3 million Python strings in every worker
    process would cost gigabytes (each reading touches a reference count, so forked pages are copied).

    classes: class folders, sorted. labels (N,) int64. skipped: files passed over (on_error=skip).
    """

    folder: Path
    classes: list[str]
    names: numpy.ndarray  # uint8, the file names one after another
    ends: numpy.ndarray  # int64 (N,), where each name ends
    labels: numpy.ndarray  # int64 (N,)
    sizes: numpy.ndarray  # int64 (N,), bytes
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        name = self.names[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")
        return os.path.join(self.folder, self.classes[self.labels[index]], name)

    def digest(self) -> str:
        """Changes when a file is added, removed, renamed, moved to another class or given another size."""
        digest = hashlib.blake2b("\n".join(self.classes).encode("utf-8", "surrogateescape"), digest_size=16)
        for array in (self.names, self.ends, self.labels, self.sizes):
            digest.update(numpy.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def index_folder(folder: Path, on_error: str = "error", cache: bool = True) -> FileIndex:
    """List folder/CLASS/IMAGE. Raises ValueError, naming the culprit, for anything that is not of this form.

    The cache (in $XDG_CACHE_HOME/anorm or ~/.cache/anorm) is used only while the time stamps of the folder and of every
    class folder are the ones it was made from; adding, removing or renaming a file changes its folder's stamp.
    Only a file overwritten in place escapes it: that changes no name, and images are always read anew.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: put the class folders there, or set data.root (for ImageNet also "
            "$IMAGENET_DIR) to the folder that holds train and val"
        )
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    classes = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if not entry.is_dir()]
    if not classes:
        raise ValueError(
            f"{folder} holds no class folders"
            + (
                f" but files such as {files[0]}: sort them into one folder a class (tools/prepare_imagenet.py does "
                "that for ImageNet)"
                if files
                else ": it is empty; expected CLASS/IMAGE files in it"
            )
        )
    if files and on_error == "error":
        raise ValueError(
            f"{folder / files[0]} lies beside the class folders: move it away, or set data.on_error=skip"
        )

    stamps = numpy.array(
        [os.stat(folder).st_mtime_ns] + [os.stat(folder / name).st_mtime_ns for name in classes]
    )
    cached = _cache_file(folder, on_error) if cache else None
    if cached:
        found = _load(cached, folder, classes, stamps)
        if found is not None:
            return found
    index = _scan(folder, classes, on_error, [str(folder / name) for name in files])
    if cached and stamps.max() < (time.time() - SETTLED) * 1e9:
        _save(cached, index, stamps)
    return index


def _scan(folder: Path, classes: list[str], on_error: str, skipped: list[str]) -> FileIndex:
    def scan(name: str) -> tuple[list[tuple[str, int]], list[str]]:
        images, others = [], []
        for entry in os.scandir(folder / name):
            if entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                images.append((entry.name, entry.stat().st_size))
            else:
                others.append(entry.path)
        return sorted(images), sorted(others)

    names, sizes, counts = [], [], []
    with ThreadPoolExecutor(
        16
    ) as pool:  # latency, not work: on a network file system each look-up is a round trip
        for class_name, (images, others) in zip(classes, pool.map(scan, classes), strict=True):
            if others and on_error == "error":
                what = (
                    "a folder where an image should be" if os.path.isdir(others[0]) else "not an image file"
                )
                raise ValueError(f"{others[0]} is {what}: remove it, or set data.on_error=skip")
            if not images:
                raise ValueError(
                    f"{folder / class_name} holds no images: fill it, or remove it from train and val"
                )
            skipped += others
            counts.append(len(images))
            names += [os.fsencode(name) for name, _ in images]
            sizes += [size for _, size in images]
    for path in skipped:
        log.warning("skipped, not an image: %s", path)
    return FileIndex(
        folder,
        classes,
        numpy.frombuffer(b"".join(names), dtype=numpy.uint8),
        numpy.cumsum([len(name) for name in names], dtype=numpy.int64),
        numpy.repeat(numpy.arange(len(classes), dtype=numpy.int64), counts),
        numpy.array(sizes, dtype=numpy.int64),
        skipped,
    )


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anorm" / "index"


def _cache_file(folder: Path, on_error: str) -> Path | None:
    """None on a machine without a home."""
    key = hashlib.blake2b(os.fsencode(folder.resolve()) + on_error.encode(), digest_size=12).hexdigest()
    try:
        return cache_folder() / f"{key}.npz"
    except RuntimeError as error:
        log.warning("no file index is kept: %s", error)
        return None


def _load(path: Path, folder: Path, classes: list[str], stamps: numpy.ndarray) -> FileIndex | None:
    try:
        with open(path, "rb") as file, numpy.load(file, allow_pickle=False) as saved:
            if saved["classes"].tolist() != classes or not numpy.array_equal(saved["stamps"], stamps):
                return None
            return FileIndex(
                folder,
                classes,
                saved["names"],
                saved["ends"],
                saved["labels"],
                saved["sizes"],
                saved["skipped"].tolist(),
            )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("the file index %s is unreadable (%s); listing the folder again", path, error)
        return None


def _save(path: Path, index: FileIndex, stamps: numpy.ndarray) -> None:
    # several processes may write the same index at once: each has its own temporary file
    own = path.with_suffix(f".{os.getpid()}.tmp.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, own):
            numpy.savez(
                own,
                classes=numpy.array(index.classes, dtype=str),
                stamps=stamps,
                names=index.names,
                ends=index.ends,
                labels=index.labels,
                sizes=index.sizes,
                skipped=numpy.array(index.skipped, dtype=str),
            )
    except OSError as error:
        log.warning(
            "could not keep the file index in %s (%s); the folder is listed again next time", path, error
        )
