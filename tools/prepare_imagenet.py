"""Prepare ImageNet (or any set of class folders) for training.

    python tools/prepare_imagenet.py --from TARS --to imagenet                                            class folders
    python tools/prepare_imagenet.py --from TARS --to shards --format shards --short-side 256             indexed tar shards
    python tools/prepare_imagenet.py --index shards                                                       index shards made elsewhere

TARS holds ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz as image-net.org gives them;
nothing is unpacked on the way. A folder with train/CLASS/IMAGE and val/CLASS/IMAGE does as well, or Kaggle's download. Where
the validation images lie side by side (val/IMAGE, or their tar), one of these files beside them says their classes:
  ILSVRC2012_devkit_t12.tar.gz, or unpacked: ILSVRC2012_validation_ground_truth.txt beside the devkit's meta.mat
  LOC_val_solution.csv (Kaggle)
  val_classes.txt (a class folder a line, in the order of the images' names)
Re-encoded images are 8-bit RGB, not turned by their EXIF orientation: what train.py makes of the originals.
Repeating the command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments; argparse ends the program for wrong ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from", dest="source", type=Path, help="folder with the official tar files, or with train and val"
    )
    parser.add_argument("--to", type=Path, help="folder to write")
    parser.add_argument("--index", type=Path, help="only write the indices of the shards in this folder")
    parser.add_argument("--format", choices=("folder", "shards"), default="folder")
    parser.add_argument(
        "--short-side", type=int, default=0, help="re-encode images to this short side; 0 keeps their bytes"
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality of re-encoded images")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--any", action="store_true", help="accept other counts than ImageNet's")
    parser.add_argument("--md5", action="store_true", help="check the official files first (reads 150 GB)")
    parser.add_argument(
        "--check", type=int, default=200, help="images to compare with their source at the end"
    )
    asked = parser.parse_args(argv)
    if asked.index is None and (asked.source is None or asked.to is None):
        parser.error("give --from and --to, or --index")
    for name in ("workers", "check"):
        if getattr(asked, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if asked.short_side < 0 or not 1 <= asked.quality <= 100:
        parser.error("--short-side must not be negative, and --quality lies between 1 and 100")
    return asked


def main(argv: list[str]) -> int:
    """Prepare, or index; the exit status is 2 for an error that the user can mend."""
    asked = parse(argv)

    from anorm.prepare.imagenet import Preparation, check_md5, index, prepare
    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        if asked.index is not None:
            index(asked.index)
            return 0
        if asked.md5:
            check_md5(asked.source)
        prepare(
            Preparation(
                asked.source,
                asked.to,
                asked.format,
                asked.short_side,
                asked.quality,
                asked.workers,
                asked.any,
                asked.check,
            )
        )
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
