"""Prepare ImageNet, or any set of class folders: one plan of jobs, done by several processes, which can be repeated."""

from __future__ import annotations

import collections
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from anorm.data import shards
from anorm.files import file_digest, write_atomic
from anorm.prepare import archives
from anorm.prepare.archives import Item
from anorm.processes.interrupt import end_with_parent

COUNTS = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000
CHUNK = 1000  # images of one job, and of one shard


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
    """What one process does at a time. labels: None for class folders, else the images' labels for a shard."""

    target: str
    items: list[Item]
    labels: list[int] | None
    short_side: int
    quality: int


def reencode(encoded: bytes, name: str, short_side: int, quality: int) -> bytes:
    """JPEG bytes with the short side at most `short_side` (0: as they are). What is small enough stays as it is.

    Antialiased bicubic down-sampling, 4:2:0, RGB.
    """
    from PIL import Image

    if not short_side:
        return encoded
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            ratio = short_side / min(image.size)
            if ratio >= 1 and image.format == "JPEG" and image.mode == "RGB":
                return encoded
            image = image.convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} is not a readable image ({error}): replace it in the source, or remove it there"
        ) from error
    if ratio < 1:
        size = [max(short_side, round(side * ratio)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def key(item: Item) -> str:
    """WebDataset's key: what stands before the first dot."""
    return Path(item.name).stem.replace(".", "_")


def prepared(item: Item, job: Job) -> bytes:
    return reencode(item.read(), f"{item.file}: {item.name}", job.short_side, job.quality)


def run(job: Job) -> int:
    """Do a job unless it is done; returns its number of images."""
    target = Path(job.target)
    if job.labels is not None:
        if not target.exists():
            shards.write_shard(
                target,
                (
                    (key(item), prepared(item, job), label)
                    for item, label in zip(job.items, job.labels, strict=True)
                ),
            )
        return len(job.items)
    for item in job.items:
        path = target / item.class_name / item.name
        # a name appears only when its content is whole, but for a loss of power
        if not path.exists() or (not job.short_side and path.stat().st_size != item.size):
            path.parent.mkdir(exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            partial.write_bytes(prepared(item, job))
            os.replace(partial, path)
    return len(job.items)


def plan(items: dict[str, list[Item]], asked: Preparation) -> Iterator[tuple[str, Job]]:
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
                yield (
                    split,
                    Job(
                        str(asked.to / f"{split}-{number:06d}.tar"),
                        part,
                        labels,
                        asked.short_side,
                        asked.quality,
                    ),
                )
            else:
                yield split, Job(str(asked.to / split), part, None, asked.short_side, asked.quality)


def check_source(items: dict[str, list[Item]], asked: Preparation) -> None:
    """Classes that agree, names that make keys, and (unless --any) ImageNet's own counts."""
    classes = {split: {item.class_name for item in found} for split, found in items.items()}
    if classes["train"] != classes["val"]:
        odd = sorted(classes["train"] ^ classes["val"])
        raise ValueError(f"{len(odd)} classes are in only one of train and val, such as {odd[0]}")
    for split, found in items.items():
        if not asked.any_counts and (len(found) != COUNTS[split] or len(classes[split]) != CLASSES):
            raise ValueError(
                f"{split} has {len(found)} images of {len(classes[split])} classes; ImageNet has {COUNTS[split]} of "
                f"{CLASSES}: complete the source, or give --any for another set"
            )
        [(name, count)] = collections.Counter(key(item) for item in found).most_common(1)
        if asked.form == "shards" and count > 1:
            raise ValueError(
                f"{split} holds {count} images that are called {name}: shards need a name an image; use --format folder"
            )


def check_md5(source: Path) -> None:
    for name, expected in archives.MD5.items():
        if (source / name).is_file():
            print(f"checking {name} ...", flush=True)
            found = file_digest(source / name, "md5")
            if found != expected:
                raise ValueError(f"{source / name} has MD5 {found}, not {expected}: download it again")


def check_same_plan(asked: Preparation, items: dict[str, list[Item]]) -> None:
    """What is there must come from the same images and options, or a shard would mix two preparations."""
    listing = json.dumps(
        {split: [(item.class_name, item.name, item.size) for item in found] for split, found in items.items()}
    )
    now = {
        "format": asked.form,
        "short_side": asked.short_side,
        "quality": asked.quality,
        "images": hashlib.blake2b(listing.encode(), digest_size=16).hexdigest(),
    }
    path = asked.to / "prepared.json"
    if path.exists():
        before = json.loads(path.read_text())
        if before != now:
            odd = ", ".join(key for key in now if before.get(key) != now[key])
            raise ValueError(f"{asked.to} was begun with other {odd}: give the same options, or another --to")
    else:
        write_atomic(path, json.dumps(now).encode())


def check_space(asked: Preparation, items: dict[str, list[Item]]) -> None:
    # an image of short side 256 at quality 90 takes about 40 kB; without re-encoding nothing shrinks
    wanted = sum(
        min(item.size, asked.short_side**2 if asked.short_side else item.size)
        for found in items.values()
        for item in found
    )
    there = sum(file.stat().st_size for file in asked.to.rglob("*") if file.is_file())
    free = shutil.disk_usage(asked.to).free
    if wanted - there > free:
        raise ValueError(
            f"{asked.to} has {free / 1e9:.1f} GB free and about {(wanted - there) / 1e9:.1f} GB are needed"
        )


def work(jobs: list[tuple[str, Job]], workers: int) -> dict[str, int]:
    """All jobs, `workers` at a time, with a progress bar; images done by split."""
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
    """(split, images) of each job as it is done; the first error cancels what has not begun."""
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
    """In a worker: be killed when the parent ends, however. The repeated command writes the same files."""
    end_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within: no other preparation writes to ``folder``. Raises ValueError while one does."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another preparation writes to {folder}: wait for it, or stop it") from None
        except OSError as error:
            print(
                f"{folder} cannot be locked ({error.strerror}): see that no other preparation writes to it",
                flush=True,
            )
        yield


def check_sample(jobs: list[tuple[str, Job]], count: int) -> int:
    """Prepare about `count` images spread over all jobs again and compare them, byte for byte, with what was written."""
    checked = 0
    for _, job in jobs[:: max(1, len(jobs) // count)]:
        every = max(1, len(job.items) * len(jobs) // count)
        written = _members(Path(job.target)) if job.labels is not None else None
        for item in job.items[::every]:
            path = Path(job.target) / item.class_name / item.name
            content = written.get(key(item)) if written is not None else path.read_bytes()
            if content != prepared(item, job):
                raise ValueError(
                    f"{job.target}: {item.name} is not what its source gives: delete it and repeat the command"
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
    """Write the indices of the shards in a folder and say how many images each holds."""
    for split in ("train", "val"):
        print(f"{split}: {shards.write_index(folder, split, shards.classes_of(folder, split))} images")


def prepare(asked: Preparation) -> None:
    """Do all that is asked for and is not there yet; says what was done. Raises ValueError for what is wrong."""
    print(f"listing {asked.source} ...", flush=True)
    items = archives.find(asked.source)
    check_source(items, asked)
    asked.to.mkdir(parents=True, exist_ok=True)
    with alone(asked.to):
        check_space(asked, items)
        check_same_plan(asked, items)
        done, checked = write(items, asked)
    print(
        ", ".join(f"{split}: {count} images" for split, count in done.items())
        + f"; {checked} compared with their source"
        + ("" if asked.short_side else "; the bytes of images were kept, and not decoded")
    )
    choice = "imagenet_shards" if asked.form == "shards" else "imagefolder" if asked.any_counts else "imagenet"
    print(f"python train.py data={choice} data.root={asked.to.resolve()}")


def write(items: dict[str, list[Item]], asked: Preparation) -> tuple[dict[str, int], int]:
    """(images by split, images compared with their source)."""
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
                    f"{asked.to} holds {done[split]} images of {split} instead of {len(found)}: remove {split}-*.tar "
                    "and repeat the command"
                )
    for name in ("LOC_synset_mapping.txt", "classes.txt"):
        if (asked.source / name).is_file():
            shutil.copyfile(asked.source / name, asked.to / name)
    return done, check_sample(jobs, asked.sample)
