"""Encoded image files to uint8 RGB: torchvision's JPEG decoder, and Pillow for whatever that does not read."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from anorm.data import jpeg
from anorm.data.transforms import Window

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff")
PILLOWS_LIMIT = 178_956_970  # pixels
PIXELS_PER_BYTE = 8 * 1032  # of one bit, as small as PNG's compression makes them
TIFF_BITS, TIFF_ORIENTATION, TIFF_SAMPLE_FORMAT = 258, 274, 339  # numbers of tags
UNDO_ORIENTATION = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_90",
    7: "TRANSVERSE",
    8: "ROTATE_270",
}


class BadImage(ValueError):
    """A file that no decoder reads; the message names it and says why."""

    @property
    def with_advice(self) -> BadImage:
        """Return the error that tells the user, whose run it ends, what to do."""
        return BadImage(f"{self}: mend or remove it, or set data.on_error=skip")


def decode(encoded: Tensor, name: str) -> Tensor:
    """Return uint8 (3,H,W), RGB, strides of an H x W x 3 array. encoded: 1-D uint8, the bytes of an image file.

    Grey is repeated, transparency dropped, more than 8 bits are reduced to 8 (`as_rgb`). Orientation, in EXIF or TIFF, is
    never applied, as in torchvision's ImageFolder on JPEGs, which made the published numbers.
    ImageNet holds a PNG and some CMYK files named .JPEG: these go through Pillow, they are not skipped.
    name: what an error calls the file. Raises BadImage.
    """
    if is_jpeg(encoded):
        try:
            return jpeg_decoder()(encoded, mode="RGB")
        except RuntimeError:
            pass  # CMYK, arithmetic coding, damage: Pillow reads it or says what is wrong
    return _decode_with_pillow(encoded, name)


def decode_window(encoded: Tensor, name: str, choose: Callable[[int, int], Window]) -> tuple[Tensor, Window]:
    """Return the pixels, uint8 (3,h,w), of the window that `choose` asks for, given height and width; and the window.

    Pixels are those of `decode`. Where `jpeg.region` runs, a JPEG's pixels outside the window cost little. Raises BadImage.
    """
    size = jpeg.size(encoded)
    if size is not None:
        window = choose(*size)
        region = jpeg.region(encoded, *window[:4])
        return (window.cut(decode(encoded, name)) if region is None else region), window
    image = decode(encoded, name)
    window = choose(*image.shape[1:])
    return window.cut(image), window


def is_jpeg(encoded: Tensor) -> bool:
    return encoded[:3].tolist() == [0xFF, 0xD8, 0xFF]


@functools.cache
def jpeg_decoder() -> Callable[..., Tensor]:
    """Return torchvision's decoder (deprecated since 0.29), or its successor where it is gone; both are libjpeg-turbo."""
    try:
        from torchvision.io import decode_jpeg
    except ImportError:
        try:
            from torchcodec.decoders import decode_jpeg
        except ImportError as error:
            raise ValueError(
                "this torchvision has no JPEG decoder any more: pip install torchcodec"
            ) from error
        return decode_jpeg

    def decode_quietly(encoded: Tensor, mode: str) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)
            return decode_jpeg(encoded, mode=mode)

    return decode_quietly


def _decode_with_pillow(encoded: Tensor, name: str) -> Tensor:
    with opened(encoded.numpy().tobytes(), name) as image:
        pixels = numpy.array(as_rgb(image))
    return torch.from_numpy(pixels).permute(2, 0, 1)


@contextmanager
def opened(encoded: bytes, name: str) -> Iterator[Image]:
    """Give an image file as Pillow opens it, of any size. Within, Pillow's complaints become a BadImage of that name."""
    image = _pillow()
    try:
        with image.open(io.BytesIO(encoded)) as found:
            if found.width * found.height > max(PILLOWS_LIMIT, PIXELS_PER_BYTE * len(encoded)):
                raise BadImage(
                    f"{name} is not a readable image ({found.width} x {found.height} pixels in {len(encoded)} bytes)"
                )
            yield found
    except BadImage:
        raise
    except MemoryError as error:
        raise BadImage(f"{name} is not a readable image (it does not fit into this machine's memory)") from error
    except image.UnidentifiedImageError as error:
        raise BadImage(f"{name} is not a readable image (no image file)") from error
    except Exception as error:  # a parser raises whatever it stumbles over in a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadImage(f"{name} is not a readable image ({reason})") from error


@functools.cache
def _pillow() -> ModuleType:
    """Return PIL.Image without its limit of 179 million pixels, which is a guard against files that strangers send.

    A user's own photographs and scans are larger, and torchvision's decoder, which reads the other JPEGs, has none.
    `opened` refuses what a damaged header alone makes large: it would take the machine's memory.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    return Image


def as_rgb(image: Image) -> Image:
    """Return the image (of a file, its first frame) as 8-bit RGB, not turned. The only such conversion of the project.

    Grey of more bits keeps the high eight of its scale. A file of 16 bits says its scale. One of 32-bit integers or of
    floats says none: it is the smallest of 1 (floats), 8, 16 and 32 bits (31 of signed ones) that holds the
    image's largest value.
    Raises ValueError for negative values, for floats that are not finite or above 16 bits, and for what Pillow cannot
    convert.
    """
    stored = image.tag_v2.get(TIFF_ORIENTATION) if image.format == "TIFF" else None
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        found = _pillow().fromarray(_high_eight_bits(image))
    elif "transparency" in image.info:  # else Pillow warns of a loss
        found = image.convert("RGBA")
    else:
        found = image
    found = found.convert("RGB")
    if stored is not None and TIFF_ORIENTATION not in image.tag_v2:  # Pillow turns TIFF files, and no others
        undo = UNDO_ORIENTATION.get(stored)
        found = found.transpose(_pillow().Transpose[undo]) if undo else found
    return found


def _high_eight_bits(image: Image) -> numpy.ndarray:
    """uint8 (H,W) of a grey image in mode I;16, I or F."""
    values, tags = numpy.array(image), image.tag_v2 if image.format == "TIFF" else {}
    unsigned = tags.get(TIFF_SAMPLE_FORMAT, (1,))[0] == 1
    if image.mode == "I" and image.format == "TIFF" and unsigned:
        values = values.view(numpy.uint32)  # Pillow has no unsigned mode
    if not numpy.isfinite(values).all() or values.min() < 0:
        raise ValueError("its values are negative or no numbers, which is no brightness")
    largest = values.max()
    if image.mode == "F":
        scale = next((scale for scale in (1, 2**8 - 1, 2**16 - 1) if largest <= scale), None)
        if scale is None:
            raise ValueError(f"its values run up to {largest:g}: store them in 8 or 16 bits")
        return (values * (255 / scale) + 0.5).astype(numpy.uint8)
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # those are of 16 bits
        bits = next(bits for bits in (8, 16, 32 if unsigned else 31) if largest < 2**bits)
    else:
        bits = tags.get(TIFF_BITS, (16,))[0]
    return (values >> (bits - 8)).astype(numpy.uint8)
