"""Encoded image files to uint8 RGB: torchvision's JPEG decoder, and Pillow for whatever that does not read."""

from __future__ import annotations

import io

import torch
from torch import Tensor

EXTENSIONS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff")


class BadImage(ValueError):
    """A file that no decoder reads; the message names it."""


def decode(encoded: Tensor, name: str) -> Tensor:
    """encoded: 1-D uint8, the bytes of an image file. Returns uint8 (3,H,W), RGB, strides of an H x W x 3 array.

    Greyscale is repeated and transparency dropped. EXIF orientation is not applied, as in torchvision's ImageFolder.
    ImageNet holds a PNG and some CMYK files named .JPEG: these go through Pillow, they are not skipped.
    name: what an error calls the file. Raises BadImage.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    if is_jpeg(encoded):
        try:
            return decode_jpeg(encoded, mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # CMYK, arithmetic coding, damage: Pillow reads it or says what is wrong
    return _decode_with_pillow(encoded, name)


def is_jpeg(encoded: Tensor) -> bool:
    return encoded[:3].tolist() == [0xFF, 0xD8, 0xFF]


def _decode_with_pillow(encoded: Tensor, name: str) -> Tensor:
    import numpy
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded.numpy().tobytes())) as image:
            pixels = numpy.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's words for "not readable"
        raise BadImage(f"{name} is not a readable image ({str(error).splitlines()[0]}): replace or remove it, "
                       "or set data.on_error=skip") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)
