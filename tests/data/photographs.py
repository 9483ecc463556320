"""Small image folders of random smooth pictures, made where a test wants them."""

import os

import numpy
import torch
from PIL import Image


def picture(seed, height=40, width=56):
    """A smooth colour picture, uint8 (height, width, 3): JPEG changes noise a lot, and smooth pictures little."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, 3, 5, 5), generator=rng)
    fine = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()


def write_folder(root, classes=("ant", "bee", "cat"), train=7, val=3):
    """root/train and root/val with so many JPEGs a class, of several sizes; time stamps an hour old."""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                seed = 1000 * (split == "val") + 100 * label + i
                pixels = picture(seed, 30 + seed % 37, 30 + seed % 23)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.JPEG", quality=90)
    age(root)
    return root


def age(root):
    """Sets every folder's time stamp an hour back, so that its index may be cached."""
    for folder, _, _ in os.walk(root, topdown=False):
        stamp = os.stat(folder).st_mtime - 3600
        os.utime(folder, (stamp, stamp))


def difference(a, b):
    """Largest absolute difference of two uint8 arrays or tensors, as an int."""
    return int(numpy.abs(numpy.asarray(a, dtype=numpy.int32) - numpy.asarray(b, dtype=numpy.int32)).max())
