"""Classify images with a run's last weights.

python tools/predict.py RUN IMAGE...        the five likeliest classes of each image; the data set is not needed
"""

from __future__ import annotations

import sys
from pathlib import Path

from anorm.processes.errors import user_errors


def main(argv: list[str]) -> int:
    """Print a line a class: probability in percent and name; the exit status."""
    with user_errors() as outcome:
        if len(argv) < 2 or argv[0] in ("-h", "--help"):
            print(__doc__.strip())
            return 0 if argv[:1] in (["-h"], ["--help"]) else 2
        import torch

        from anorm.build import predictor
        from anorm.engine.runfolder import configuration_in

        folder = Path(argv[0])
        model, read, classes = predictor(folder, configuration_in(folder))
        for path in argv[1:]:
            with torch.no_grad():
                probabilities = model(read(Path(path)))[0].softmax(0)
            print(path)
            for value, index in zip(*probabilities.topk(min(5, len(classes))), strict=True):
                print(f"  {100 * value:6.2f} %  {classes[index]}")
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
