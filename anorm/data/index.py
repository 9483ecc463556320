"""The list of images under a folder of class folders, kept in a cache that notices every change of a folder."""

from __future__ import annotations

import hashlib
import logging
import os
import shlex
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy

from anorm.data.decode import EXTENSIONS
from anorm.files import replacing
from anorm.words import printable

log = logging.getLogger(__name__)

# left behind by Synology, QNAP, macOS, Windows and ext4; in lower case
SERVICE = frozenset(
    "@eadir @recycle @recently-snapshot #recycle #snapshot __macosx __pycache__ thumbs.db desktop.ini lost+found "
    "$recycle.bin".split()
) | {"system volume information"}
SHOWN = 3  # names in a warning
SETTLED = 2.0  # seconds: a folder changed more recently than this may change again within its clock's tick


@dataclass(frozen=True)
class FileIndex:
    """Images of one split.

    All names lie in one byte array. As 1.3 million Python strings they would cost gigabytes: reading one touches its
    reference count, and so copies a page into every worker.

    classes: class folders, sorted. labels (N,) int64. skipped: paths passed over, service files and, under
    on_error=skip, all else that is no image.
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
        name = os.fsdecode(self.names[start : self.ends[index]].tobytes())
        return os.path.join(self.folder, self.classes[self.labels[index]], name)

    def digest(self) -> str:
        """Return a digest that changes when a file is added, removed, renamed, moved to another class, or resized."""
        digest = hashlib.blake2b(os.fsencode("\n".join(self.classes)), digest_size=16)
        for array in (self.names, self.ends, self.labels, self.sizes):
            digest.update(numpy.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def is_service(name: str) -> bool:
    """Say whether a file or folder of this name is an operating system's or a program's, and not part of a data set."""
    return name.startswith(".") or name.lower() in SERVICE


def index_folder(
    folder: Path, on_error: str = "error", cache: bool = True, preparing: bool = False
) -> FileIndex:
    """List folder/CLASS/IMAGE. Raises ValueError, naming the culprit, for anything that is not of this form.

    preparing: called by tools/prepare_imagenet.py, to which errors must not advise itself, nor train.py's options.

    Hidden files and folders, and what systems leave behind (`is_service`), are passed over with a warning.
    The cache (in $XDG_CACHE_HOME/anorm or ~/.cache/anorm) is used only while the time stamps of the folder and of every
    class folder are the ones it was made from; adding, removing or renaming a file changes its folder's stamp.
    Only a file overwritten in place escapes it: that changes no name, and images are always read anew.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{printable(folder)} is not a folder: put the class folders there, or set data.root (for ImageNet also "
            "$IMAGENET_DIR) to the folder that holds train and val"
        )
    entries = sorted(_entries(folder), key=lambda entry: entry.name)
    aside = [entry.path for entry in entries if is_service(entry.name)]
    entries = [entry for entry in entries if not is_service(entry.name)]
    classes = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if not entry.is_dir()]
    if not classes:
        raise ValueError(f"{printable(folder)} holds no class folders{_instead(folder, files, preparing)}")
    or_skip = "" if preparing else ", or set data.on_error=skip"
    if files and on_error == "error":
        raise ValueError(f"{printable(folder / files[0])} lies beside the class folders: move it away{or_skip}")

    stamps = numpy.array(
        [os.stat(folder).st_mtime_ns] + [os.stat(folder / name).st_mtime_ns for name in classes]
    )
    cached = _cache_file(folder, on_error) if cache else None
    index = _load(cached, folder, classes, stamps) if cached else None
    if index is None:
        skipped = [*aside, *(str(folder / name) for name in files)]
        index = _scan(folder, classes, skipped, or_skip if on_error == "error" else None)
        if cached and stamps.max() < (time.time() - SETTLED) * 1e9:
            _save(cached, index, stamps)
    if index.skipped:
        shown = ", ".join(printable(os.path.relpath(path, folder)) for path in index.skipped[:SHOWN])
        more = f" and {len(index.skipped) - SHOWN} more" if len(index.skipped) > SHOWN else ""
        log.warning("passed over in %s, no images: %s%s", printable(folder), shown, more)
    return index


def _instead(folder: Path, files: list[str], preparing: bool) -> str:
    """What a folder without class folders holds, and what to do about it."""
    if not files:
        return ": it is empty; expected CLASS/IMAGE files in it"
    sort = f" but files such as {printable(files[0])}: sort them into one folder a class"
    if preparing:
        return sort
    return (
        f"{sort}. For ImageNet's validation images python tools/prepare_imagenet.py --from "
        f"{shlex.quote(printable(folder.parent))} --to NEW does that, given a file of their classes (see its --help)"
    )


def _entries(folder: Path | str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(f"{printable(folder)} cannot be listed ({error.strerror}): see to its permissions") from error


def _scan(folder: Path, classes: list[str], skipped: list[str], or_skip: str | None) -> FileIndex:
    """skipped: what was passed over already. or_skip: None to pass over all that is no image, else the end of an error."""

    def scan(name: str) -> tuple[list[tuple[str, int]], list[str], list[str]]:
        images, others, aside = [], [], []
        for entry in _entries(folder / name):
            if is_service(entry.name):
                aside.append(entry.path)
            elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
                images.append((entry.name, entry.stat().st_size))
            else:
                others.append(entry.path)
        return sorted(images), sorted(others), sorted(aside)

    names, sizes, counts = [], [], []
    # latency, not work: on a network file system each look-up is a round trip
    with ThreadPoolExecutor(16) as pool:
        for class_name, (images, others, aside) in zip(classes, pool.map(scan, classes), strict=True):
            if others and or_skip is not None:
                raise ValueError(_no_image(others[0]) + or_skip)
            if not images:
                raise ValueError(
                    f"{printable(folder / class_name)} holds no images"
                    + (f", but {printable(os.path.basename(others[0]))}" if others else "")
                    + ": a class needs some; fill it, or remove it from train and val"
                )
            skipped += [*aside, *others]
            counts.append(len(images))
            names += [os.fsencode(name) for name, _ in images]
            sizes += [size for _, size in images]
    return FileIndex(
        folder,
        classes,
        numpy.frombuffer(b"".join(names), dtype=numpy.uint8),
        numpy.cumsum([len(name) for name in names], dtype=numpy.int64),
        numpy.repeat(numpy.arange(len(classes), dtype=numpy.int64), counts),
        numpy.array(sizes, dtype=numpy.int64),
        skipped,
    )


def _no_image(path: str) -> str:
    if not os.path.isdir(path):
        return f"{printable(path)} is not an image file: remove it"
    return (
        f"{printable(path)} is a folder where an image should be: class folders lie directly in train and val; move it there, "
        "remove it"
    )


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "anorm" / "index"


def _cache_file(folder: Path, on_error: str) -> Path | None:
    """None on a machine without a home. The key holds the rules of what is listed: an index made by others is of no use."""
    rules = on_error.encode() + b" but service files"
    key = hashlib.blake2b(os.fsencode(folder.resolve()) + rules, digest_size=12).hexdigest()
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
