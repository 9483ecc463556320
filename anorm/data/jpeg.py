"""Regions of JPEGs without the rest: `jpeg.cpp`, compiled on first use where libjpeg-turbo's headers are installed.

Training crops most of an image away, and decoding is most of a loader's work: this saves a quarter of it. The pixels are
those of decoding the whole image, so a machine without the headers gives the same training.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from anorm.native import BuildError, Library

LIBRARY = Library(
    name="jpeg",
    folder=Path(__file__).parent,
    sources={"jpeg.cpp": "-O2"},
    flags=("-std=c++17", "-fPIC"),
    link=("-ljpeg",),
)


@functools.cache
def why_not() -> str | None:
    """Return None if regions can be decoded (building the library if need be), else the reason in words."""
    try:
        _library()
    except (BuildError, OSError) as error:
        return f"{error} (it wants libjpeg-turbo 2.1 or newer with its headers: apt install libjpeg-dev)"
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(LIBRARY.compiled()))
    except OSError:  # the libjpeg that it was linked with is gone
        library = ctypes.CDLL(str(LIBRARY.compiled(rebuild=True)))
    for function in (library.anorm_jpeg_size, library.anorm_jpeg_region):
        function.restype = ctypes.c_bool
    return library


def size(encoded: Tensor) -> tuple[int, int] | None:
    """Return height and width of a JPEG that `region` may read, None of any other. encoded: contiguous uint8 (n,)."""
    if why_not() is not None:
        return None
    found = (ctypes.c_int * 2)()
    return tuple(found) if _library().anorm_jpeg_size(*_pointer(encoded), found) else None


def region(encoded: Tensor, top: int, left: int, height: int, width: int) -> Tensor | None:
    """Return a region, which must lie in the image; None where the file is damaged.

    uint8 (3,height,width), RGB, strides of a height x width x 3 array.
    """
    out = torch.empty((height, width, 3), dtype=torch.uint8)
    wanted = (ctypes.c_int * 4)(top, left, height, width)
    good = _library().anorm_jpeg_region(*_pointer(encoded), wanted, ctypes.c_void_p(out.data_ptr()))
    return out.permute(2, 0, 1) if good else None


def _pointer(encoded: Tensor) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return ctypes.c_void_p(encoded.data_ptr()), ctypes.c_size_t(encoded.numel())
