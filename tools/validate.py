"""Evaluate a run, or a file of weights, again; or under shift.

    python tools/validate.py RUN                                           as the run evaluated itself
    python tools/validate.py RUN eval.stats=batch hardware.device=cpu      with other settings
    python tools/validate.py RUN dist.stats=rank0                          as if its processes' statistics were joined so
    python tools/validate.py RUN/best.ckpt                                 other weights of a run
    python tools/validate.py WEIGHTS arch=resnet50 norm=bn data.root=...   any weights: arguments of train.py
    python tools/validate.py RUN --batch-sizes 8,32,100 --orders shuffled,classes    how batch statistics depend on the batch
    python tools/validate.py RUN --shift imagenet_r=/data/imagenet-r --shift imagenet_c=/data/imagenet-c
    python tools/validate.py RUN --shift real                              ReaL labels of timm's; or real=FILE

Shifts: imagenet_v2, imagenet_a, imagenet_r, imagenet_sketch and imagenet_c, from folders as they are
published; their classes are timm's. Of -A and -R only the logits of their 200 classes count. ImageNet-C gives
the mean over corruptions and severities, a line for each corruption, and, where all 15 are there, mCE
(relative to AlexNet's errors). The run's own data are needed for ReaL labels only.

With eval.stats=batch images come in whole batches, in an order drawn from eval.seed, or class by class with
eval.order=classes. Where a network's answer for an image depends on the others in its batch, that is said.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anorm.config.frozen import Config
    from anorm.engine.evaluate import Result
    from anorm.tasks import Task


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("target", type=Path, metavar="RUN", help="a run folder, or a file of weights")
    found.add_argument("arguments", nargs="*", metavar="key=value", help="arguments of train.py")
    found.add_argument(
        "--shift", action="append", default=[], metavar="NAME=FOLDER", help="evaluate on that instead (see above)"
    )
    found.add_argument(
        "--batch-sizes",
        metavar="N,N",
        help="evaluate the first set with the statistics of batches of these sizes",
    )
    found.add_argument(
        "--orders", metavar="ORDERS", help="in these orders: shuffled, classes (default: shuffled)"
    )
    return found


def main(argv: list[str]) -> int:
    """Print every metric of each evaluation; the exit status."""
    asked = parser().parse_intermixed_args(argv)

    from anorm.processes.errors import user_errors

    with user_errors() as outcome:
        from anorm.build import evaluator
        from anorm.engine.evaluate import DEPENDS, dependence_warning
        from anorm.engine.record import final_metrics

        if not asked.target.exists():
            raise ValueError(f"there is no {asked.target}: give a run folder, or a file of weights")
        weights, config = what(asked.target, asked.arguments)
        join = config.settings.dist.stats if any(w.startswith("dist.stats=") for w in asked.arguments) else None
        if asked.shift:
            under_shift(asked.target, weights, config, asked.shift, join)
            return 0
        if asked.batch_sizes or asked.orders:
            sensitivity(weights, config, asked.batch_sizes, asked.orders or "shuffled", join)
            return 0
        evaluate = evaluator(config, weights, join)
        unfinished = asked.target.is_dir() and not final_metrics(asked.target)
        for pair, found in evaluate().items():
            words = [f"{found.images} images" + (f" of {pair.set}" if len(evaluate.sets) > 1 else "")]
            words += [
                f"{pair.stats} statistics" + (f" of {found.batches}" if found.batches else ""),
                *asked.arguments,
            ]
            words += ["of a run that is not finished"] * unfinished
            first = [name for name in found.values if name in (*evaluate.task.shown, "loss")]
            others = [name for name in found.values if name not in first]
            print(f"{weights}: {precisely(evaluate.task, found, first)} ({', '.join(words)})")
            if others:
                print(f"  {precisely(evaluate.task, found, others)}")
        for source, value in (depends := evaluate.dependence()).items():
            print(
                f"{source} statistics: answers change with the others in the batch by up to {value:.2g} of the spread of "
                "the outputs"
                if value >= DEPENDS
                else f"{source} statistics: answers do not depend on the others in the batch"
            )
        if warning := dependence_warning(depends):
            print(f"warning: {warning}", file=sys.stderr)
    return outcome.status


def sensitivity(weights: Path, config: Config, sizes: str | None, orders: str, join: str | None) -> None:
    """Print the task's best metric on the first set under batch statistics, for each size and order of batches."""
    from anorm.build import evaluator
    from anorm.config.settings import Eval
    from anorm.data.loaders import Batches

    wanted = [word for word in orders.split(",") if word]
    for order in wanted:
        Eval(order=order)  # raises for an unknown one
    config = config.having(eval={"stats": "batch"})
    evaluate = evaluator(config, weights, join)
    numbers = sizes.split(",") if sizes else [str(evaluate.batches.size)]
    if not all(number.isdigit() and int(number) > 0 for number in numbers):
        raise ValueError(f"--batch-sizes {sizes} must be whole numbers above 0, such as 8,32,100")
    metric = evaluate.task.metrics[evaluate.task.best]
    plain = dataclasses.replace(evaluate, settings=dataclasses.replace(evaluate.settings, stats="running"))
    (pair, found), *_ = plain(first_alone=True).items()
    print(f"{weights}: {metric.heading} of {found.images} images of {pair.set}")
    print(
        f"running statistics{f' ({found.batches})' if found.batches else ''}: {metric.text(found[evaluate.task.best])}"
    )
    for number in numbers:
        for order in wanted:
            batches = Batches(int(number), order, config.settings.eval.seed)
            (found,) = evaluate(first_alone=True, batches=batches).values()
            print(f"batch statistics ({batches}): {metric.text(found[evaluate.task.best])}", flush=True)


def precisely(task: Task, found: Result, names: list[str]) -> str:
    """Return metrics with two digits more than tables show: what a repeated evaluation must give again."""
    words = []
    for name in names:
        metric = task.metrics[name]
        unit = f" {metric.unit}" if metric.unit else ""
        words.append(f"{metric.heading} {found[name]:.{metric.digits + 2}f}{unit}")
    return " ".join(words)


def under_shift(target: Path, weights: Path, config: Config, words: list[str], join: str | None) -> None:
    """Print a report for each shift that is asked for."""
    from anorm.build import evaluator_for
    from anorm.engine.runfolder import CARD
    from anorm.study import shift

    wanted = shift.asked(words)
    card = (target if target.is_dir() else target.parent) / CARD
    if card.is_file():
        shift.check_classes(json.loads(card.read_text())["classes"])
    on = evaluator_for(config, shift.synsets(), weights, join=join)
    print(weights, flush=True)
    for name, place in wanted:
        print(shift.report(name, place, config, on), flush=True)


def what(target: Path, overrides: list[str]) -> tuple[Path, Config]:
    """Return (file of weights, configuration decided for one process here) for a run folder, a file in one, or any file
    with train.py's arguments.
    """
    from anorm.config.frozen import Config
    from anorm.engine.runfolder import CONFIG, configuration_in, last_weights
    from anorm.study.printed import CONFIGS

    folder = target if target.is_dir() else target.parent
    if target.is_dir() or (folder / CONFIG).is_file():
        config = configuration_in(folder).having(hardware={"processes": 1}).change(overrides)
        return last_weights(folder) if target.is_dir() else target, config.on()
    return target, Config.compose(CONFIGS, overrides).on()



if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
