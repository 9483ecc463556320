"""Train a network with a normalization on a data set.

    python train.py norm=an arch=resnet50         ImageNet (data.root, $IMAGENET_DIR) on all GPUs here
    python train.py data=digits hardware=cpu      a whole run on real digits, without a download
    python train.py -m norm=bn,gn,an seed=0,1,2   a grid, one run after the other

The same command continues a run that was cut, and says so when the run is finished. Arguments:

    GROUP=CHOICE          a yaml of configs/GROUP
    key=value             any key, also any argument of what is built: norm.k=[5,5,10,10], arch.zero_init=true
    -m, --multirun        run every combination of comma-separated values, each in a process of its own
    --cfg job             print the composed configuration and stop
    --config FILE         run a frozen configuration, such as the config.yaml of a run folder
    --submit slurm        a job of a Slurm cluster for each run; any long option of sbatch as slurm.OPTION:
                          slurm.partition=gpu slurm.time=1-00 slurm.nodes=2 slurm.gpus_per_node=8
    -h, --help            this text
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from anorm.config.commandline import Arguments, help_text, parse
from anorm.config.compose import Composed, compose, sweep
from anorm.processes.errors import user_errors

SCRIPT = Path(__file__).resolve()
CONFIGS = SCRIPT.parent / "configs"


def main(argv: list[str]) -> int:
    """compose -> sign -> launch -> fit. Returns 0, 2 for a user's mistake, 128 + n after signal n, else 1."""
    with user_errors() as outcome:
        arguments = parse(argv)
        if arguments.help:
            print(help_text(__doc__, CONFIGS))
        elif arguments.submit:
            from anorm.processes.slurm import submit_all, wishes_from

            runs = sweep(arguments.overrides) if arguments.multirun else [arguments.overrides]
            jobs = [Arguments(overrides, frozen=arguments.frozen) for overrides in runs]
            return submit_all(jobs, SCRIPT, frozen, Path("runs"), wishes_from(arguments.slurm))
        elif arguments.multirun:
            from anorm.processes.sweep import run_sweep

            return run_sweep(sweep(arguments.overrides), SCRIPT, freeze_job)
        elif arguments.print_config:
            import yaml

            print(yaml.safe_dump(composed(arguments).config, sort_keys=False), end="")
        else:
            return run(arguments)
    return outcome.status


def composed(arguments: Arguments) -> Composed:
    """The complete configuration of the command line, or the frozen one that it names."""
    from anorm.config.complete import accepted, complete
    from anorm.engine.runfolder import thaw

    if arguments.frozen:
        config, choices = thaw(arguments.frozen)
        return Composed(complete(config), choices, [])
    found = compose(CONFIGS, arguments.overrides, accepted)
    return Composed(complete(found.config), found.choices, found.recipe)


def freeze_job(overrides: list[str], path: Path) -> None:
    """Compose a job of a sweep into a file."""
    path.write_text(frozen(Arguments(overrides)))


def frozen(arguments: Arguments, machine=None) -> str:
    """The complete configuration as text for --config, checked for the machine that it is meant for."""
    import yaml

    from anorm.config.complete import resolve_for
    from anorm.engine.runfolder import with_absolute_root

    found = composed(arguments)
    config = with_absolute_root(resolve_for(found.config, machine) if machine else found.config)
    return yaml.safe_dump({"choices": found.choices} | config, sort_keys=False)


def run(arguments: Arguments) -> int:
    """One run: planned here, trained by one process a device or by those that torchrun or srun started."""
    from anorm.processes.launch import joined_by_others, launch
    from anorm.processes.world import or_leave

    with joined_by_others() as world:
        if world is None:
            job = plan(composed(arguments))
            return launch(train, job["config"]["hardware"]["processes"], job) if job else 0
        job = world.from_rank_0(lambda: plan(composed(arguments), world))
        return or_leave(lambda: train(job, world)) if job else 0


def plan(found: Composed, world=None) -> dict | None:
    """All that is decided before training: devices, batches, signature, folder. None: it is finished."""
    from anorm.build import create_source, outline
    from anorm.config.complete import resolve
    from anorm.config.signature import signature
    from anorm.engine.runfolder import folder_for, standing

    config = resolve(found.config, world and world.size)
    if int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        config["resume"] = "auto"  # resume=never was for the job's first start
    processes = config["hardware"]["processes"]
    source = create_source(config)
    len(source.train)  # raises here, once, where there are no training images
    signed = signature(config, source.identity, processes)
    folder = folder_for(config, found.choices, signed)
    for deviation in found.recipe:
        print(f"recipe of {deviation}")
    finished = None if config["dry"] else standing(folder, signed, config)
    if finished and config["resume"] == "auto":
        print(f"{folder} is finished: {outcome_of(finished, config)} (resume=never trains it again)")
        return None
    if finished:
        print(f"resume=never: what is finished in {folder}, {outcome_of(finished, config)}, is deleted")
    if config["dry"]:
        print(outline(config, source))
    print(f"run folder: {folder}", flush=True)
    return {"config": config, "choices": found.choices, "signature": signed, "folder": str(folder)}


def outcome_of(finished: dict, config: dict) -> str:
    """Return the metrics of a final event in words."""
    from anorm import tasks

    task = tasks.find(config["task"]["name"])
    best = task.metrics[task.best].text(finished[f"best_{task.best}"])
    return f"{task.words(finished)}, best {best}"


def train(job: dict, world=None, words: Path | None = None) -> int:
    """The work of one process: take the folder, build, continue from its checkpoint, fit."""
    from anorm.build import build
    from anorm.engine.fit import fit
    from anorm.engine.rehearse import rehearse
    from anorm.engine.runfolder import occupied, rehearsal
    from anorm.processes.world import enter

    config = job["config"]
    with user_errors(words) as outcome, enter(world, config["hardware"]["device"]) as world:
        folder = Path(job["folder"])
        with (rehearsal if config["dry"] else occupied)(folder, world, job) as (place, checkpoint):
            run = build(config, place, job["signature"], world, checkpoint)
            try:
                rehearse(run, folder) if config["dry"] else fit(run)
            finally:
                run.close()
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
