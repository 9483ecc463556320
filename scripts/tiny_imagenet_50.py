"""Fifty classes of Tiny-ImageNet-200 as class folders, for `tools/table.py tiny`: 25,000 + 2,500 photographs, 64 x 64.

    python scripts/tiny_imagenet_50.py tiny-imagenet-200 tiny50
    python tools/table.py tiny --run data.root=tiny50

tiny-imagenet-200 is the folder inside of http://cs231n.stanford.edu/tiny-imagenet-200.zip. The classes are every fourth
of its sorted class folders; the evaluation images are those of its official validation split, whose labels are in
val/val_annotations.txt. Files are copied as they are; repeating the command copies what is missing.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

EVERY = 4


def main(argv: list[str]) -> int:
    """Return 0, or 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="TINY_IMAGENET_200", help="the unpacked zip's folder")
    parser.add_argument("target", type=Path, metavar="FOLDER", help="the folder to write")
    asked = parser.parse_args(argv)
    source, target = asked.source.expanduser(), asked.target.expanduser()
    labels = source / "val" / "val_annotations.txt"
    if not labels.is_file():
        print(
            f"error: there is no {labels}: give the folder tiny-imagenet-200 of the unpacked zip",
            file=sys.stderr,
        )
        return 2
    classes = sorted(path.name for path in (source / "train").iterdir() if path.is_dir())[::EVERY]
    for name in classes:
        for image in sorted((source / "train" / name / "images").glob("*.JPEG")):
            copy(image, target / "train" / name / image.name)
    for line in labels.read_text().splitlines():
        image, name = line.split("\t")[:2]
        if name in classes:
            copy(source / "val" / "images" / image, target / "val" / name / image)
    counts = [len(list((target / split).glob("*/*"))) for split in ("train", "val")]
    print(f"{target}: {len(classes)} classes, {counts[0]:,} training and {counts[1]:,} evaluation images")
    return 0


def copy(image: Path, place: Path) -> None:
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_name(f".{place.name}.part")
        shutil.copyfile(image, part)
        part.replace(place)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
