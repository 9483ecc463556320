"""Whatever a file's mode, the loaders and the preparation see the same 8-bit RGB; known values in, known values out."""

import io
import random
import struct
import warnings

import numpy
import pytest
import torch
from photographs import picture
from PIL import Image

from anorm.data.decode import BadImage, _pillow, decode, decode_window
from anorm.data.transforms import Window
from anorm.prepare.imagenet import reencode

HEIGHT, WIDTH = 24, 32
RAMP = numpy.tile(numpy.linspace(0, 255, WIDTH).astype(numpy.uint8), (HEIGHT, 1))
COLOURS = picture(0, HEIGHT, WIDTH)
BIG = numpy.int64(2**24)


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


def tiff(content, bits, sample_format=1):
    """A plain grey TIFF file of one strip: bits a sample; 1 is unsigned, 2 signed, 3 floating."""
    tags = [(256, WIDTH), (257, HEIGHT), (258, bits), (259, 1), (262, 1), (273, 0), (277, 1), (278, HEIGHT)]
    tags += [(279, len(content)), (339, sample_format)]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags]
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + b"".join(entries) + bytes(4) + content


def packed_12_bits(values):
    pairs = values.astype(numpy.uint16).reshape(-1, 2)
    first, second = pairs[:, 0], pairs[:, 1]
    three = (first >> 4, (first & 15) << 4 | second >> 8, second & 255)
    return numpy.stack(three, 1).astype(numpy.uint8).tobytes()


def palette(**options):
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putpalette([v for i in range(256) for v in (i, 255 - i, 7)])
    image.putdata(RAMP.flatten().tolist())
    return saved(image, **options)


def alpha(mode, *planes):
    return saved(Image.merge(mode, [Image.fromarray(plane) for plane in (*planes, 255 - RAMP)]))


GREY = numpy.repeat(RAMP[..., None], 3, 2)
OF_PALETTE = numpy.stack([RAMP, 255 - RAMP, numpy.full_like(RAMP, 7)], 2)
CMYK = numpy.stack([RAMP, RAMP[:, ::-1], RAMP // 2, RAMP // 4], 2)
# (file, what it shows)
FILES = {
    "1 bit": (
        saved(Image.fromarray(RAMP).point(lambda v: 255 * (v > 100), "1")),
        numpy.where(GREY > 100, 255, 0),
    ),
    "8 bits": (saved(RAMP), GREY),
    "12 bits, TIFF": (tiff(packed_12_bits(RAMP.astype(int) * 16 + 15), 12), GREY),
    "16 bits, PNG": (saved(RAMP.astype(numpy.uint16) * 257), GREY),
    "16 bits, the high eight": (saved(RAMP.astype(numpy.uint16) * 256 + 255), GREY),
    "16 bits, TIFF": (saved(RAMP.astype(numpy.uint16) * 257, "TIFF"), GREY),
    "16 bits, big-endian TIFF": (
        saved(Image.frombytes("I;16B", (WIDTH, HEIGHT), (RAMP.astype(">u2") * 257).tobytes()), "TIFF"),
        GREY,
    ),
    "16 bits, PGM": (f"P5 {WIDTH} {HEIGHT} 65535\n".encode() + (RAMP.astype(">u2") * 257).tobytes(), GREY),
    "16 bits, PGM, dark": (
        f"P5 {WIDTH} {HEIGHT} 65535\n".encode() + RAMP.astype(">u2").tobytes(),
        0 * GREY,
    ),
    "32 bits of 8": (saved(RAMP.astype(numpy.int32), "TIFF"), GREY),
    "32 bits of 16": (saved(RAMP.astype(numpy.int32) * 257, "TIFF"), GREY),
    "32 bits, signed": (tiff((RAMP * (BIG // 2)).astype("<i4").tobytes(), 32, 2), GREY),
    "32 bits, unsigned": (tiff((RAMP * BIG).astype("<u4").tobytes(), 32), GREY),
    "16 bits, signed": (tiff((RAMP.astype(int) * 128).astype("<i2").tobytes(), 16, 2), GREY // 2),
    "float of 1": (saved(RAMP.astype(numpy.float32) / 255, "TIFF"), GREY),
    "float of 8 bits": (saved(RAMP.astype(numpy.float32), "TIFF"), GREY),
    "float of 16 bits": (saved(RAMP.astype(numpy.float32) * 257, "TIFF"), GREY),
    "palette": (palette(), OF_PALETTE),
    "palette, a transparent colour": (palette(transparency=3), OF_PALETTE),
    "palette, transparencies": (palette(transparency=bytes(range(256))), OF_PALETTE),
    "palette, GIF": (palette(form="GIF"), OF_PALETTE),
    "grey and alpha": (alpha("LA", RAMP), GREY),
    "colours and alpha": (alpha("RGBA", *COLOURS.transpose(2, 0, 1)), COLOURS),
    "grey, a transparent value": (saved(RAMP, transparency=8), GREY),
    "colours, a transparent one": (saved(COLOURS, transparency=(1, 2, 3)), COLOURS),
    "colours, 16 bits": (
        f"P6 {WIDTH} {HEIGHT} 65535\n".encode() + (COLOURS.astype(">u2") * 257).tobytes(),
        COLOURS,
    ),
    "CMYK": (
        saved(Image.fromarray(CMYK, "CMYK"), "TIFF"),
        (255 - CMYK[..., :3].astype(int)) * (255 - CMYK[..., 3:].astype(int)) // 255,
    ),
}
REFUSED = {
    "negative integers": (saved(RAMP.astype(numpy.int32) - 9, "TIFF"), "negative or no numbers"),
    "negative floats": (saved(RAMP.astype(numpy.float32) - 9, "TIFF"), "negative or no numbers"),
    "not a number": (saved(numpy.where(RAMP > 9, numpy.nan, 0).astype(numpy.float32), "TIFF"), "no numbers"),
    "floats without a scale": (saved(RAMP.astype(numpy.float32) * 1e6, "TIFF"), "run up to 2.55e"),
}


def tensor(content):
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


@pytest.mark.parametrize("kind", FILES)
def test_every_mode_is_seen_as_it_is_meant(kind):
    content, expected = FILES[kind]
    found = decode(tensor(content), "x").permute(1, 2, 0).numpy()
    assert found.shape == (HEIGHT, WIDTH, 3)
    assert numpy.abs(found.astype(int) - expected).max() <= (1 if kind == "CMYK" else 0)  # of rounding


@pytest.mark.parametrize("kind", FILES)
def test_the_preparation_converts_as_the_loaders_do(kind):
    """At the image's own size: what is lost is JPEG's alone, as for the image that the loaders see."""
    content, _ = FILES[kind]
    seen = decode(tensor(content), "x").permute(1, 2, 0).numpy()
    prepared = Image.open(io.BytesIO(reencode(content, "x", HEIGHT, 95)))
    plain = Image.open(io.BytesIO(saved(seen, "JPEG", quality=95, subsampling="4:2:0")))
    assert prepared.mode == "RGB" and prepared.tobytes() == plain.tobytes()


@pytest.mark.parametrize("kind", REFUSED)
def test_values_without_a_brightness_are_refused_by_both(kind):
    content, words = REFUSED[kind]
    with pytest.raises(BadImage, match=rf"^odd.tif is not a readable image \(.*{words}"):
        decode(tensor(content), "odd.tif")
    with pytest.raises(
        ValueError, match=rf"^odd.tif is not a readable image \(.*{words}.*: replace it in the source"
    ):
        reencode(content, "odd.tif", 8, 90)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_never_applied(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}.get(form, {})
    content = saved(COLOURS, form, exif=exif, **options)
    stored = decode(tensor(saved(COLOURS, form, **options)), "x")
    assert stored.shape == (3, HEIGHT, WIDTH)
    assert torch.equal(decode(tensor(content), "x"), stored)
    window, _ = decode_window(
        tensor(content), "x", lambda height, width: Window(2, 3, height - 5, width - 8, False)
    )
    assert torch.equal(window, stored[:, 2:-3, 3:-5])
    assert Image.open(io.BytesIO(reencode(content, "x", 12, 90))).size == (16, 12)


def test_an_image_of_180_million_pixels_is_read(monkeypatch, request):
    """Pillow's own limit is 179 million; it is lowered here, as such an image takes seconds."""
    request.addfinalizer(_pillow.cache_clear)
    for read in (
        lambda content: decode(tensor(content), "x"),
        lambda content: reencode(content, "x", 12, 90),
    ):
        monkeypatch.setattr(
            Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 3
        )  # more than twice too low: an error
        _pillow.cache_clear()
        assert len(read(saved(RAMP)))


def test_whatever_a_parser_stumbles_over_is_a_bad_image(monkeypatch):
    """An error that Pillow does not count among those of files, as its parsers raise on damage."""
    content = bytearray(saved(COLOURS, "BMP"))
    monkeypatch.setattr(
        Image.Image, "convert", lambda *args, **options: exec("raise OverflowError('too much')")
    )
    with pytest.raises(BadImage, match="x.bmp is not a readable image .too much"):
        decode(tensor(content), "x.bmp")


def test_a_damaged_header_does_not_take_the_memory():
    """1.8 thousand million pixels in 2 kB, which zeros alone would fill."""
    content = bytearray(saved(COLOURS, "BMP"))
    content[18:26] = struct.pack("<ii", 30_000, 60_000)
    with pytest.raises(BadImage, match=r"x.bmp is not a readable image .30000 x 60000 pixels in 2358 bytes"):
        decode(tensor(content), "x.bmp")


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG"])
def test_a_damaged_file_gives_an_image_or_is_a_bad_one(form):
    content, rng = saved(COLOURS, form), random.Random(0)
    for _ in range(40):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's, about the damage
                assert (
                    decode(tensor(damaged[: rng.choice((len(damaged), 9 * len(damaged) // 10))]), "x").dtype
                    == torch.uint8
                )
        except BadImage as error:
            assert str(error).startswith("x is not a readable image (")


def test_an_image_that_does_not_fit_into_memory_is_a_bad_one(monkeypatch):
    monkeypatch.setattr(Image.Image, "convert", lambda *args, **options: exec("raise MemoryError"))
    with pytest.raises(BadImage, match="x.png is not a readable image .it does not fit into this machine"):
        decode(tensor(saved(RAMP)), "x.png")
