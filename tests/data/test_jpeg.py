"""Regions of JPEGs: the pixels of the whole image, whatever the file's kind, and no opinion on files that are not clean."""

import io
import os
import random
import subprocess
import sys

import pytest
import torch
from photographs import picture
from PIL import Image

from anorm.data import jpeg
from anorm.data.decode import BadImage, decode, decode_window
from anorm.data.transforms import Window

pytestmark = pytest.mark.skipif(jpeg.why_not() is not None, reason=str(jpeg.why_not()))


def encoded(pixels, form="JPEG", mode="RGB", **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def rough(height, width):
    """Smooth colours with noise on them, so that every coefficient and every neighbour counts."""
    noise = torch.randint(
        -60, 60, (height, width, 3), generator=torch.Generator().manual_seed(height)
    ).numpy()
    return (picture(3, height, width).astype("int16") + noise).clip(0, 255).astype("uint8")


def windows(height, width, count=40):
    """Random ones, the whole, and single pixels in the corners."""
    draw = random.Random(0)
    yield Window(0, 0, height, width, False)
    for top, left in ((0, 0), (0, width - 1), (height - 1, 0), (height - 1, width - 1)):
        yield Window(top, left, 1, 1, False)
    for _ in range(count):
        h, w = draw.randint(1, height), draw.randint(1, width)
        yield Window(draw.randint(0, height - h), draw.randint(0, width - w), h, w, False)


KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"subsampling": 2, "progressive": True},
    "restart markers": {"subsampling": 2, "restart_marker_blocks": 3},
    "grey": {"mode": "L"},
    "RGB kept": {"keep_rgb": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(96, 128), (67, 93), (5, 7)])
def test_a_region_has_the_pixels_of_the_whole(kind, size):
    data = encoded(rough(*size), quality=92, **KINDS[kind])
    whole = decode(data, "x.JPEG")
    assert jpeg.size(data) == size == tuple(whole.shape[1:])
    for window in windows(*size):
        region = jpeg.region(data, *window[:4])
        assert torch.equal(region, window.cut(whole)), window
        assert region.permute(1, 2, 0).is_contiguous()


def never(height, width):
    raise AssertionError("asked for a window of an image that cannot be read")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_file_that_is_cut_off_is_bad_wherever_the_window_is(share):
    data = encoded(rough(96, 128), quality=92)
    with pytest.raises(BadImage, match="some/where.JPEG is not a readable image"):
        decode_window(data[: int(share * len(data))], "some/where.JPEG", never)


def test_damage_is_left_to_the_decoder_of_whole_images():
    data = encoded(rough(96, 128), quality=92)
    damaged = data.clone()
    damaged[len(data) // 2 : len(data) // 2 + 2] = torch.tensor([0xFF, 0xD9])  # the end, in the middle
    above, below = Window(4, 20, 20, 50, False), Window(60, 20, 30, 50, False)
    assert jpeg.region(damaged, *above[:4]) is not None and jpeg.region(damaged, *below[:4]) is None
    whole = decode(damaged, "x.JPEG")
    for window in (above, below):
        pixels, chosen = decode_window(damaged, "x.JPEG", lambda height, width, window=window: window)
        assert chosen == window and torch.equal(pixels, window.cut(whole))


@pytest.mark.parametrize(
    "form, options", [("PNG", {}), ("JPEG", {"mode": "CMYK"}), ("BMP", {})], ids=["PNG", "CMYK", "BMP"]
)
def test_other_files_are_decoded_whole(form, options):
    data = encoded(rough(40, 56), form, **options)
    assert jpeg.size(data) is None
    window = Window(3, 9, 20, 30, True)
    pixels, chosen = decode_window(data, "x.JPEG", lambda height, width: window)
    assert chosen == window and torch.equal(pixels, window.cut(decode(data, "x.JPEG")))


@pytest.mark.parametrize(
    "data", [b"", b"\xff", b"\xff\xd9", b"\xff\xd8\xff\xd9", b"\xff\xd8\xff damaged \xff\xd9"]
)
def test_what_is_no_image_has_no_size(data):
    assert jpeg.size(torch.tensor(list(data), dtype=torch.uint8)) is None


def test_without_a_compiler_the_same_windows_come_from_whole_images(tmp_path):
    data = encoded(rough(67, 93), quality=92)
    torch.save(data, tmp_path / "data.pt")
    code = """if True:
        import sys, torch
        from anorm.data import jpeg
        from anorm.data.decode import decode_window
        from anorm.data.transforms import Window
        data = torch.load(sys.argv[1])
        pixels, window = decode_window(data, "x.JPEG", lambda height, width: Window(7, 8, height - 20, width - 30, True))
        torch.save((jpeg.why_not(), pixels, tuple(window)), sys.argv[2])
    """
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "data.pt", tmp_path / "answer.pt"],
        env=os.environ | {"ANORM_CACHE": str(tmp_path), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    reason, pixels, window = torch.load(tmp_path / "answer.pt")
    assert "no-such-compiler is not on the PATH" in reason and "apt install libjpeg-dev" in reason
    assert window == (7, 8, 47, 63, True)
    assert torch.equal(pixels, jpeg.region(data, *window[:4]))


def test_a_progressive_file_that_lacks_scans_is_decoded_whole():
    """libjpeg smooths such an image over its blocks."""
    data = bytes(encoded(rough(96, 128), quality=92, progressive=True).tolist())
    scans = [at for at in range(len(data) - 1) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) > 4
    cut = torch.frombuffer(bytearray(data[: scans[3]] + b"\xff\xd9"), dtype=torch.uint8)
    assert jpeg.size(cut) == (96, 128)
    window = Window(20, 30, 40, 50, False)
    assert jpeg.region(cut, *window[:4]) is None
    pixels, _ = decode_window(cut, "x.JPEG", lambda height, width: window)
    assert torch.equal(pixels, window.cut(decode(cut, "x.JPEG")))
