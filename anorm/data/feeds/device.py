"""data.loader=device: every image decoded once and kept as uint8 on the device, cropped and resized there.

Crops and flips are those of data.loader=torch, from the same streams. The resize is the same antialiased filter, as two
small matrix products an image, and agrees to one level of 255. For a set that fits: a new norm in an afternoon on one GPU.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from anorm.data.decode import BadImage
from anorm.data.feeds.base import Feed, Request, generators
from anorm.data.feeds.workers import forking, start_worker
from anorm.data.sources.base import EncodedImages, FetchedImages

CHUNK = 64  # images that a worker decodes and sends at once
FREE_SHARE = 0.6  # of the device's free memory for images; the rest is the network's
WINDOWS = 1 << 25  # pixels that are cut out at once, at 36 bytes each


class DeviceFeed(Feed):
    """Holds the whole data set, read when it is made. Raises ValueError where it does not fit, with the numbers."""

    def __init__(self, dataset: EncodedImages, seed: int, workers: int, device: torch.device):
        super().__init__()
        self._dataset, self._seed, self._device = dataset, seed, device
        self._load(workers)

    def _load(self, workers: int) -> None:
        # they are gathered in the machine's memory, whatever the device
        free = {device: FREE_SHARE * _free_memory(device) for device in (torch.device("cpu"), self._device)}
        scarcest = min(free, key=free.get)
        limit, shapes, used = free[scarcest], [], 0
        try:
            # pages that are not written take no memory, and forked processes share them
            memory = mmap.mmap(-1, int(limit))
        except OSError as error:
            raise ValueError(
                f"data.loader=device: the system gives no {limit / 1e9:.1f} GB for images ({error.strerror}): use "
                "data.loader=torch, or lift the limit (ulimit -v, vm.overcommit_memory)"
            ) from error
        chunks = DataLoader(
            _Whole(self._dataset),
            batch_size=None,
            num_workers=workers,
            worker_init_fn=start_worker,
            generator=torch.Generator(),
        )
        with forking():
            chunks = iter(chunks)
        for part, sizes, bad in chunks:
            if bad and self._dataset.on_error == "error":
                raise BadImage(bad[0][1]).with_advice
            self.note(bad)
            shapes += sizes
            if used + len(part) > limit:
                raise ValueError(
                    f"data.loader=device: {len(shapes)} of {len(self._dataset)} images already take "
                    f"{(used + len(part)) / 1e9:.1f} GB, and {scarcest} has {limit / 1e9:.1f} GB for them: use "
                    "data.loader=torch, or smaller images (tools/prepare_imagenet.py --short-side)"
                )
            memory[used : used + len(part)] = part.numpy()
            used += len(part)
        if len(self.bad) == len(shapes):
            raise ValueError(f"every one of the {len(shapes)} images is unreadable; the first: {self.bad[0]}")
        self._shapes = shapes
        starts = list(itertools.accumulate((3 * height * width for height, width in shapes), initial=0))
        self._starts = torch.tensor(starts[:-1]).to(self._device)
        memory.resize(used)
        self._pixels = torch.frombuffer(memory, dtype=torch.uint8).to(self._device)

    def run(self, requests: Iterable[Request]) -> Iterator[FetchedImages]:
        for request in requests:
            rngs = generators(request, self._seed)
            if rngs is None:
                indices = [i for i in request.indices.tolist() if i not in self.bad]
                cuts = [self._evaluation(*self._shapes[i]) for i in indices]
            else:
                indices = [self._good(i) for i in request.indices.tolist()]
                cuts = [self._training(*self._shapes[i], rng) for i, rng in zip(indices, rngs, strict=True)]
            index = torch.tensor(indices, dtype=torch.int64)
            size = self._dataset.image_size
            images = [torch.empty((0, 3, size, size), dtype=torch.uint8, device=self._device)]
            for part in _parts(cuts):
                images.append(self._resized(index[part], torch.tensor(cuts[part], dtype=torch.int64)))
            yield FetchedImages(torch.cat(images), self._dataset.labels[index], index, [])

    def _good(self, index: int) -> int:
        while index in self.bad:
            index = (index + 1) % len(self._dataset)
        return index

    def _training(self, height: int, width: int, rng: torch.Generator) -> tuple[int, ...]:
        window, size = self._dataset.crop.window(height, width, rng), self._dataset.image_size
        return (height, width, *window[:4], size, size, 0, 0, window.mirror)

    def _evaluation(self, height: int, width: int) -> tuple[int, ...]:
        (tall, wide), (top, left) = self._dataset.crop.evaluation(height, width)
        return (height, width, 0, 0, height, width, tall, wide, top, left, 0)

    def _resized(self, index: Tensor, cuts: Tensor) -> Tensor:
        """Return uint8 (n,3,S,S).

        cuts (n,11): image height and width; top, left, height and width of the window; height and width it is resized to;
        the first row and column of that which are wanted; mirror.
        """
        extent = cuts[:, 4:6].amax(0).tolist()
        tall, wide = extent
        cuts = cuts.to(self._device, non_blocking=True)
        height, width, top, left, h, w, to_h, to_w, first_y, first_x, mirror = cuts.unbind(1)
        y = torch.arange(tall, device=self._device).minimum(h[:, None] - 1) + top[:, None]
        x = torch.arange(wide, device=self._device).minimum(w[:, None] - 1) + left[:, None]
        base = self._starts[index.to(self._device, non_blocking=True)]
        planes = base[:, None] + torch.arange(3, device=self._device) * (height * width)[:, None]
        place = planes[:, :, None, None] + (y * width[:, None])[:, None, :, None] + x[:, None, None, :]
        window = self._pixels[place].float()
        size, kind = self._dataset.image_size, self._dataset.crop.interpolation
        columns = _filter(w, to_w, first_x, wide, size, kind)
        columns = torch.where(mirror.bool()[:, None, None], columns.flip(1), columns)
        rows = _filter(h, to_h, first_y, tall, size, kind)
        # columns first, rounded in between, as Pillow and torchvision do
        narrow = torch.matmul(window, columns.transpose(1, 2)[:, None]).add_(0.5).floor_().clamp_(0, 255)
        return torch.matmul(rows[:, None], narrow).add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)


def _parts(cuts: list[tuple[int, ...]]) -> Iterator[slice]:
    """Yield runs of images whose windows, each padded to the tallest and the widest, have at most ``WINDOWS`` pixels."""
    start = tall = wide = 0
    for i, cut in enumerate(cuts):
        tall, wide = max(tall, cut[4]), max(wide, cut[5])
        if i > start and (i + 1 - start) * tall * wide > WINDOWS:
            yield slice(start, i)
            start, tall, wide = i, cut[4], cut[5]
    if cuts:
        yield slice(start, len(cuts))


def _filter(length: Tensor, to: Tensor, first: Tensor, extent: int, size: int, kind: str) -> Tensor:
    """Return (n,size,extent): row i holds the weights that make pixel first + i of `to` out of `length`, padded to extent.

    The antialiased filters of Pillow: the kernel is stretched by the scale where it shrinks. bilinear: the triangle of
    half-width 1; bicubic: Keys' with a = -1/2 and half-width 2.
    """
    scale = (length.double() / to.double())[:, None, None]
    stretch, radius = scale.clamp(min=1), 1 if kind == "bilinear" else 2
    centre = (first[:, None] + torch.arange(size, device=length.device) + 0.5)[:, :, None] * scale
    place = torch.arange(extent, device=length.device)
    # Pillow keeps the pixels whose index lies between these, rounded
    low = (centre - radius * stretch + 0.5).floor().clamp(min=0)
    high = (centre + radius * stretch + 0.5).floor().minimum(length[:, None, None].double())
    distance = ((place + 0.5 - centre) / stretch).abs()
    if kind == "bilinear":
        weight = (1 - distance).clamp(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    weight = torch.where((place >= low) & (place < high), weight, 0)
    return (weight / weight.sum(2, keepdim=True)).float()


class _Whole(TorchDataset):
    """Chunks of the data set, decoded: all pixels in a row, (3,H,W) an image; each (H,W); the bad ones, which have no pixels."""

    def __init__(self, dataset: EncodedImages):
        self.dataset = dataset

    def __len__(self) -> int:
        return -(-len(self.dataset) // CHUNK)

    def __getitem__(self, number: int) -> tuple[Tensor, list[tuple[int, int]], list[tuple[int, str]]]:
        pixels, sizes, bad = [], [], []
        for index in range(number * CHUNK, min((number + 1) * CHUNK, len(self.dataset))):
            try:
                image = self.dataset.decoded(index)
            except BadImage as error:
                bad.append((index, str(error)))
                image = torch.empty((3, 0, 0), dtype=torch.uint8)
            pixels.append(image.reshape(-1))
            sizes.append((image.shape[1], image.shape[2]))
        return torch.cat(pixels), sizes, bad


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError), open("/proc/meminfo") as lines:  # what caches hold is free, too
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
