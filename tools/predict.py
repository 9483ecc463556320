"""What a run's last weights see in images; the data set is not needed.

    python tools/predict.py RUN photo.jpg                      a classifier: the five likeliest classes, in percent
    python tools/predict.py RUN *.jpg --top 1                  the likeliest alone, of each image
    python tools/predict.py RUN *.jpg --least 0.3              a detector: class, score and box of every object
    python tools/predict.py RUN photo.jpg --draw out.png       and a picture of them
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    found.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="files that Pillow reads")
    found.add_argument("--top", type=int, default=5, metavar="N", help="a classifier's classes shown (5)")
    found.add_argument("--draw", type=Path, metavar="FILE", help="a detector's picture of the one image")
    found.add_argument("--least", type=float, default=0.5, help="a detector's least score of an object (0.5)")
    return found


def main(argv: list[str]) -> int:
    """Print what is seen in each image; the exit status."""
    asked = parser().parse_intermixed_args(argv)

    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        from anorm.engine.runfolder import configuration_in

        if asked.top < 1:
            raise ValueError(f"--top {asked.top} must be at least 1")
        if asked.draw and len(asked.images) > 1:
            raise ValueError("--draw is for one image")
        if configuration_in(asked.run).task.name == "classification":
            if asked.draw:
                raise ValueError(f"{asked.run} is a classifier's: it has nothing to draw")
            classify(asked.run, asked.images, asked.top)
        else:
            detect(asked.run, asked.images, asked.least, asked.draw)
    return outcome.status


def classify(run: Path, images: list[Path], top: int) -> None:
    """Print a line a class: probability in percent and name."""
    from anorm.deploy.predict import likeliest, predictor

    found = predictor(run)
    for path in images:
        print(path)
        for value, name in likeliest(found, path, top):
            print(f"  {100 * value:6.2f} %  {name}")


def detect(run: Path, images: list[Path], least: float, picture: Path | None) -> None:
    """Print a line an object: score in percent, class, box as x1 y1 x2 y2 in pixels."""
    import torch

    from anorm.deploy.predict import detecting
    from anorm.detection.draw import draw

    model, read, classes = detecting(run)
    for path in images:
        image, inputs = read(path)
        with torch.no_grad():
            [found] = model(*inputs)
        print(path)
        for i in found["scores"].argsort(descending=True).tolist():
            if found["scores"][i] >= least:
                box = " ".join(f"{side:.1f}" for side in found["boxes"][i].tolist())
                print(f"  {100 * found['scores'][i]:6.2f} %  {classes[int(found['labels'][i]) - 1]}  {box}")
        if picture:
            draw(image, found, classes, least).save(picture)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
