import io

import numpy
import pytest
import torch
from photographs import difference, picture
from PIL import Image

from anorm.data.decode import BadImage, decode


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_decode_as_pillow_decodes_them(mode):
    image = Image.fromarray(picture(0, 64, 80)).convert(mode)
    data = encoded(image, "JPEG", quality=95)
    ours = decode(data, "x.JPEG")
    expected = Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB")
    assert ours.dtype == torch.uint8 and ours.shape == (3, 64, 80)
    # two builds of libjpeg-turbo, whose inverse DCTs may round differently
    assert difference(ours.permute(1, 2, 0), numpy.asarray(expected)) <= 2


@pytest.mark.parametrize("form", ["PNG", "BMP", "WEBP", "GIF"])
def test_other_formats_named_jpeg_are_read_by_pillow(form):
    data = encoded(
        Image.fromarray(picture(0, 20, 30)), form, **({"lossless": True} if form == "WEBP" else {})
    )
    expected = numpy.asarray(Image.open(io.BytesIO(data.numpy().tobytes())).convert("RGB"))
    assert difference(decode(data, "n02105855_2933.JPEG").permute(1, 2, 0), expected) == 0


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_file_that_is_no_image_is_named(damage):
    data = encoded(Image.fromarray(picture(0, 64, 80)), "JPEG")
    data = {
        "cut": data[: len(data) // 2],
        "text": torch.tensor(list(b"not an image")).to(torch.uint8),
        "empty": torch.zeros(1, dtype=torch.uint8),
    }[damage]
    with pytest.raises(BadImage, match=r"^some/where\.JPEG is not a readable image \([^<]*\)$") as caught:
        decode(data, "some/where.JPEG")
    assert str(caught.value.with_advice).endswith(": mend or remove it, or set data.on_error=skip")
