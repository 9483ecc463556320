"""Configuration -> objects: data, task, network, a run, what evaluates it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from anorm import ops, tasks
from anorm.config.frozen import Config
from anorm.config.settings import Settings
from anorm.data import sources
from anorm.data.loaders import EvalLoader, TrainLoader
from anorm.data.random import seed_of
from anorm.data.sources.base import Batch, Dataset, Source
from anorm.engine import optim
from anorm.engine.device import (
    autocast_of,
    compiled,
    distributed,
    doubles_inputs,
    fix_bucket_order,
    on_device,
    place,
    set_backends,
)
from anorm.engine.ema import Ema
from anorm.engine.evaluate import Evaluator
from anorm.engine.meter import Meter
from anorm.engine.record import Record, environment
from anorm.engine.run import Progress, Run
from anorm.engine.runfolder import write_data_card
from anorm.engine.schedule import create_schedule
from anorm.engine.state import restore
from anorm.engine.statistics import join_again
from anorm.norms.base import Norm
from anorm.processes.world import World
from anorm.tasks import Task
from anorm.weights import distance_from_bn, load_weights


def create_source(config: Config) -> Source:
    """Return the data set. Raises ValueError, in words, when its files are missing or wrong, or the task takes others."""
    # how images are read may depend on the task (the geometry's resize): its keys are a source's where both have them
    data = config.data
    accepted = inspect.signature(sources.find(data.name)).parameters
    shared = {k: v for k, v in config.task.options.items() if k in accepted and data.options.get(k) is None}
    found, takes = sources.create(data.name, **data.options | shared), tasks.find(config.task.name).takes
    for images in found.evals.values():
        if not isinstance(images, takes):
            raise ValueError(
                f"task={config.task.name} takes {takes.holds}, and data={data.name} has {images.holds}: choose another "
                "task or data"
            )
    return found


def create_task(config: Config, classes: list[str], channels: int = 3) -> Task:
    """Return what is learned on images of these classes. Raises ValueError for an unknown task or key."""
    return tasks.find(config.task.name)(classes, channels, config.settings.mix, **config.task.options)


def create_network(config: Config, task: Task) -> nn.Module:
    """Return the network, initialised from the seed: equal across norms but for the norms' own parameters."""
    arch, seed = config.arch, config.settings.seed
    torch.manual_seed(seed_of(seed, "init of norms"))
    model = task.create(arch.name, config.norm.tree(), **arch.options)
    torch.manual_seed(seed_of(seed, "init"))
    plain = task.create(arch.name, "bn", **arch.options)
    of_norms = {id(p) for module in plain.modules() if isinstance(module, Norm) for p in module.parameters()}
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            if id(parameter) not in of_norms:
                model.get_parameter(key).copy_(parameter)
    return model


def outline(config: Config, source: Source) -> str:
    """Return in words the parameters and multiply-adds of the network on the meta device: no memory is taken."""
    from torch.utils.flop_counter import FlopCounterMode  # which imports Triton

    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            task = create_task(config, source.classes, len(source.mean))
            model = create_network(config, task).eval()
            with torch.device("cpu"):
                inputs = task.inputs(task.example(1, source))
            model(*tree_map(lambda v: v.to("meta") if torch.is_tensor(v) else v, inputs))
    except (NotImplementedError, RuntimeError) as error:  # a layer of others may want values
        return f"not on the meta device: {str(error).splitlines()[0]}"
    parameters = sum(p.numel() for p in model.parameters())
    return f"parameters {parameters:,}; multiply-adds of an image {counter.get_total_flops() / 2e9:.3f} G"


def build(config: Config, folder: Path, signature: str, world: World, resume: dict | None) -> Run:
    """Return all parts of a run for one process. ``config``: decided for this machine; ``resume``: a checkpoint's state, or
    None.
    """
    settings = config.settings
    hardware, device = settings.hardware, world.device
    set_backends(hardware, resume)
    source = create_source(config)
    task = create_task(config, source.classes, len(source.mean))
    loading = _loading(settings, world)
    train = TrainLoader(source, settings.seed, settings.optim.global_batch, settings.batch_size, **loading)

    model = create_network(config, task)
    notes = [f"norms: {model.norm_summary}"] if getattr(model, "norm_summary", None) else []
    if settings.weights and not resume:
        loaded = load_weights(model, config.starting_weights, head="replace")
        notes.append(f"weights: {loaded}")
        if loaded.carried:
            notes.append(_moved_from_bn(model, task, source))
    notes += optim.freeze(model, settings.freeze)
    place(model, hardware, device)
    groups = optim.parameter_groups(
        model, settings.optim.weight_decay, settings.optim.decay_norm, settings.optim.layer_decay
    )
    notes += optim.describe_groups(groups)
    scale = 2.0**16 if hardware.loss_scale == "dynamic" else float(hardware.loss_scale)
    plain = task.network(model)
    if plain is not model and hardware.dtype == "fp64":
        doubles_inputs(plain)  # which may call the model's parts and not the model
    run = Run(
        settings=settings,
        folder=folder,
        signature=signature,
        arch=config.arch.name,
        world=world,
        task=task,
        model=model,
        plain=plain,
        network=plain,
        evaluated=model,
        train=train,
        optimizer=optim.create_optimizer(groups, settings.optim),
        schedule=create_schedule(
            settings.schedule, settings.optim.peak_lr, settings.epochs, train.steps_per_epoch
        ),
        scaler=torch.amp.GradScaler(device.type, init_scale=scale, enabled=hardware.dtype == "fp16"),
        autocast=autocast_of(hardware, device),
        evaluator=_evaluator(settings, task, model, train, source.evals, world),
        ema=Ema(model, settings.ema.decay) if settings.ema.decay else None,
        record=Record(folder, active=False),
        progress=Progress(),
        sums=Meter.nothing(task.losses, device),
    )
    _compile_and_distribute(run, source)
    if resume:  # after DDP, which starts every process with rank 0's statistics: each continues with its own
        notes += restore(run, resume)
    if world.main:
        write_data_card(folder, task.card(source))
    _open_record(run, source, notes, resume)
    return run


def _moved_from_bn(model: nn.Module, task: Task, source: Source) -> str:
    """Say in words how far norms that took over batch norms moved the network, on the first images that it is judged on."""
    loader = EvalLoader(source.val, 32)
    batch = next(iter(loader))
    loader.close()
    moved, same = distance_from_bn(model, *task.inputs(batch))
    return (
        f"against the file's batch norms the logits of {len(batch.indices)} images moved by {moved:.1%} of their standard "
        f"deviation; {same:.0%} of the images keep their first class (norm=afn_identity starts at 0)"
    )


def _loading(settings: Settings, world: World) -> dict[str, Any]:
    """Return what the loaders of all data sets are told."""
    return {
        "rank": world.rank,
        "world": world.size,
        "workers": settings.hardware.workers,
        "device": world.device,
        "channels_last": settings.hardware.channels_last,
    }


def _evaluator(
    settings: Settings,
    task: Task,
    model: nn.Module,
    train: TrainLoader | None,
    sets: dict[str, Dataset],
    world: World,
) -> Evaluator:
    batch = settings.eval.batch_size or settings.batch_size
    loaders = {name: EvalLoader(images, batch, **_loading(settings, world)) for name, images in sets.items()}
    autocast = autocast_of(settings.hardware, world.device)
    return Evaluator(task, model, train, loaders, world, autocast, settings.eval, settings.epochs)


def _compile_and_distribute(run: Run, source: Source) -> None:
    """Put compilation and DDP around what training calls, and compilation around what evaluation calls."""
    hardware, device = run.settings.hardware, run.world.device
    batch = run.task.example(run.settings.batch_size, source)
    if hardware.compile:
        run.evaluated = compiled(run.model, run.task.inputs(batch), device, run.autocast, hardware)
        run.network = run.evaluated if run.plain is run.model else torch.compile(run.plain)
    if run.world.size > 1:
        run.network = distributed(run.network, device)
        fix_bucket_order(run.network, lambda: _backward_of_example(run, on_device(batch, device, hardware)))


def _backward_of_example(run: Run, batch: Batch) -> None:
    inputs, target = run.task.prepare(batch, torch.Generator().manual_seed(0))
    with run.autocast():
        outputs = run.network(*inputs)
    reduce(torch.add, run.task.loss(outputs, target).values()).backward()


def _open_record(run: Run, source: Source, notes: list[str], resume: dict | None) -> None:
    """Open the log, and write and say what starts."""
    backend, kernels = _backend(run.world.device.type), {"cpu": "cpu", "cuda": "triton"}.get(run.world.device.type)
    if backend == "reference" and kernels:
        reason = ops.why_not(kernels) or "it was chosen"
        notes.append(f"norms by plain PyTorch (reference), several times slower than the kernels: {reason}")
    run.record = Record(
        run.folder,
        run.world.main,
        run.settings.log.tensorboard,
        offset=resume["log_offset"] if resume else 0,
        step=run.progress.step,
        total_steps=run.total_steps,
    )
    run.record.write(
        "start",
        step=run.progress.step,
        signature=run.signature,
        parameters=sum(p.numel() for p in run.model.parameters()),
        processes=run.world.size,
        notes=notes,
        backend=_backend(run.world.device.type),
        environment=environment(),
    )
    for note in notes:
        run.record.say(note)
    run.record.say(_describe(run, source))


def _backend(device: str) -> str:
    """Return the name of what runs the norms on a device: cpu, triton or reference."""
    return ops.resolve(device).__name__.split(".")[-1]


def evaluator(config: Config, weights: Path | None = None, join: str | None = None) -> Evaluator:
    """Return what evaluates the network of a configuration decided for this machine, in this process, on every evaluation
    set of its data; its weights are in ``weights``.

    join: "mean" or "rank0", for a checkpoint of a run of several processes: join their statistics in that way again.
    """
    source = create_source(config)
    return evaluator_for(config, source.classes, weights, source, join)(source.evals)


def evaluator_for(
    config: Config,
    classes: list[str],
    weights: Path | None = None,
    source: Source | None = None,
    join: str | None = None,
) -> Callable[[dict[str, Dataset]], Evaluator]:
    """Build the network once; return a function from data sets by name to an Evaluator.

    source: the configuration's own data; looked for only where statistics are recalibrated on its training images.
    """
    settings = config.settings
    if "recalibrated" in settings.eval.all_stats and source is None:
        source = create_source(config)
    world = World().on(settings.hardware.device)
    task = create_task(config, classes, len(source.mean) if source else 3)
    model = create_network(config, task)
    if weights:
        load_weights(model, weights)
    if join:
        join_again(model, weights, join)
    optim.freeze(model, settings.freeze)  # held statistics are those of evaluation too, whatever eval.stats says
    place(model, settings.hardware, world.device)
    set_backends(settings.hardware, None)
    train = None
    if "recalibrated" in settings.eval.all_stats:  # nothing else needs training images
        train = TrainLoader(
            source, settings.seed, settings.optim.global_batch, settings.batch_size, **_loading(settings, world)
        )
    return lambda sets: _evaluator(settings, task, model, train, sets, world)


def _describe(run: Run, source: Source) -> str:
    settings, world = run.settings, run.world
    micro = settings.optim.global_batch // settings.batch_size // world.size
    return (
        f"{run.arch}: {sum(p.numel() for p in run.model.parameters()):,} parameters; {len(source.train):,} "
        f"training and {len(source.val):,} evaluation images of {source.num_classes} classes; "
        f"{settings.epochs} epochs of {run.train.steps_per_epoch} steps; global batch "
        f"{settings.optim.global_batch} = {settings.batch_size} x {micro} accumulated x {world.size} "
        f"process{'es' if world.size > 1 else ''}; peak rate {settings.optim.peak_lr:g}; "
        f"{settings.hardware.dtype} on {world.device.type}, norms by {_backend(world.device.type)}"
        + (f"; continuing at step {run.progress.step} of {run.total_steps}" if run.progress.step else "")
    )
