"""What a run's last weights see in images; the data set is not needed.

python tools/predict.py RUN IMAGE...                       a classifier: the five likeliest classes of each image
python tools/predict.py RUN IMAGE... --least 0.3           a detector: class, score and box of every object
python tools/predict.py RUN photo.jpg --draw out.png       and a picture of them
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from anorm.processes.errors import user_errors


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("run", type=Path, metavar="RUN")
    found.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    found.add_argument("--draw", type=Path, metavar="FILE", help="a detector's picture of the one image")
    found.add_argument("--least", type=float, default=0.5, help="least score of an object (0.5)")
    return found


def main(argv: list[str]) -> int:
    """Print what is seen in each image; the exit status."""
    with user_errors() as outcome:
        asked = parser().parse_args(argv)
        from anorm.engine.runfolder import configuration_in

        config = configuration_in(asked.run)
        if asked.draw and len(asked.images) > 1:
            raise ValueError("--draw is for one image")
        if config.task.name == "classification":
            if asked.draw:
                raise ValueError(f"{asked.run} is a classifier's: it has nothing to draw")
            classify(asked.run, config, asked.images)
        else:
            detect(asked.run, config, asked.images, asked.least, asked.draw)
    return outcome.status


def classify(run: Path, config, images: list[Path]) -> None:
    """Print a line a class: probability in percent and name."""
    import torch

    from anorm.build import predictor

    model, read, classes = predictor(run, config)
    for path in images:
        with torch.no_grad():
            probabilities = model(read(path))[0].softmax(0)
        print(path)
        for value, index in zip(*probabilities.topk(min(5, len(classes))), strict=True):
            print(f"  {100 * value:6.2f} %  {classes[index]}")


def detect(run: Path, config, images: list[Path], least: float, picture: Path | None) -> None:
    """Print a line an object: score in percent, class, box as x1 y1 x2 y2 in pixels."""
    import torch

    from anorm.build import detecting
    from anorm.detection.draw import draw

    model, read, classes = detecting(run, config)
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
