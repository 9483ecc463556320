"""The 19 corruptions: their draws, their parameters, and properties that follow from what each is said to do."""

import numpy as np
import pytest
import torch
from PIL import Image

from anorm.data.corruptions import CORRUPTIONS, EXTRA, MAIN, corrupt


@pytest.fixture(scope="module")
def images():
    """Smooth pictures with edges, the last of one colour."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(6, 3, 6, 6, generator=rng) * 220 + 20
    found = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 255).round()
    found[5] = torch.tensor([40.0, 130.0, 200.0]).view(3, 1, 1)
    found[:, :, 10:20, 12:] = 255 - found[:, :, 10:20, 12:]
    found[5] = torch.tensor([40.0, 130.0, 200.0]).view(3, 1, 1)
    return found.to(torch.uint8)


def changed(images, name, severity):
    """Mean distance to the clean images in 0..1."""
    found = corrupt(images, name, severity, range(len(images)))
    return ((found.float() - images.float()) / 255).abs().mean().item()


def test_there_are_fifteen_and_four_with_five_severities_each():
    assert (len(MAIN), len(EXTRA), len(CORRUPTIONS)) == (15, 4, 19)
    assert {len(parameters) for _, parameters in CORRUPTIONS.values()} == {5}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_alone_and_among_others(images, name):
    for severity in (1, 5):
        whole = corrupt(images, name, severity, range(10, 16))
        assert whole.shape == images.shape and whole.dtype == torch.uint8
        some = corrupt(images[[4, 1]], name, severity, [14, 11])
        assert torch.equal(some, whole[[4, 1]])


@pytest.mark.parametrize(
    "name", sorted(set(CORRUPTIONS) - {"elastic_transform", "saturate", "spatter", "frost"})
)
def test_the_highest_severity_changes_more_than_the_lowest(images, name):
    """The four left out change in kind from level to level: their parameters do not rise."""
    assert changed(images, name, 5) > changed(images, name, 1) > 0


RANDOM = {
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "speckle_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "spatter",
    "elastic_transform",
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_draws_differ_from_image_to_image_where_there_are_any(images, name):
    two = corrupt(images[:1].expand(2, -1, -1, -1), name, 5, [0, 1])
    assert torch.equal(two[0], two[1]) == (name not in RANDOM)


def test_noise_has_the_published_size():
    gray = torch.full((40, 3, 32, 32), 128, dtype=torch.uint8)
    values = gray.numel()
    for severity, sigma in ((1, 0.04), (5, 0.10)):
        noise = (corrupt(gray, "gaussian_noise", severity, range(40)).float() + 0.5) / 255 - 128 / 255
        # a standard deviation of n values is known to 1 / sqrt(2 n) of itself
        assert noise.std().item() == pytest.approx(sigma, rel=5 / (2 * values) ** 0.5)
        speckle = (corrupt(gray, "speckle_noise", severity, range(40)).float() + 0.5) / 255 - 128 / 255
        assert speckle.std().item() == pytest.approx(
            128 / 255 * {1: 0.06, 5: 0.2}[severity], rel=5 / (2 * values) ** 0.5
        )
    photons = 50
    shot = corrupt(gray, "shot_noise", 5, range(40)).double() / 255
    assert shot.var().item() == pytest.approx(128 / 255 / photons, rel=0.05)
    struck = corrupt(gray, "impulse_noise", 5, range(40))
    for value in (0, 255):
        share = (struck == value).double().mean().item()
        assert share == pytest.approx(0.035, abs=5 * (0.035 / values) ** 0.5)


def test_blurs_keep_the_mean_and_lose_detail(images):
    plain = images[:5].float()
    for name in ("gaussian_blur", "defocus_blur", "zoom_blur"):
        found = corrupt(images[:5], name, 5, range(5)).float()
        assert (found.mean() - plain.mean()).abs() < 5  # of 255
        assert found.diff(dim=3).abs().mean() < plain.diff(dim=3).abs().mean()


def test_a_plain_image_stays_plain_under_blurs_and_geometry(images):
    for name in (
        "gaussian_blur",
        "defocus_blur",
        "glass_blur",
        "motion_blur",
        "zoom_blur",
        "elastic_transform",
        "pixelate",
        "contrast",
    ):
        found = corrupt(images[5:], name, 5, [0]).int()
        assert (found - images[5:].int()).abs().max() <= 1, name  # values are cut off to whole ones


def test_the_gaussian_is_scipys(images):
    from scipy.ndimage import gaussian_filter

    found = corrupt(images, "gaussian_blur", 5, range(6))
    expected = gaussian_filter(images.double().numpy() / 255, (0, 0, 1, 1), mode="nearest", truncate=4)
    assert np.abs(found.numpy() - np.floor(expected * 255)).max() <= 1


def test_contrast_brightness_and_saturation_are_what_pillow_and_colorsys_say(images):
    import colorsys

    x = images.double() / 255
    mean = x.mean((2, 3), keepdim=True)
    expected = ((x - mean) * 0.15 + mean) * 255
    assert (corrupt(images, "contrast", 5, range(6)).double() - expected.floor()).abs().max() <= 1
    for name, change in (
        ("brightness", lambda h, s, v: (h, s, min(1, v + 0.3))),
        ("saturate", lambda h, s, v: (h, min(1, s * 2.5 + 0.2), v)),
    ):
        found = corrupt(images, name, 5, range(6))
        for i, row, column in ((0, 3, 4), (1, 15, 20), (2, 31, 0), (5, 8, 8)):
            pixel = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*x[i, :, row, column].tolist())))
            assert found[i, :, row, column].tolist() == pytest.approx(
                [255 * value for value in pixel], abs=1.01
            )


def test_jpeg_and_pixelate_are_pillows(images):
    import io

    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=40)
    expected = np.asarray(Image.open(encoded)).transpose(2, 0, 1).astype(int)
    assert np.abs(corrupt(images, "jpeg_compression", 5, range(6))[0].numpy() - expected).max() <= 1
    expected = np.asarray(picture.resize((20, 20), Image.BOX).resize((32, 32), Image.BOX)).transpose(2, 0, 1)
    assert np.abs(corrupt(images, "pixelate", 5, range(6))[0].numpy() - expected.astype(int)).max() <= 1


def test_motion_goes_along_its_line():
    """A point becomes a line of 2 r + 1 pixels at most, in one direction, within 45 degrees of the horizontal."""
    point = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    point[:, :, 16, 16] = 255
    found = corrupt(point, "motion_blur", 5, range(8))[:, 0]
    for image in found:
        rows, columns = torch.nonzero(image).unbind(1)
        assert (columns <= 16).all() and len(columns) > 3
        assert (rows - 16).abs().le(16 - columns).all()


def test_what_is_unknown_or_of_another_size_is_said(images):
    with pytest.raises(ValueError, match="'gausian_noise' is unknown: did you mean gaussian_noise"):
        corrupt(images, "gausian_noise", 1, range(6))
    with pytest.raises(ValueError, match="severity 6 of fog must be one of 1, 2, 3, 4, 5"):
        corrupt(images, "fog", 6, range(6))
    with pytest.raises(ValueError, match="32 x 32"):
        corrupt(images[:, :, :30, :30], "fog", 1, range(6))
    assert corrupt(images[:0], "fog", 1, []).shape == (0, 3, 32, 32)
