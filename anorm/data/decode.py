"""Encoded image files to uint8 RGB: torchvision's JPEG decoder, and Pillow for whatever that does not read."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from anorm.data import jpeg
from anorm.data.transforms import Window

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff")


class BadImage(ValueError):
    """A file that no decoder reads; the message names it and says why."""

    @property
    def with_advice(self) -> BadImage:
        """For a user whose run it ends."""
        return BadImage(f"{self}: mend or remove it, or set data.on_error=skip")


def decode(encoded: Tensor, name: str) -> Tensor:
    """encoded: 1-D uint8, the bytes of an image file. Returns uint8 (3,H,W), RGB, strides of an H x W x 3 array.

    Greyscale is repeated and transparency dropped. EXIF orientation is not applied, as in torchvision's ImageFolder.
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
    """The window of an image that `choose`, given height and width, asks for, uint8 (3,h,w); and what it asked for.

    The pixels are `decode`'s; where `jpeg.region` runs, those of a JPEG outside the window cost little. Raises BadImage.
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
    """torchvision's, which is deprecated since 0.29, and where it is gone its successor; both are libjpeg-turbo."""
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
    import numpy
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded.numpy().tobytes())) as image:
            if image.mode.startswith("I;16"):  # 16 bits of grey, which convert() would clip to white
                image = Image.fromarray((numpy.array(image) >> 8).astype(numpy.uint8))
            pixels = numpy.array(image.convert("RGB"))
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:  # Pillow's words for "not readable"
        reason = "no image file" if isinstance(error, UnidentifiedImageError) else str(error).splitlines()[0]
        raise BadImage(f"{name} is not a readable image ({reason})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
