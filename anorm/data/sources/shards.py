"""Images in indexed tar shards (`anorm.data.shards`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from anorm.data.shards import ShardStore, index_file, splits_of
from anorm.data.sources.base import IMAGENET_MEAN, IMAGENET_STD, Absent, EncodedImages, Source
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
    crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: bool = True,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    on_error: str = "error",
    loader: str = "torch",
) -> Source:
    """ROOT/train-*.tar and ROOT/val-*.tar with their indices, as tools/prepare_imagenet.py writes them; any classes.

    Options as of `imagefolder`. Without training shards the source can be evaluated on and not trained on.
    Raises ValueError for a missing or outdated index, or classes that differ.
    """
    if root is None or not Path(root).expanduser().is_dir():
        raise ValueError(
            f"data.root={root and printable(root)} is not a folder: set it (or $IMAGENET_SHARDS) to the one with "
            "train-*.tar and val-*.tar; tools/prepare_imagenet.py --format shards makes them"
        )
    folder = Path(root).expanduser()
    crop = Crop(image_size, eval_resize, interpolation, tuple(crop_scale), tuple(crop_ratio), flip)

    def images(store: ShardStore) -> EncodedImages:
        return EncodedImages(store, crop, on_error, loader, mean, std)

    trains = train in splits_of(folder) or index_file(folder, train).is_file()
    train_store, val_store = ShardStore(folder, train) if trains else None, ShardStore(folder, val)
    names = class_names(folder, val_store.classes)
    if train_store is None:
        words = f"{printable(folder)} holds no shards {train}-*.tar: without training images the network can be evaluated only"
        return Source(Absent(words), {"val": images(val_store)}, names, f"val-{val_store.digest()}")
    check_same_classes(train_store.classes, val_store.classes, (f"{folder}/{train}", f"{folder}/{val}"))
    digests = train_store.digest() + val_store.digest()
    identity = hashlib.blake2b(digests.encode(), digest_size=16).hexdigest()
    return Source(images(train_store), {"val": images(val_store)}, names, f"shards-{identity}")


SOURCES = {"imagenet_shards": imagenet_shards}
