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

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from anorm.config.commandline import Arguments, help_text, parse
from anorm.config.compose import sweep
from anorm.processes.display import lasting_output
from anorm.processes.errors import user_errors

if TYPE_CHECKING:
    from anorm.config.frozen import Config
    from anorm.engine.runfolder import Job
    from anorm.processes.world import World

SCRIPT = Path(__file__).resolve()
CONFIGS = SCRIPT.parent / "configs"


def main(argv: list[str]) -> int:
    """compose -> sign -> launch -> fit. Returns 0, 2 for a user's mistake, 128 + n after signal n, else 1."""
    with lasting_output(), user_errors() as outcome:
        arguments = parse(argv)
        if arguments.help:
            print(help_text(SCRIPT, CONFIGS))
        elif arguments.submit:
            from anorm.processes.slurm import submit_all, wishes_from

            runs = sweep(CONFIGS, arguments.overrides) if arguments.multirun else [arguments.overrides]
            jobs = [Arguments(overrides, frozen=arguments.frozen) for overrides in runs]
            wishes = wishes_from(arguments.slurm)
            return submit_all(jobs, SCRIPT, lambda job: composed(job).meant_for(wishes.machine), Path("runs"), wishes)
        elif arguments.multirun:
            from anorm.processes.sweep import run_sweep

            return run_sweep(sweep(CONFIGS, arguments.overrides), SCRIPT, lambda job: composed(Arguments(job)))
        elif arguments.print_config:
            print(composed(arguments).text(), end="")
        else:
            return run(arguments)
    return outcome.status


def composed(arguments: Arguments) -> Config:
    """Return the configuration of the command line, or the frozen one that it names."""
    from anorm.config.frozen import Config
    from anorm.engine.runfolder import configuration_in

    if arguments.frozen:
        return configuration_in(arguments.frozen)
    return Config.compose(CONFIGS, arguments.overrides)


def run(arguments: Arguments) -> int:
    """Plan one run here, and train it by one process a device or by those that torchrun or srun started."""
    from anorm.processes.launch import joined_by_others, launch
    from anorm.processes.world import exit_on_failure

    with joined_by_others() as world:
        if world is None:
            job = plan(composed(arguments))
            return launch(train, job.config.settings.hardware.processes, job) if job else 0
        job = world.from_rank_0(lambda: plan(composed(arguments), world.size))
        return exit_on_failure(lambda: train(job, world)) if job else 0


def plan(config: Config, started: int | None = None) -> Job | None:
    """Decide all that is decided before training: devices, batches, signature, folder. None: it is finished.

    started: the number of processes that another launcher started.
    """
    from anorm.build import create_source, outline
    from anorm.engine.runfolder import Job, folder_for, standing, with_weights

    if int(os.environ.get("SLURM_RESTART_COUNT", 0)):
        config = config.having(resume="auto")  # resume=never was for the job's first start
    config = with_weights(config.on(started=started))
    source = create_source(config)
    len(source.train)  # raises here, once, where there are no training images
    signature = config.signed(source.identity)
    folder = folder_for(config, signature)
    for deviation in config.recipe:
        print(f"recipe of {deviation}")
    settings = config.settings
    finished = None if settings.dry else standing(folder, signature, config)
    if finished and settings.resume == "auto":
        print(f"{folder} is finished: {outcome_of(finished, config)} (resume=never trains it again)")
        return None
    if finished:
        print(f"resume=never: what is finished in {folder}, {outcome_of(finished, config)}, is deleted")
    if settings.dry:
        print(outline(config, source))
    print(f"run folder: {folder}", flush=True)
    return Job(dataclasses.replace(config, recipe=()), signature, folder)


def outcome_of(finished: dict, config: Config) -> str:
    """Return the metrics of a final event in words."""
    from anorm import tasks

    task = tasks.find(config.task.name)
    best = task.metrics[task.best].text(finished[f"best_{task.best}"])
    return f"{task.words(finished)}, best {best}"


def train(job: Job, world: World | None = None, words: Path | None = None) -> int:
    """Do the work of one process: take the folder, build, continue from its checkpoint, fit."""
    from anorm.build import build
    from anorm.engine.fit import fit
    from anorm.engine.rehearse import rehearse
    from anorm.engine.runfolder import occupied, rehearsal
    from anorm.processes.world import enter

    settings = job.config.settings
    with lasting_output(), user_errors(words) as outcome, enter(world, settings.hardware.device) as world:
        with (rehearsal if settings.dry else occupied)(job, world) as (place, checkpoint):
            run = build(job.config, place, job.signature, world, checkpoint)
            try:
                rehearse(run, job.folder) if settings.dry else fit(run)
            finally:
                run.close()
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
