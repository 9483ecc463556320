"""Evaluate a run, or a file of weights, again.

python tools/validate.py RUN                                         the run's last weights, as the run
evaluated them python tools/validate.py RUN eval.stats=batch hardware.device=cpu    with other settings python
tools/validate.py RUN/best.ckpt                               other weights of a run python tools/validate.py
WEIGHTS arch=resnet50 norm=bn data.root=... any weights: arguments as of train.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from anorm.engine.commandline import user_errors  # noqa: E402


def main(argv: list[str]) -> int:
    """Print top-1, top-5 (percent) and loss per image; the exit status."""
    with user_errors() as outcome:
        if not argv or argv[0] in ("-h", "--help"):
            print(__doc__.strip())
            return 0 if argv else 2
        from anorm.build import evaluator, resolve

        weights, config = what(Path(argv[0]), argv[1:])
        found = evaluator(resolve(config), weights)()
        print(
            f"{weights}: top-1 {found.top1:.4f} % top-5 {found.top5:.4f} % loss {found.loss:.6f} "
            f"({found.images} images, {config['eval']['stats']} statistics)"
        )
    return outcome.status


def what(target: Path, overrides: list[str]) -> tuple[Path, dict]:
    """(file of weights, complete configuration) for a run folder, a file in one, or any file with train.py's
    arguments.
    """
    from anorm.build import accepted, complete, last_weights
    from anorm.engine.compose import change, compose
    from anorm.engine.runfolder import CONFIG, thaw

    folder = target if target.is_dir() else target.parent
    if target.is_dir() or (folder / CONFIG).is_file():
        config, _ = thaw(folder)
        config["hardware"]["processes"] = 1
        return last_weights(folder) if target.is_dir() else target, complete(
            change(config, overrides, accepted)
        )
    return target, complete(compose(ROOT / "configs", overrides, accepted).config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
