"""How fast images are read: this project's loaders beside torchvision's usual one and DALI's own pipeline.

    python -m benchmarks.loader FOLDER [--shards SHARDS] [--workers 1]

FOLDER holds CLASS/IMAGE files (full-size photographs make it meaningful), SHARDS what tools/prepare_imagenet.py wrote.
Every row reads the same images with as many worker processes (or threads, for DALI), in turns, several times; the best
of each is given, as other work on a machine only takes away. What a row leaves to the device is stated.
Seconds are wall-clock; "per core" divides by the processor time of this process and its workers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from anorm.data.feeds import open_feed
from anorm.data.feeds.base import Request
from anorm.data.index import index_folder
from anorm.data.shards import ShardStore
from anorm.data.sources.base import IMAGENET_MEAN, IMAGENET_STD, EncodedImages
from anorm.data.sources.folder import FolderStore
from anorm.data.transforms import Crop

SIZE = 224
TO_DEVICE = "normalisation (uint8 is handed over)"
Epoch = Callable[[int], Iterator[int]]


def torchvision_loader(folder: Path, batch: int, workers: int) -> Epoch:
    """Pillow, RandomResizedCrop, flip, ToTensor, Normalize, as in everyone's first ImageNet script."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(str(folder), transform),
        batch,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda epoch: (len(images) for images, _ in loader)


def our_loader(store, name: str, batch: int, workers: int) -> Epoch:
    dataset = EncodedImages(store, Crop(SIZE), "error", name)
    feed = open_feed(dataset, 0, batch, workers, torch.device("cpu"))

    def run(epoch: int) -> Iterator[int]:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(epoch))
        return (
            len(fetched.indices) for fetched in feed.run(Request(epoch, part) for part in order.split(batch))
        )

    return run


def dali_pipeline(files: list[str], batch: int, threads: int) -> Epoch:
    """DALI's own reader and random operators, as in its ImageNet example: region decode, antialiased resize, uint8."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None)
    def pipeline():
        encoded, _ = fn.readers.file(files=files, random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            encoded,
            output_type=types.RGB,
            random_area=[0.08, 1.0],
            random_aspect_ratio=[3 / 4, 4 / 3],
            num_attempts=10,
        )
        images = fn.resize(images, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    built = pipeline()
    built.build()

    def run(epoch: int) -> Iterator[int]:
        for _ in range(len(files) // batch):
            (images,) = built.run()
            yield len(images)

    return run


def processor_seconds(pids: set[int]) -> float:
    """User and system time of these processes so far."""
    total = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def family() -> set[int]:
    """This process and its children."""
    return {os.getpid(), *map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())}


def measure(epoch: Epoch, number: int, passes: int, workers_of: set[int]) -> tuple[float, float]:
    """Images a second, and images a processor-second, over some epochs in a row."""
    pids = workers_of | {os.getpid()}
    images, wall, used = 0, time.perf_counter(), processor_seconds(pids)
    for i in range(passes):
        images += sum(epoch(number * passes + i))
    return images / (time.perf_counter() - wall), images / max(processor_seconds(pids) - used, 1e-9)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--passes", type=int, default=2, help="epochs a measurement")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    try:
        index = index_folder(args.folder, cache=False)
        stores = {"files": FolderStore(index)} | (
            {"shards": ShardStore(args.shards, "train")} if args.shards else {}
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = [index.path(i) for i in range(len(index))]
    rows: dict[str, tuple[Callable[[], Epoch], str]] = {
        "torchvision ImageFolder (Pillow)": (
            lambda: torchvision_loader(args.folder, args.batch, args.workers),
            "nothing",
        )
    }
    for kind, store in stores.items():
        rows[f"anorm torch, {kind}"] = (
            lambda store=store: our_loader(store, "torch", args.batch, args.workers),
            TO_DEVICE,
        )
    try:  # DALI's threads come last: processes forked after them would hold copies of their locks
        import nvidia.dali  # noqa: F401

        rows["anorm dali, files"] = (
            lambda: our_loader(stores["files"], "dali", args.batch, args.workers),
            TO_DEVICE,
        )
        rows["DALI's own pipeline"] = (lambda: dali_pipeline(files, args.batch, args.workers), TO_DEVICE)
    except ImportError:
        print("NVIDIA DALI is not installed; its rows are left out")

    epochs, workers, best = {}, {}, {}
    for name, (make, _) in rows.items():
        before = family()
        epochs[name] = make()
        sum(epochs[name](0))  # starts workers, fills the page cache
        workers[name] = family() - before
    for number in range(1, args.rounds + 1):
        for name, epoch in epochs.items():
            found = measure(epoch, number, args.passes, workers[name])
            best[name] = tuple(map(max, zip(found, best.get(name, (0.0, 0.0)), strict=True)))
    print(
        f"{len(files)} images, {SIZE} x {SIZE}, batch {args.batch}, {args.workers} worker(s), best of {args.rounds}"
    )
    print(f"{'':34}{'images/s':>10}{'per core':>10}{'ratio':>8}   left to the device")
    base = best["torchvision ImageFolder (Pillow)"]
    for name, (wall, core) in best.items():
        print(f"{name:34}{wall:10.0f}{core:10.0f}{core / base[1]:8.2f}   {rows[name][1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
