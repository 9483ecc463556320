"""Complete configuration -> objects: data, network, a run, what evaluates it. With ``config`` the only file of the
package that knows the configuration's tree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from anorm.config.settings import settings_from
from anorm.data import sources
from anorm.data.decode import decode
from anorm.data.loaders import EvalLoader, TrainLoader
from anorm.data.mixing import Mixing
from anorm.data.random import seed_of
from anorm.data.sources import Dataset, Source
from anorm.data.transforms import Crop
from anorm.engine import optim
from anorm.engine.device import autocast_of, compiled, distributed, place, set_backends, settle
from anorm.engine.ema import Ema
from anorm.engine.evaluate import Evaluator
from anorm.engine.record import Record, environment
from anorm.engine.run import Progress, Run
from anorm.engine.runfolder import CARD, last_weights, write_data_card
from anorm.engine.schedule import WarmupCosine
from anorm.engine.state import restore
from anorm.engine.statistics import join_again
from anorm.norms.base import Norm
from anorm.processes.world import World
from anorm.registry import create_model
from anorm.weights import load_weights


def create_source(config: dict) -> Source:
    """The data set. Raises ValueError for what is wrong with the files."""
    options = dict(config["data"])
    return sources.create(options.pop("name"), **options)


def create_network(config: dict, num_classes: int) -> nn.Module:
    """The network, initialised from the seed: equal across norms but for the norms' own parameters."""
    arch = {key: value for key, value in config["arch"].items() if key != "name"}
    name, norm, seed = config["arch"]["name"], config["norm"], config["seed"]
    torch.manual_seed(seed_of(seed, "init of norms"))
    model = create_model(name, norm, num_classes, **arch)
    torch.manual_seed(seed_of(seed, "init"))
    plain = create_model(name, "bn", num_classes, **arch)
    of_norms = {id(p) for module in plain.modules() if isinstance(module, Norm) for p in module.parameters()}
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            if id(parameter) not in of_norms:
                model.get_parameter(key).copy_(parameter)
    return model


def outline(config: dict, source: Source) -> str:
    """Parameters and multiply-adds, in words, of the network on the meta device: before any memory is taken."""
    try:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model = create_network(config, source.num_classes).eval()
            model(torch.empty(1, 3, source.image_size, source.image_size))
    except (NotImplementedError, RuntimeError) as error:  # a layer of others may want values
        return f"not on the meta device: {str(error).splitlines()[0]}"
    parameters = sum(p.numel() for p in model.parameters())
    return f"parameters {parameters:,}; multiply-adds of an image {counter.get_total_flops() / 2e9:.3f} G"


def build(config: dict, folder: Path, signature: str, world: World, resume: dict | None) -> Run:
    """All parts of a run for one process. ``config``: complete and resolved; ``resume``: a checkpoint's
    state, or None.
    """
    settings = settings_from(config)
    hardware, device = settings.hardware, world.device
    set_backends(hardware, resume)
    source = create_source(config)
    loading = {
        "rank": world.rank,
        "world": world.size,
        "workers": hardware.workers,
        "device": device,
        "channels_last": hardware.channels_last,
    }
    train = TrainLoader(source, settings.seed, settings.optim.global_batch, settings.batch_size, **loading)
    val = EvalLoader(source.val, settings.eval.batch_size or settings.batch_size, **loading)

    model = create_network(config, source.num_classes)
    notes = [f"norms: {model.norm_summary}"] if model.norm_summary else []
    if settings.weights:
        notes.append(f"weights: {load_weights(model, settings.weights, head='replace')}")
    notes += optim.freeze(model, settings.freeze)
    place(model, hardware, device)

    groups = optim.parameter_groups(
        model, settings.optim.weight_decay, settings.optim.decay_norm, settings.optim.layer_decay
    )
    notes += optim.describe_groups(groups)
    autocast = autocast_of(hardware, device)
    scaled = hardware.dtype == "fp16"
    scale = 2.0**16 if hardware.loss_scale == "dynamic" else float(hardware.loss_scale)
    run = Run(
        settings=settings,
        folder=folder,
        signature=signature,
        arch=config["arch"]["name"],
        world=world,
        model=model,
        network=model,
        evaluated=model,
        train=train,
        mixing=Mixing(
            settings.mix.mixup, settings.mix.cutmix, settings.mix.label_smoothing, source.num_classes
        ),
        optimizer=optim.create_optimizer(groups, settings.optim),
        schedule=WarmupCosine(
            settings.optim.peak_lr,
            settings.epochs,
            train.steps_per_epoch,
            settings.schedule.warmup_epochs,
            settings.schedule.floor,
        ),
        scaler=torch.amp.GradScaler(device.type, init_scale=scale, enabled=scaled),
        autocast=autocast,
        evaluator=Evaluator(model, train, val, world, autocast, settings.eval, settings.epochs),
        ema=Ema(model, settings.ema.decay) if settings.ema.decay else None,
        record=Record(folder, active=False),
        progress=Progress(),
        sums=torch.zeros(4, dtype=torch.float64, device=device),
    )
    if hardware.compile:
        run.network = run.evaluated = compiled(
            model, settings.batch_size, source.image_size, device, autocast, hardware
        )
    if world.size > 1:
        run.network = distributed(run.network, device)
        settle(run.network, settings.batch_size, source.image_size, device, autocast, hardware)
    if resume:  # after DDP, which starts every process with rank 0's statistics: each continues with its own
        notes += restore(run, resume)
    if world.main:
        write_data_card(folder, source)
    run.record = Record(
        folder,
        world.main,
        settings.log.tensorboard,
        offset=resume["log_offset"] if resume else 0,
        step=run.progress.step,
        total_steps=run.total_steps,
    )
    run.record.write(
        "start",
        step=run.progress.step,
        signature=signature,
        parameters=sum(p.numel() for p in model.parameters()),
        processes=world.size,
        notes=notes,
        environment=environment(),
    )
    for note in notes:
        run.record.say(note)
    run.record.say(_describe(run, source))
    return run


def evaluator(config: dict, weights: Path | None = None, join: str | None = None) -> Evaluator:
    """What evaluates the network of a complete and resolved configuration, in this process; its weights are
    in ``weights``.

    join: "mean" or "rank0", for a checkpoint of a run of several processes: join their statistics in that way again.
    """
    source = create_source(config)
    return evaluators(config, source.num_classes, weights, source, join)(source.val)


def evaluators(
    config: dict,
    num_classes: int,
    weights: Path | None = None,
    source: Source | None = None,
    join: str | None = None,
) -> Callable[[Dataset], Evaluator]:
    """Like ``evaluator``, for whatever images: gives what evaluates one network on any data set.

    source: the configuration's own data; looked for only where statistics are recalibrated on its training images.
    """
    settings = settings_from(config)
    if settings.eval.stats == "recalibrated" and source is None:
        source = create_source(config)
    world = World().on(settings.hardware.device)
    model = create_network(config, num_classes)
    if weights:
        load_weights(model, weights)
    if join:
        join_again(model, weights, join)
    place(model, settings.hardware, world.device)
    set_backends(settings.hardware, None)
    loading = {
        "workers": settings.hardware.workers,
        "device": world.device,
        "channels_last": settings.hardware.channels_last,
    }
    train = source and TrainLoader(
        source, settings.seed, settings.optim.global_batch, settings.batch_size, **loading
    )

    def on(images: Dataset) -> Evaluator:
        return Evaluator(
            model,
            train,
            EvalLoader(images, settings.eval.batch_size or settings.batch_size, **loading),
            world,
            autocast_of(settings.hardware, world.device),
            settings.eval,
            settings.epochs,
        )

    return on


def predictor(folder: Path, config: dict) -> tuple[nn.Module, Callable[[Path], Tensor], list[str]]:
    """(network in evaluation mode with the run's last weights, image file -> normalised (1, 3, S, S), class names)."""
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}: is it a run folder?")
    card = json.loads((folder / CARD).read_text())
    crop = Crop(card["image_size"], card["eval_resize"], card["interpolation"])
    mean, std = (torch.tensor(card[key]).view(3, 1, 1) * 255 for key in ("mean", "std"))
    model = create_network(config, len(card["classes"]))
    load_weights(model, last_weights(folder))

    def read(path: Path) -> Tensor:
        encoded = torch.frombuffer(bytearray(path.read_bytes()) or bytearray(1), dtype=torch.uint8)
        return ((crop.evaluate(decode(encoded, str(path))) - mean) / std)[None]

    return model.eval(), read, card["classes"]


def _describe(run: Run, source: Source) -> str:
    settings, world = run.settings, run.world
    micro = settings.optim.global_batch // settings.batch_size // world.size
    return (
        f"{run.arch}: {sum(p.numel() for p in run.model.parameters()):,} parameters; {len(source.train):,} "
        f"training and {len(source.val):,} evaluation images of {source.num_classes} classes; "
        f"{settings.epochs} epochs of {run.train.steps_per_epoch} steps; global batch "
        f"{settings.optim.global_batch} = {settings.batch_size} x {micro} accumulated x {world.size} "
        f"process{'es' if world.size > 1 else ''}; peak rate {settings.optim.peak_lr:g}; "
        f"{settings.hardware.dtype} on {world.device.type}"
        + (f"; continuing at step {run.progress.step} of {run.total_steps}" if run.progress.step else "")
    )
