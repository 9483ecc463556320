"""data.loader=dali: NVIDIA DALI decodes, crops and resizes, on the CPU or, for a GPU, with its hardware decoder.

Order, crops and flips come from here and not from DALI's readers and random operators. So epochs, the last batch and
resume are exact. Images are those of data.loader=torch up to the rounding of another decoder and antialiased resize.
"""

from __future__ import annotations

import io
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy
import torch

from anorm.data.decode import BadImage, decode, is_jpeg
from anorm.data.feeds.base import Feed, Request, generators, log
from anorm.data.sources.base import EncodedImages, FetchedImages

INSTALL = (
    "data.loader=dali needs NVIDIA DALI: pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120 where torch is a "
    "CUDA 12 build)"
)
INPUTS = ("encoded", "start", "shape", "size", "first", "mirror")


Rows = tuple[list[tuple[numpy.ndarray, ...]], list[int]]


class _Sent(NamedTuple):
    """A request on its way through the pipeline, and the images that stand for it."""

    request: Request
    indices: list[int]


class _Ahead:
    """Rows of requests in their order, made by threads for `threads` + 1 requests at a time.

    DALI asks for them in the thread that also trains, which would wait for slow files.
    """

    def __init__(self, rows: Callable[[Request], Rows], requests: Iterable[Request], threads: int):
        self._rows, self._requests, self._depth = rows, iter(requests), threads + 1
        self._pool, self._coming = ThreadPoolExecutor(threads), deque()

    def __next__(self) -> tuple[Request, Rows]:
        for request in itertools.islice(self._requests, self._depth - len(self._coming)):
            self._coming.append((request, self._pool.submit(self._rows, request)))
        if not self._coming:
            raise StopIteration
        request, rows = self._coming.popleft()
        return request, rows.result()

    def stop(self) -> Iterator[Request]:
        """End the threads; return the requests that were not answered."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        return itertools.chain([request for request, _ in self._coming], self._requests)


class DaliFeed(Feed):
    """One DALI pipeline with `workers` threads (at least one), and as many that read files and decide crops."""

    def __init__(self, dataset: EncodedImages, seed: int, batch: int, workers: int, device: torch.device):
        super().__init__()
        try:
            import nvidia.dali  # noqa: F401
        except ImportError as error:
            raise ValueError(INSTALL) from error
        self._dataset, self._seed, self._device = dataset, seed, device
        self._batch, self._workers = batch, workers
        self._pipeline, self._refused = None, set()

    def run(self, requests: Iterable[Request]) -> Iterator[FetchedImages]:
        threads = max(1, self._workers)
        self._ahead = ahead = _Ahead(self._rows, requests, threads)
        self._sent = deque()
        self._pipeline = self._build()  # an earlier one has read ahead of a run that is over
        try:
            while True:
                try:
                    (images,) = self._pipeline.run()
                except StopIteration:
                    return
                except RuntimeError as error:
                    self._find_bad_files(error)
                    again = itertools.chain([sent.request for sent in self._sent], ahead.stop())
                    self._ahead = ahead = _Ahead(self._rows, again, threads)
                    self._sent = deque()
                    self._pipeline = self._build()
                    continue
                index = torch.tensor(self._sent.popleft().indices, dtype=torch.int64)
                # a copy, or DALI would need new memory for every batch
                pixels = torch.from_dlpack(images.as_tensor()).clone().permute(0, 3, 1, 2)
                yield FetchedImages(pixels, self._dataset.labels[index], index, [])
        finally:
            ahead.stop()
            if self._ahead is ahead:  # another run may have begun
                self._ahead = None

    def close(self) -> None:
        self._pipeline = None

    def _build(self):
        from nvidia.dali import fn, pipeline_def, types

        on_gpu, size = self._device.type == "cuda", self._dataset.image_size
        kind = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}[
            self._dataset.crop.interpolation
        ]

        # if the pipeline held the feed, which holds it, only the collector would end DALI's threads
        inputs = weakref.WeakMethod(self._inputs)

        @pipeline_def
        def crop_resize_flip():
            encoded, start, shape, to, first, mirror = fn.external_source(
                source=lambda: inputs()(), num_outputs=len(INPUTS), batch=True
            )
            region = fn.decoders.image_slice(
                encoded,
                start=start,
                shape=shape,
                axis_names="HW",
                output_type=types.RGB,
                adjust_orientation=False,
                device="mixed" if on_gpu else "cpu",
                **({"jpeg_fancy_upsampling": True} if on_gpu else {}),
            )
            resized = fn.resize(region, size=to, interp_type=kind, antialias=True)
            cropped = fn.slice(resized, start=first, shape=[size, size], axis_names="HW")
            return fn.flip(cropped, horizontal=mirror)

        self._pipeline = None  # two would take twice the memory
        pipeline = crop_resize_flip(
            batch_size=self._batch,
            num_threads=max(1, self._workers),
            prefetch_queue_depth=2,
            exec_dynamic=True,  # nothing is written over what was handed over while it is being copied
            device_id=(self._device.index or 0) if on_gpu else None,
        )
        pipeline.build()
        return pipeline

    def _inputs(self) -> tuple[list[numpy.ndarray], ...]:
        """Return the next request's inputs, in the order of INPUTS. DALI calls it ahead of need."""
        while True:
            request, (rows, indices) = next(self._ahead)  # StopIteration tells DALI that there are no more
            if rows:
                self._sent.append(_Sent(request, indices))
                return tuple(list(column) for column in zip(*rows, strict=True))

    def _rows(self, request: Request) -> Rows:
        rngs, rows, indices = generators(request, self._seed), [], []
        for position, index in enumerate(request.indices.tolist()):
            for at in (index,) if rngs is None else range(index, index + len(self._dataset)):
                at %= len(self._dataset)
                if at in self.bad:
                    continue
                try:
                    encoded, height, width = self._readable(at)
                except BadImage as error:
                    self._reject(at, error)
                    continue
                rows.append((encoded, *self._cut(height, width, None if rngs is None else rngs[position])))
                indices.append(at)
                break
            else:
                if rngs is not None:
                    raise BadImage(f"every one of the {len(self._dataset)} training images is unreadable")
        return rows, indices

    def _readable(self, index: int) -> tuple[numpy.ndarray, int, int]:
        """Return (the file, height, width); where DALI might not read it as Pillow does, the decoded image as a bitmap."""
        encoded, name = self._dataset.read(index), self._dataset.store.name(index)
        data = encoded.numpy()
        shape = jpeg_shape(memoryview(data)) if is_jpeg(encoded) and index not in self._refused else None
        if shape is not None and data[-2:].tobytes() == b"\xff\xd9":
            return data, *shape
        # no colour JPEG, or one that may be cut off: decoding a region above the cut would not notice
        image = decode(encoded, name)
        return _bitmap(image), image.shape[1], image.shape[2]

    def _cut(self, height: int, width: int, rng: torch.Generator | None) -> tuple[numpy.ndarray, ...]:
        crop = self._dataset.crop
        if rng is None:
            (tall, wide), (top, left) = crop.evaluation(height, width)
            numbers = (0, 0), (height, width), (tall, wide), (top, left)
            mirror = False
        else:
            window, size = crop.window(height, width, rng), crop.image_size
            numbers = (window.top, window.left), (window.height, window.width), (size, size), (0, 0)
            mirror = window.mirror
        start, shape, to, first = (numpy.array(pair, dtype=numpy.int32) for pair in numbers)
        return start, shape, to.astype(numpy.float32), first, numpy.array(mirror, dtype=numpy.int32)

    def _find_bad_files(self, error: RuntimeError) -> None:
        """Find what DALI could not decode, which it does not say. If others read all, they go as bitmaps from now on."""
        before, sent = len(self.bad), {index for sent in self._sent for index in sent.indices}
        for index in sorted(sent):
            try:
                self._dataset.decoded(index)
            except BadImage as bad:
                self._reject(index, bad)
        if len(self.bad) == before:
            if sent <= self._refused:
                raise error
            words = " ".join(str(error).split())[:300]
            log.warning("DALI refuses one of %d images, which others decode: %s", len(sent), words)
            self._refused |= sent

    def _reject(self, index: int, error: BadImage) -> None:
        if self._dataset.on_error == "error":
            raise error.with_advice from error
        self.note([(index, str(error))])


def jpeg_shape(data: memoryview) -> tuple[int, int] | None:
    """Return height and width from a JPEG's frame header; None unless it is 8-bit, grey or three colours."""
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif 0xC0 <= marker <= 0xC2:  # baseline, extended, progressive
            height, width = (
                int.from_bytes(data[at + 5 : at + 7], "big"),
                int.from_bytes(data[at + 7 : at + 9], "big"),
            )
            return (
                (height, width) if data[at + 4] == 8 and data[at + 9] in (1, 3) and height and width else None
            )
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _bitmap(image: torch.Tensor) -> numpy.ndarray:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, "BMP")
    return numpy.frombuffer(buffer.getvalue(), dtype=numpy.uint8)
