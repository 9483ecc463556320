"""Say what is in a data set in COCO's format, and what is wrong with it.

    python tools/check_coco.py ROOT                 its splits train2017 and val2017
    python tools/check_coco.py ROOT val2017 --images    one split, every image decoded too
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("root", type=Path, metavar="ROOT", help="holds annotations/ and the folders of images")
    found.add_argument("splits", nargs="*", metavar="SPLIT", default=["train2017", "val2017"])
    found.add_argument("--images", action="store_true", help="decode every image and compare its size")
    return found


def main(argv: list[str]) -> int:
    """Print a report for each split; 0 where nothing is wrong, 1 otherwise."""
    asked, wrong = parser().parse_args(argv), 0

    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        from anorm.data.sources.coco import place_of, read_annotations

        for split in asked.splits:
            file, folder = place_of(asked.root, split)
            found = read_annotations(file, folder)
            problems = found.problems + (damaged(found, folder) if asked.images else [])
            print(report(found, problems))
            wrong += len(problems)
    return outcome.status or int(wrong > 0)


def report(found, problems: list[str]) -> str:
    """What is in a file of annotations and what is wrong with it, in words."""
    classes: Counter[int] = Counter()
    sizes: Counter[str] = Counter()
    crowds = empty = 0
    for index in range(len(found)):
        objects = found.of(index)
        empty += not objects
        for annotation in objects:
            crowds += bool(annotation.get("iscrowd"))
            if not annotation.get("iscrowd"):
                classes[annotation["category_id"]] += 1
                area = annotation.get("area", annotation["bbox"][2] * annotation["bbox"][3])
                sizes["small" if area < 32**2 else "medium" if area < 96**2 else "large"] += 1
    names = dict(zip(found.categories, found.names, strict=True))
    lines = [
        f"{found.file}",
        f"  {len(found)} images, {empty} of them without objects",
        f"  {sum(classes.values())} objects ({', '.join(f'{sizes[s]} {s}' for s in ('small', 'medium', 'large'))}), "
        f"{crowds} crowds",
        f"  {len(names)} classes; most: {_counts(classes.most_common(3), names)}; "
        f"without objects: {', '.join(names[n] for n in names if not classes[n]) or 'none'}",
        f"  {found.small} objects under one pixel wide or high: training passes over them",
        f"  {len(problems)} things are wrong" + ("" if not problems else ":"),
    ]
    return "\n".join(lines + [f"    {problem}" for problem in problems])


def damaged(found, folder: Path) -> list[str]:
    """Images that cannot be decoded, or are of another size than the file says."""
    from anorm.data.decode import BadImage
    from anorm.data.sources.coco import decoded

    problems = []
    for entry in found.images:
        try:
            decoded(entry, folder, found.file)
        except BadImage as error:
            problems.append(str(error))
    return problems


def _counts(common: list[tuple[int, int]], names: dict[int, str]) -> str:
    return ", ".join(f"{names[number]} {count}" for number, count in common)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
