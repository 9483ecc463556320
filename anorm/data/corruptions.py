"""The 19 corruptions of CIFAR-10-C at five severities, made anew: "CIFAR-10-C-like", never CIFAR-10-C.

Names, order and parameters are those of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (ICLR 2019), for images of 32 x 32. The published arrays cannot be made again to the bit:
their random numbers came from one unseeded stream. Here image i has draws of its own for every corruption and severity,
so a subset of the images is corrupted as in the whole set.

Three differ in kind: frost takes a procedural texture instead of photographs of frost; the drops of spatter are shaded by
their slope instead of by an edge detector; motion blur samples whole pixels along its line.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from anorm.data.random import stream
from anorm.words import nearest

__all__ = ["CORRUPTIONS", "EXTRA", "MAIN", "SEVERITIES", "SIDE", "corrupt"]

SIDE = 32
SEVERITIES = (1, 2, 3, 4, 5)
Draws = Sequence[torch.Generator]


def corrupt(images: Tensor, name: str, severity: int, indices: Sequence[int], seed: int = 0) -> Tensor:
    """Return ``images``, uint8 (n,3,32,32), corrupted: uint8 of the same shape.

    indices (n): the number of each image in its set, which with seed, name and severity names its draws.
    Raises ValueError for an unknown name or severity, and for images of another size.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"corruption {name!r} is unknown{nearest(name, CORRUPTIONS, 'corruptions')}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity} of {name} must be one of 1, 2, 3, 4, 5")
    if tuple(images.shape[1:]) != (3, SIDE, SIDE):
        raise ValueError(
            f"{name}: the corruptions are made for RGB images of {SIDE} x {SIDE}, not {list(images.shape[1:])}"
        )
    apply, parameters = CORRUPTIONS[name]
    draws = [stream(seed, f"corruption {name}", severity, int(index)) for index in indices]
    if not draws:
        return images
    found = apply(images.float() / 255, draws, parameters[severity - 1])
    return (found.clamp(0, 1) * 255).to(torch.uint8)


def _normal(draws: Draws, *shape: int) -> Tensor:
    return torch.stack([torch.randn(shape, generator=draw) for draw in draws])


def _uniform(draws: Draws, *shape: int) -> Tensor:
    return torch.stack([torch.rand(shape, generator=draw) for draw in draws])


# ---- noise


def _gaussian_noise(x: Tensor, draws: Draws, sigma: float) -> Tensor:
    return x + sigma * _normal(draws, *x.shape[1:])


def _shot_noise(x: Tensor, draws: Draws, photons: float) -> Tensor:
    return (
        torch.stack([torch.poisson(image * photons, draw) for image, draw in zip(x, draws, strict=True)])
        / photons
    )


def _impulse_noise(x: Tensor, draws: Draws, share: float) -> Tensor:
    """Values, not pixels, are replaced: each by 0 or by 1."""
    kind = _uniform(draws, *x.shape[1:])
    return torch.where(kind < share / 2, 0.0, torch.where(kind < share, 1.0, x))


def _speckle_noise(x: Tensor, draws: Draws, sigma: float) -> Tensor:
    return x + x * sigma * _normal(draws, *x.shape[1:])


# ---- blur


def _gaussian(x: Tensor, sigma: float, truncate: float = 4.0, pad: str = "replicate") -> Tensor:
    """Separable Gaussian blur of (n,c,H,W), cut off at ``truncate`` sigmas."""
    radius = int(truncate * sigma + 0.5)
    if radius == 0:
        return x
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    weights = weights / weights.sum()
    planes = x.flatten(0, 1)[:, None]
    planes = F.conv2d(F.pad(planes, (0, 0, radius, radius), mode=pad), weights.view(1, 1, -1, 1))
    planes = F.conv2d(F.pad(planes, (radius, radius, 0, 0), mode=pad), weights.view(1, 1, 1, -1))
    return planes[:, 0].view_as(x)


def _gaussian_blur(x: Tensor, draws: Draws, sigma: float) -> Tensor:
    return _gaussian(x, sigma)


def _defocus_blur(x: Tensor, draws: Draws, radius_alias: tuple[float, float]) -> Tensor:
    """A disk, its edge softened by a 3 x 3 Gaussian."""
    radius, alias = radius_alias
    steps = torch.arange(-8.0, 9.0)
    disk = ((steps[:, None] ** 2 + steps**2) <= radius**2).float()
    line = torch.exp(-0.5 * (torch.arange(-1.0, 2.0) / alias) ** 2)
    soft = (line[:, None] * line)[None, None] / line.sum() ** 2
    kernel = F.conv2d(disk[None, None] / disk.sum(), soft, padding=1)
    planes = F.conv2d(F.pad(x.flatten(0, 1)[:, None], (8,) * 4, mode="reflect"), kernel)
    return planes[:, 0].view_as(x)


def _glass_blur(x: Tensor, draws: Draws, parameters: tuple[float, int, int]) -> Tensor:
    """Between two blurs every pixel is taken from up to ``reach`` above and left of it. (The published loop writes a swap,
    which on views of one array is a copy.)
    """
    sigma, reach, rounds = parameters
    x = _gaussian(x, sigma)
    n, places = torch.arange(len(x))[:, None, None], torch.arange(SIDE)
    inner = (places > reach) & (places <= SIDE - reach)
    inner = inner[:, None] & inner
    for _ in range(rounds):
        moves = torch.stack([torch.randint(-reach, reach, (2, SIDE, SIDE), generator=draw) for draw in draws])
        down, right = torch.where(inner, moves, 0).unbind(1)
        x = x[n, :, places[:, None] + down, places + right].permute(0, 3, 1, 2)
    return _gaussian(x, sigma)


def _along(x: Tensor, angles: Tensor, radius: float, sigma: float) -> Tensor:
    """Motion blur of (n,c,H,W): the mean along a line that starts at the pixel, weighted by half a Gaussian."""
    offsets = torch.arange(2 * int(radius) + 1)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = weights / weights.sum()
    down = (torch.sin(angles)[:, None] * offsets).round().long()
    right = (torch.cos(angles)[:, None] * offsets).round().long()
    places = torch.arange(SIDE)
    n = torch.arange(len(x))[:, None, None]
    found = torch.zeros_like(x)
    for k in range(len(offsets)):
        rows = (places + down[:, k, None]).clamp(0, SIDE - 1)
        columns = (places + right[:, k, None]).clamp(0, SIDE - 1)
        found += weights[k] * x[n, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return found


def _motion_blur(x: Tensor, draws: Draws, radius_sigma: tuple[float, float]) -> Tensor:
    degrees = 90 * _uniform(draws, 1)[:, 0] - 45
    return _along(x, torch.deg2rad(degrees), *radius_sigma)


def _zoomed(x: Tensor, factor: float) -> Tensor:
    """The middle 1 / factor of (n,c,H,W), bilinear."""
    theta = torch.tensor([[1 / factor, 0.0, 0.0], [0.0, 1 / factor, 0.0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=True), align_corners=True)


def _zoom_blur(x: Tensor, draws: Draws, most: float) -> Tensor:
    factors = [1 + 0.01 * k for k in range(round((most - 1) / 0.01))]
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


# ---- weather


def _plasma(draws: Draws, side: int, decay: float) -> Tensor:
    """Diamond-square fractals (n,side,side) in 0..1, periodic. The largest step falls by the square of ``decay`` from one
    level to the next, as published: there a uniform number in (-step, step) is multiplied by the step again.
    """
    field, step, wibble = torch.zeros(len(draws), side, side), side, 1.0
    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        cells = corners.shape[1]
        around = corners + corners.roll(-1, 1)
        around = around + around.roll(-1, 2)
        middle = around / 4 + wibble * (2 * _uniform(draws, cells, cells) - 1)
        field[:, half::step, half::step] = middle
        above, left = middle + middle.roll(1, 1), middle + middle.roll(1, 2)
        across, along = corners + corners.roll(-1, 2), corners + corners.roll(-1, 1)
        field[:, ::step, half::step] = (above + across) / 4 + wibble * (2 * _uniform(draws, cells, cells) - 1)
        field[:, half::step, ::step] = (left + along) / 4 + wibble * (2 * _uniform(draws, cells, cells) - 1)
        step, wibble = half, wibble / decay**2
    field = field - field.amin((1, 2), keepdim=True)
    return field / field.amax((1, 2), keepdim=True)


def _fog(x: Tensor, draws: Draws, amount_decay: tuple[float, float]) -> Tensor:
    amount, decay = amount_decay
    most = x.amax((1, 2, 3), keepdim=True)
    return (x + amount * _plasma(draws, SIDE, decay)[:, None]) * most / (most + amount)


def _frost(x: Tensor, draws: Draws, shares: tuple[float, float]) -> Tensor:
    """Crystals: bright ridges where fractals cross their middle, bluish, over a milky ground."""
    keep, frost = shares
    ridges = 1 - 2 * (_plasma(draws, 2 * SIDE, 1.22) - 0.5).abs()
    ridges = ridges * (1 - 2 * (_plasma(draws, 2 * SIDE, 1.14) - 0.5).abs())
    top, left = (SIDE * _uniform(draws, 2)).long().unbind(1)
    n, places = torch.arange(len(x))[:, None, None], torch.arange(SIDE)
    ridges = ridges[n, (places + top[:, None])[:, :, None], (places + left[:, None])[:, None, :]]
    texture = 0.35 + 0.65 * ridges[:, None] ** 2 * torch.tensor([0.9, 0.97, 1.0]).view(1, 3, 1, 1)
    return keep * x + frost * texture


def _snow(x: Tensor, draws: Draws, parameters: tuple[float, ...]) -> Tensor:
    """Flakes fall along a line of -135 to -45 degrees; a second layer is the first, turned by half a circle."""
    mean, std, zoom, least, radius, sigma, keep = parameters
    flakes = mean + std * _normal(draws, 1, SIDE, SIDE)
    flakes = _zoomed(flakes, zoom)
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    angles = torch.deg2rad(-135 + 90 * _uniform(draws, 1)[:, 0])
    flakes = _along(flakes, angles, radius, sigma)
    white = torch.maximum(x, 1.5 * _gray(x) + 0.5)
    return keep * x + (1 - keep) * white + flakes + flakes.flip(2, 3)


def _spatter(x: Tensor, draws: Draws, parameters: tuple[float, ...]) -> Tensor:
    """Drops where a smooth random field is high: water that shines on the side of its slope, or mud that covers."""
    mean, std, sigma, least, strength, mud = parameters
    liquid = _gaussian(mean + std * _normal(draws, 1, SIDE, SIDE), sigma)
    liquid = torch.where(liquid < least, 0.0, liquid)
    if mud:
        covered = _gaussian((liquid > least).float(), strength)
        covered = torch.where(covered < 0.8, 0.0, covered)
        brown = torch.tensor([63.0, 42.0, 20.0]).view(1, 3, 1, 1) / 255
        return x * (1 - covered) + covered * brown
    light = torch.tensor([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    shine = F.conv2d(F.pad(liquid, (1,) * 4, mode="reflect"), light[None, None]).clamp(min=0)
    shine = F.avg_pool2d(F.pad(shine, (1,) * 4, mode="reflect"), 3, stride=1) * liquid
    shine = strength * shine / shine.amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
    return x + shine * torch.tensor([175.0, 238.0, 238.0]).view(1, 3, 1, 1) / 255


# ---- colour and coding


def _gray(x: Tensor) -> Tensor:
    """Luma of ITU-R BT.601, (n,1,H,W)."""
    return (x * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _to_hsv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in sixths of a circle, saturation and value, each (n,H,W)."""
    value, least = x.amax(1), x.amin(1)
    span = value - least
    red, green, blue = x.unbind(1)
    safe = torch.where(span > 0, span, 1.0)
    hue = torch.where(
        value == red,
        ((green - blue) / safe) % 6,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    return hue, torch.where(value > 0, span / value.clamp(min=1e-12), 0.0), value


def _from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    parts = [(hue + offset) % 6 for offset in (5, 3, 1)]  # red, green, blue
    found = [value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1) for k in parts]
    return torch.stack(found, 1)


def _brightness(x: Tensor, draws: Draws, more: float) -> Tensor:
    hue, saturation, value = _to_hsv(x)
    return _from_hsv(hue, saturation, (value + more).clamp(0, 1))


def _saturate(x: Tensor, draws: Draws, factor_offset: tuple[float, float]) -> Tensor:
    factor, offset = factor_offset
    hue, saturation, value = _to_hsv(x)
    return _from_hsv(hue, (saturation * factor + offset).clamp(0, 1), value)


def _contrast(x: Tensor, draws: Draws, factor: float) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _each(x: Tensor, change: Callable) -> Tensor:
    """``change`` over Pillow images."""
    from PIL import Image

    found = [
        numpy.asarray(change(Image.fromarray(image)))
        for image in (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    ]
    return torch.from_numpy(numpy.stack(found)).permute(0, 3, 1, 2).float() / 255


def _jpeg(x: Tensor, draws: Draws, quality: int) -> Tensor:
    from PIL import Image

    def change(image):
        encoded = io.BytesIO()
        image.save(encoded, "JPEG", quality=quality)
        return Image.open(encoded)

    return _each(x, change)


def _pixelate(x: Tensor, draws: Draws, share: float) -> Tensor:
    from PIL import Image

    small = (int(SIDE * share),) * 2
    return _each(x, lambda image: image.resize(small, Image.BOX).resize((SIDE, SIDE), Image.BOX))


def _elastic(x: Tensor, draws: Draws, parameters: tuple[float, float, float]) -> Tensor:
    """An affine map that moves three points of the middle at random, then a smooth field of displacements."""
    alpha, sigma, affine = (SIDE * value for value in parameters)
    middle, reach = SIDE // 2, SIDE // 3
    points = torch.tensor(
        [[middle + reach, middle + reach], [middle + reach, middle - reach], [middle - reach, middle - reach]]
    ).float()
    moved = points + affine * (2 * _uniform(draws, 3, 2) - 1)
    # of the output's points to the input's, as (x, y, 1) @ solution
    ones = torch.ones(len(x), 3, 1)
    solution = torch.linalg.solve(torch.cat([moved, ones], 2), points.expand_as(moved))
    steps = torch.arange(SIDE, dtype=torch.float32)
    grid = torch.stack([*torch.meshgrid(steps, steps, indexing="xy"), torch.ones(SIDE, SIDE)], -1)
    places = (grid.reshape(1, -1, 3) @ solution).view(len(x), SIDE, SIDE, 2)
    x = _sampled(x, places)
    field = (
        _gaussian(2 * _uniform(draws, 2, SIDE, SIDE) - 1, sigma, truncate=3.0, pad="reflect") if alpha else 0
    )
    return x if not alpha else _sampled(x, grid[:, :, :2] + alpha * field.permute(0, 2, 3, 1))


def _sampled(x: Tensor, places: Tensor) -> Tensor:
    """``x`` at ``places``, (column, row) in pixels, bilinear; mirrored beyond the edge."""
    grid = places * (2 / (SIDE - 1)) - 1
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=True)


MAIN: dict[str, tuple[Callable, tuple]] = {
    "gaussian_noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (_shot_noise, (500.0, 250.0, 100.0, 75.0, 50.0)),
    "impulse_noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (_glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (_zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (_frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        _elastic,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (_jpeg, (80, 65, 58, 50, 40)),
}
"""The 15 that a mean corruption error is over."""

EXTRA: dict[str, tuple[Callable, tuple]] = {
    "speckle_noise": (_speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (_gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": (
        _spatter,
        (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
    ),
    "saturate": (_saturate, ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2))),
}

CORRUPTIONS = MAIN | EXTRA
"""Name -> (function, its parameters at the five severities), in the order in which a table has them."""
