"""Images in indexed tar shards (`anorm.data.shards`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from anorm.data.shards import ShardStore
from anorm.data.sources.base import IMAGENET_MEAN, IMAGENET_STD, EncodedImages, Source
from anorm.data.sources.folder import check_same_classes, class_names
from anorm.data.transforms import Crop
from anorm.words import printable


def imagenet_shards(
    root: str | Path | None = None,
    train: str = "train",
    val: str = "val",
    image_size: int = 224,
    eval_resize: int | None = None,
    interpolation: str = "bilinear",
    crop_scale: Sequence[float] = (0.08, 1.0),
    crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    on_error: str = "error",
    loader: str = "torch",
) -> Source:
    """ROOT/train-*.tar and ROOT/val-*.tar with their indices, as tools/prepare_imagenet.py writes them; any classes.

    Options as of `imagefolder`. Raises ValueError for a missing or outdated index, or classes that differ.
    """
    if root is None or not Path(root).expanduser().is_dir():
        raise ValueError(
            f"data.root={root and printable(root)} is not a folder: set it (or $IMAGENET_SHARDS) to the one with train-*.tar and "
            "val-*.tar; tools/prepare_imagenet.py --format shards makes them"
        )
    folder = Path(root).expanduser()
    crop = Crop(image_size, eval_resize, interpolation, tuple(crop_scale), tuple(crop_ratio), flip)
    stores = [ShardStore(folder, split) for split in (train, val)]
    check_same_classes(stores[0].classes, stores[1].classes, (f"{folder}/{train}", f"{folder}/{val}"))
    identity = hashlib.blake2b(
        "".join(store.digest() for store in stores).encode(), digest_size=16
    ).hexdigest()
    train_images, val_images = (EncodedImages(store, crop, on_error, loader, mean, std) for store in stores)
    return Source(
        train_images,
        {"val": val_images},
        class_names(folder, stores[0].classes),
        f"shards-{identity}",
    )


SOURCES = {"imagenet_shards": imagenet_shards}
