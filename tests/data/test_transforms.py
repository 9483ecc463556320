import numpy
import pytest
import torch
from photographs import difference, picture
from PIL import Image
from scipy import stats
from torchvision.transforms import v2

from anorm.data.random import stream
from anorm.data.transforms import Crop


def tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(300, 400), (500, 333), (90, 97)])
def test_evaluation_equals_pillow(interpolation, size):
    pixels = picture(1, *size)
    ours = Crop(64, interpolation=interpolation).evaluate(tensor(pixels))
    resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    height, width = size
    short = 73  # round(64 * 256 / 224)
    new = (short, int(short * width / height)) if height < width else (int(short * height / width), short)
    resized = numpy.asarray(Image.fromarray(pixels).resize((new[1], new[0]), resample))
    top, left = round((new[0] - 64) / 2), round((new[1] - 64) / 2)
    expected = resized[top : top + 64, left : left + 64]
    # both filter in fixed point, rows then columns, with different numbers of bits: one level of 255 each, which
    # the weights of the bilinear filter (none negative) do not add up
    assert difference(ours.permute(1, 2, 0), expected) <= (1 if interpolation == "bilinear" else 2)


def test_training_resizes_the_cut_region_and_mirrors_it():
    image, crop = tensor(picture(2, 120, 160)), Crop(32)
    for seed in range(20):
        window = crop.window(120, 160, stream(seed, "augment"))
        region = window.cut(image)
        expected = v2.functional.resize(region, [32, 32], antialias=True)
        ours = crop.train(window.cut(image), window)
        assert torch.equal(ours, expected.flip(-1) if window.mirror else expected)


def test_the_windows_have_the_distribution_of_torchvision():
    height, width, count = 375, 500, 3000
    crop = Crop(224)
    ours = numpy.array([crop.window(height, width, stream(i, "augment"))[:4] for i in range(count)])
    torch.manual_seed(0)
    blank = torch.empty(3, height, width, dtype=torch.uint8)
    theirs = [v2.RandomResizedCrop(224).make_params([blank]) for _ in range(count)]
    for column, name in enumerate(("top", "left", "height", "width")):
        p = stats.ks_2samp(ours[:, column], [params[name] for params in theirs]).pvalue
        # both sets of draws are fixed; 1e-3 leaves four comparisons 0.4 % of bad luck, once
        assert p > 1e-3, (
            name,
            p,
        )


def test_every_window_lies_in_the_image():
    crop = Crop(8)
    for height, width in ((1, 1), (1, 300), (300, 1), (7, 50), (64, 64)):
        for seed in range(50):
            top, left, h, w, _ = crop.window(height, width, stream(seed, "augment"))
            assert h > 0 and w > 0 and 0 <= top <= height - h and 0 <= left <= width - w


def test_flips_take_half_of_the_images_and_can_be_off():
    mirrored = sum(Crop(8).window(20, 20, stream(i, "augment")).mirror for i in range(1000))
    assert 430 < mirrored < 570
    assert not any(Crop(8, flip=False).window(20, 20, stream(i, "augment")).mirror for i in range(50))


@pytest.mark.parametrize(
    "options, word",
    [
        ({"image_size": 0}, "image_size"),
        ({"image_size": -3}, "image_size"),
        ({"eval_resize": 100}, "eval_resize"),
        ({"interpolation": "nearest"}, "bilinear or bicubic"),
        ({"crop_scale": (0.5, 0.1)}, "crop_scale"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
    ],
)
def test_impossible_options_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        Crop(**options)
