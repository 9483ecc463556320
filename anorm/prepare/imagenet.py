"""Prepare ImageNet, or any set of class folders: one plan of jobs, done by several processes, which can be repeated."""

from __future__ import annotations

import collections
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL.Image import Resampling

from anorm.data import shards
from anorm.data.decode import BadImage, as_rgb, opened
from anorm.data.sources.folder import check_same_classes
from anorm.files import file_digest, write_atomic
from anorm.prepare import archives
from anorm.prepare.archives import Item
from anorm.processes.interrupt import end_with_parent
from anorm.words import printable

COUNTS = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000
CHUNK = 1000  # images of one job, and of one shard
PARTIAL = ".partial"


@dataclass(frozen=True)
class Preparation:
    """What is asked for.

    source: holds the official tar files, or train and val. to: the folder to write. form: "folder" or "shards".
    short_side: re-encode images to this short side, at a JPEG quality; 0 keeps their bytes. workers: processes.
    any_counts: accept other numbers of images and classes than ImageNet's. sample: images to compare at the end.
    """

    source: Path
    to: Path
    form: str = "folder"
    short_side: int = 0
    quality: int = 90
    workers: int = 1
    any_counts: bool = False
    sample: int = 200


class Job(NamedTuple):
    """Work of one process at a time. labels: None for class folders, else the images' labels in a shard."""

    target: str
    items: list[Item]
    labels: list[int] | None
    short_side: int
    quality: int


def reencode(encoded: bytes, name: str, short_side: int, quality: int) -> bytes:
    """Return JPEG bytes with the short side at most `short_side` (0: as they are). A small JPEG stays as it is.

    Antialiased bicubic down-sampling, 4:2:0, RGB as the loaders see it. Raises ValueError for an unreadable image.
    """
    if not short_side:
        return encoded
    try:
        with opened(encoded, name) as image:
            ratio = short_side / min(image.size)
            if ratio >= 1 and image.format == "JPEG" and image.mode == "RGB":
                return encoded
            image = as_rgb(image)
    except BadImage as error:
        raise ValueError(f"{error}: replace it in the source and repeat the command") from error
    if ratio < 1:
        size = [max(short_side, round(side * ratio)) for side in image.size]
        image = image.resize(size, Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def key(item: Item) -> str:
    """Return WebDataset's key, which ends at a name's first dot: other dots become underscores."""
    return Path(item.name).stem.replace(".", "_")


def prepared(item: Item, job: Job) -> bytes:
    """Return an image's bytes as they are to be written."""
    name = printable(item.file if Path(item.file).name == item.name else f"{item.file}: {item.name}")
    return reencode(item.read(), name, job.short_side, job.quality)


def run(job: Job) -> int:
    """Do a job unless it is done; return its number of images."""
    target = Path(job.target)
    if job.labels is not None:
        if not target.exists():
            labelled = zip(job.items, job.labels, strict=True)
            shards.write_shard(target, ((key(item), prepared(item, job), label) for item, label in labelled))
        return len(job.items)
    for item in job.items:
        path = target / item.class_name / item.name
        if not path.exists() or (not job.short_side and path.stat().st_size != item.size):
            _write(path, prepared(item, job))
    return len(job.items)


def _write(path: Path, content: bytes) -> None:
    """Write a file whose name appears only when its content is whole.

    Not after a loss of power: flushing 1.3 million files to the disk would take hours.
    """
    path.parent.mkdir(exist_ok=True)
    # of its own length, as the image's name may be as long as a name can be
    digest = hashlib.blake2b(os.fsencode(path.name), digest_size=16).hexdigest()
    partial = path.with_name(f".{digest}{PARTIAL}")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def plan(items: dict[str, list[Item]], asked: Preparation) -> Iterator[tuple[str, Job]]:
    """Yield (split, job) of all that is to be there: the same for the same images and options."""
    import torch

    from anorm.data.random import stream

    numbers = {name: label for label, name in enumerate(sorted({item.class_name for item in items["train"]}))}
    for split, found in items.items():
        if asked.form == "shards":  # mixed, for readers that go through a shard in sequence
            found = [found[i] for i in torch.randperm(len(found), generator=stream(0, "shards")).tolist()]
        for number, start in enumerate(range(0, len(found), CHUNK)):
            part = found[start : start + CHUNK]
            if asked.form == "shards":
                labels = [numbers[item.class_name] for item in part]
                target = str(asked.to / f"{split}-{number:06d}.tar")
                yield split, Job(target, part, labels, asked.short_side, asked.quality)
            else:
                yield split, Job(str(asked.to / split), part, None, asked.short_side, asked.quality)


def check_source(items: dict[str, list[Item]], asked: Preparation) -> None:
    """Raise ValueError unless classes agree, names make keys, and (unless any_counts) the counts are ImageNet's own."""
    classes = {split: {item.class_name for item in found} for split, found in items.items()}
    check_same_classes(sorted(classes["train"]), sorted(classes["val"]))
    for split, found in items.items():
        if not asked.any_counts and (len(found) != COUNTS[split] or len(classes[split]) != CLASSES):
            raise ValueError(
                f"{split} has {len(found)} images of {len(classes[split])} classes; ImageNet has {COUNTS[split]} of "
                f"{CLASSES}: complete the source, or give --any for another set"
            )
        [(name, count)] = collections.Counter(key(item) for item in found).most_common(1)
        if asked.form == "shards" and count > 1:
            raise ValueError(
                f"{split} holds {count} images that are called {printable(name)}: shards need a name an image; use "
                "--format folder"
            )


def check_md5(source: Path) -> None:
    for name, expected in archives.MD5.items():
        if (source / name).is_file():
            print(f"checking {name} ...", flush=True)
            found = file_digest(source / name, "md5")
            if found != expected:
                raise ValueError(f"{source / name} has MD5 {found}, not {expected}: download it again")


def check_same_plan(asked: Preparation, items: dict[str, list[Item]]) -> None:
    """Raise ValueError unless what is there comes from the same images and options, or shards would mix two preparations.

    A source file may be replaced by one of another size: what was written before stays, and is compared at the end.
    """
    names = {split: [(item.class_name, item.name) for item in found] for split, found in items.items()}
    sizes = {
        split: [(item.class_name, item.name, item.size) for item in found] for split, found in items.items()
    }
    now = {"format": asked.form, "short_side": asked.short_side, "quality": asked.quality}
    now |= {"images": _digest(sizes), "names": _digest(names)}
    path = asked.to / "prepared.json"
    if not path.exists():
        write_atomic(path, json.dumps(now).encode())
        return
    try:
        before = json.loads(path.read_text())
        before = {"names": None} | before  # which earlier versions did not write
    except (ValueError, TypeError) as error:
        raise ValueError(f"{printable(path)} is damaged: remove it, and what was prepared there") from error
    odd = [word for word in now if before.get(word) != now[word]]
    if odd in (["images"], ["names"]):
        write_atomic(path, json.dumps(now).encode())
    elif set(odd) <= {"images", "names"} and odd:
        raise ValueError(
            f"{printable(asked.to)} was begun with other images: give the same, or another --to; or, to keep what is there, "
            f"remove {shlex.quote(printable(path))} and the shards of the split that changed"
        )
    elif odd:
        words = ", ".join(odd)
        raise ValueError(f"{printable(asked.to)} was begun with other {words}: give the same options, or another --to")


def _digest(listing: dict) -> str:
    return hashlib.blake2b(json.dumps(listing).encode(), digest_size=16).hexdigest()


def make_room(asked: Preparation, items: dict[str, list[Item]]) -> None:
    """Remove what a kill left half written. Raise ValueError where the disk has no room for the rest."""
    # an image of short side 256 at quality 90 takes about 40 kB; without re-encoding nothing shrinks
    wanted = sum(
        min(item.size, asked.short_side**2 if asked.short_side else item.size)
        for found in items.values()
        for item in found
    )
    there = 0
    for file in asked.to.rglob("*"):
        if file.name.endswith(PARTIAL) and file.relative_to(asked.to).parts[0].startswith(("train", "val")):
            file.unlink()
        elif file.is_file():
            there += file.stat().st_size
    free = shutil.disk_usage(asked.to).free
    if wanted - there > free:
        raise ValueError(
            f"{printable(asked.to)} has {free / 1e9:.1f} GB free and about {(wanted - there) / 1e9:.1f} GB are needed: free "
            "some, give another --to, or a smaller --short-side"
        )


def work(jobs: list[tuple[str, Job]], workers: int) -> dict[str, int]:
    """Do all jobs, `workers` at a time, with a progress bar; return the images done by split."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = dict.fromkeys((split for split, _ in jobs), 0)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        tasks = {
            split: bar.add_task(split, total=sum(len(job.items) for name, job in jobs if name == split))
            for split in done
        }
        for split, count in (
            in_processes(jobs, workers) if workers > 1 else ((split, run(job)) for split, job in jobs)
        ):
            done[split] += count
            bar.advance(tasks[split], count)
    return done


def in_processes(jobs: list[tuple[str, Job]], workers: int) -> Iterator[tuple[str, int]]:
    """Yield (split, images) of each job as it is done; the first error cancels what has not begun."""
    waiting, running = iter(jobs), {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=end_with, initargs=(os.getpid(),)) as pool:
        try:
            while True:
                while len(running) < 2 * workers and (following := next(waiting, None)):
                    running[pool.submit(run, following[1])] = following[0]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    try:
                        yield running.pop(future), future.result()
                    except ValueError as error:
                        # without the worker's traceback: it is for a user
                        raise ValueError(str(error)) from None
        finally:
            pool.shutdown(cancel_futures=True)


def end_with(parent: int) -> None:
    """Have this worker killed when its parent ends, however that happens; the repeated command writes the same files."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other preparations from writing to ``folder``. Raises ValueError while one does."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another preparation writes to {printable(folder)}: wait for it, or stop it") from None
        except OSError as error:
            print(
                f"{printable(folder)} cannot be locked ({error.strerror}): see that no other preparation writes to it",
                flush=True,
            )
        yield


def check_sample(jobs: list[tuple[str, Job]], count: int) -> int:
    """Prepare about `count` images of all jobs again and compare them, byte for byte, with the files written."""
    checked = 0
    for _, job in jobs[:: max(1, len(jobs) // count)]:
        every = max(1, len(job.items) * len(jobs) // count)
        written = _members(Path(job.target)) if job.labels is not None else None
        for item in job.items[::every]:
            path = Path(job.target) / item.class_name / item.name
            content = written.get(key(item)) if written is not None else path.read_bytes()
            if content != prepared(item, job):
                raise ValueError(
                    f"{printable(item.name)} is not what its source gives: delete "
                    f"{printable(path if written is None else job.target)} and repeat the command"
                )
            checked += 1
    return checked


def _members(shard: Path) -> dict[str, bytes]:
    import tarfile

    with tarfile.open(shard) as tar:
        return {
            Path(member.name).stem: tar.extractfile(member).read()
            for member in tar
            if member.name.endswith(".jpg")
        }


def index(folder: Path) -> None:
    """Write the index of every split whose shards lie in a folder, and say how many images each holds.

    Class names come from the split's index that is there already, or from another split's; tars hold numbers only.
    """
    splits = shards.splits_of(folder)
    if not splits:
        raise ValueError(f"{printable(folder)} holds no shards such as train-000000.tar")
    names = {split: shards.classes_of(folder, split) for split in splits}
    known = next((found for found in names.values() if found is not None), None)
    for split in splits:
        print(f"{printable(split)}: {shards.write_index(folder, split, names[split] or known)} images")


def prepare(asked: Preparation) -> None:
    """Do all that is asked for and is not there yet; says what was done. Raises ValueError for what is wrong."""
    print(f"listing {printable(asked.source)} ...", flush=True)
    items = archives.find(asked.source)
    check_source(items, asked)
    asked.to.mkdir(parents=True, exist_ok=True)
    with alone(asked.to):
        make_room(asked, items)
        check_same_plan(asked, items)
        done, checked = write(items, asked)
    print(
        ", ".join(f"{split}: {count} images" for split, count in done.items())
        + f"; {checked} compared with their source"
        + ("" if asked.short_side else "; the bytes of images were kept, and not decoded")
    )
    choice = "imagenet_shards" if asked.form == "shards" else "imagefolder" if asked.any_counts else "imagenet"
    print(f"python train.py data={choice} {override('data.root', str(asked.to.resolve()))}")


def override(key: str, value: str) -> str:
    """Return key=value as a word of a shell's command line, in the quotes that Hydra wants for all but plain paths."""
    if not re.fullmatch(r"[A-Za-z0-9_/.+@%:-]+", value):
        value = value.replace("${", "\\${")  # which would name another key
        value = '"' + re.sub(r'(\\*)("|$)', lambda m: m[1] * 2 + ("\\" + m[2] if m[2] else ""), value) + '"'
    return shlex.quote(f"{key}={value}")


def write(items: dict[str, list[Item]], asked: Preparation) -> tuple[dict[str, int], int]:
    """Return (images by split, images compared with their source)."""
    if asked.form == "folder":
        for split in items:
            (asked.to / split).mkdir(exist_ok=True)
    jobs = list(plan(items, asked))
    done = work(jobs, asked.workers)
    if asked.form == "shards":
        classes = sorted({item.class_name for item in items["train"]})
        for split, found in items.items():
            done[split] = shards.write_index(asked.to, split, classes)
            if done[split] != len(found):
                raise ValueError(
                    f"{printable(asked.to)} holds {done[split]} images of {split} instead of {len(found)}: remove {split}-*.tar "
                    "and repeat the command"
                )
    for name in ("LOC_synset_mapping.txt", "classes.txt"):
        if (asked.source / name).is_file():
            shutil.copyfile(asked.source / name, asked.to / name)
    return done, check_sample(jobs, asked.sample)
