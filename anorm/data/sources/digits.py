"""1,797 real handwritten digits that come with scikit-learn: a full training run in a minute, without a download."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from anorm.data.random import stream
from anorm.data.sources.base import FetchedImages, LabelledImages, Source

SPLIT_SEED = 0


class ShiftedImages(LabelledImages):
    """Small greyscale images (N,S,S) held in memory, given as three equal channels, shifted by up to max_shift pixels."""

    in_memory = True

    def __init__(self, images: Tensor, labels: Tensor, max_shift: int, mean: float, std: float):
        self.labels, self.image_size, self.max_shift = labels, images.shape[1], max_shift
        content = images.numpy().tobytes() + labels.numpy().tobytes()
        self.identity = hashlib.blake2b(content, digest_size=16).hexdigest()
        self.mean, self.std = (mean,) * 3, (std,) * 3
        self._padded = torch.nn.functional.pad(images, (max_shift,) * 4)

    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> FetchedImages:
        index, shift = torch.as_tensor(indices, dtype=torch.int64), self.max_shift
        if rngs is None:
            offsets = torch.full((len(index), 2), shift)
        else:
            offsets = torch.stack([torch.randint(2 * shift + 1, (2,), generator=rng) for rng in rngs])
        steps = torch.arange(self.image_size)
        rows, columns = offsets[:, :1] + steps, offsets[:, 1:] + steps
        images = self._padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return FetchedImages(images[:, None].expand(-1, 3, -1, -1), self.labels[index], index, [])


def digits(image_size: int = 32, max_shift: int = 3, val_share: float = 0.2) -> Source:
    """The 8x8 digits of the UCI "Optical recognition of handwritten digits" test set (Alpaydin & Kaynak 1998).

    Up-sampled (bilinear) to image_size, values 0..16 mapped to 0..255. The split is stratified and fixed: val_share of
    each class, drawn once by a seed of its own, whatever the run's seed. Raises ValueError for impossible options.
    """
    if image_size < 8:
        raise ValueError(f"data.image_size={image_size} is below the 8 pixels of the digits: give at least 8")
    if not 0 <= max_shift < image_size:
        raise ValueError(f"data.max_shift={max_shift} must lie between 0 and data.image_size={image_size}")
    if not 0 < val_share < 1:
        raise ValueError(f"data.val_share={val_share} must lie between 0 and 1")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("data=digits needs scikit-learn: pip install scikit-learn") from error

    small, labels = load_digits(return_X_y=True)
    small, labels = torch.from_numpy(small).float().reshape(-1, 1, 8, 8), torch.from_numpy(labels).long()
    images = torch.nn.functional.interpolate(
        small * (255 / 16), size=image_size, mode="bilinear", align_corners=False
    )
    images = images.squeeze(1).round().to(torch.uint8)

    is_val = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        members = torch.nonzero(labels == digit).flatten()
        shuffled = members[torch.randperm(len(members), generator=stream(SPLIT_SEED, "digits split", digit))]
        is_val[shuffled[: max(1, round(val_share * len(members)))]] = True
    mean, std = images[~is_val].double().mean().item() / 255, images[~is_val].double().std().item() / 255
    train = ShiftedImages(images[~is_val], labels[~is_val], max_shift, mean, std)
    val = ShiftedImages(images[is_val], labels[is_val], max_shift, mean, std)
    digest = hashlib.blake2b(images.numpy().tobytes() + is_val.numpy().tobytes(), digest_size=16).hexdigest()
    return Source(train, {"val": val}, [str(digit) for digit in range(10)], f"digits-{digest}")


SOURCES = {"digits": digits}
