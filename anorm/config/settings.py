"""The sections of a run's configuration as plain dataclasses: their fields are the accepted keys, with types
and limits.

``configs/train.yaml`` and ``configs/setup/vanilla.yaml`` spell the same defaults out for readers; a test
holds them equal.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anorm.config.compose import BUILT
from anorm.config.values import alternatives, checked
from anorm.words import nearest


@dataclass(frozen=True)
class Optim:
    """The optimizer. The learning rate that runs is lr * global_batch / lr_batch (the linear rule)."""

    name: str = "sgd"  # any name of timm's optimizer factory
    lr: float = 0.1
    lr_batch: int = 256
    global_batch: int = 1024
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_norm: bool = True  # false: no weight decay on the parameters of norms
    layer_decay: float | None = None
    clip: float | None = None  # largest allowed norm of the whole gradient
    impl: str = "auto"  # auto (fused where torch has it), foreach, apex
    args: dict = field(default_factory=dict)  # further arguments of the optimizer's class, e.g. betas

    def __post_init__(self):
        positive("optim", self, "lr", "lr_batch", "global_batch", "layer_decay", "clip")
        not_negative("optim", self, "weight_decay", "momentum")
        one_of("optim", self, "impl", ("auto", "foreach", "apex"))

    @property
    def peak_lr(self) -> float:
        return self.lr * self.global_batch / self.lr_batch


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every iteration: a linear warm-up, then what ``name`` says (``anorm.engine.schedule``).

    cosine: half a cosine down to ``floor``. step: times ``factor`` at each of ``milestones``. alrs: times ``factor`` after
    an epoch whose mean loss fell by less than ``tolerance``, absolutely and as a part. A key of another schedule is refused.
    """

    name: str = "cosine"
    warmup_epochs: float = 5.0
    floor: float = 0.0  # cosine: the last rate as a fraction of the peak
    milestones: list = field(default_factory=list)  # step: in epochs
    factor: float | None = None  # step: 0.1; alrs: 0.97
    tolerance: float | None = None  # alrs: 0.01
    warmup_steps: int | None = None  # step: takes the place of warmup_epochs
    warmup_from: float = 0.0  # with warmup_steps: the first rate as a fraction of the peak

    def __post_init__(self):
        one_of("schedule", self, "name", tuple(OF_SCHEDULE))
        not_negative("schedule", self, "warmup_epochs", "floor", "warmup_from")
        positive("schedule", self, "factor", "tolerance", "warmup_steps")
        own, plain = OF_SCHEDULE[self.name], {f.name: f.default for f in dataclasses.fields(self)}
        for key in (key for keys in OF_SCHEDULE.values() for key in keys if key not in own):
            value = getattr(self, key)
            if value and value != plain[key]:
                raise ValueError(
                    f"schedule.{key}={value} is not for schedule.name={self.name}, which takes warmup_epochs, "
                    f"{', '.join(own)}"
                )
        if self.name == "step":
            marks = self.milestones
            numbers = all(isinstance(m, (int, float)) and not isinstance(m, bool) and m > 0 for m in marks)
            if not marks or not numbers or sorted(set(marks)) != list(marks):
                raise ValueError(
                    f"schedule.milestones={marks} must be rising numbers of epochs, such as [30,60,90]"
                )
        if self.warmup_from and (self.warmup_steps is None or self.warmup_from > 1):
            raise ValueError(
                f"schedule.warmup_from={self.warmup_from:g} is a fraction of the peak, for schedule.warmup_steps=N"
            )


OF_SCHEDULE = {
    "cosine": ("floor",),
    "step": ("milestones", "factor", "warmup_steps", "warmup_from"),
    "alrs": ("factor", "tolerance"),
}
"""The keys of each schedule besides warmup_epochs."""


@dataclass(frozen=True)
class Mix:
    """What happens to images and targets between the loader and the loss (alphas of Beta distributions; 0 is off)."""

    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self):
        not_negative("mix", self, "mixup", "cutmix", "label_smoothing")
        if self.label_smoothing >= 1:
            raise ValueError(f"mix.label_smoothing={self.label_smoothing} must be below 1")


@dataclass(frozen=True)
class Eval:
    """Evaluation. ``stats``: running (as trained), batch (each batch's own) or recalibrated (train batches, no gradient);
    a list evaluates under each, and the first decides which weights are the best.

    Where an answer depends on the others in its batch, images come in whole batches in an ``order``: shuffled, a
    permutation drawn from ``seed``, or classes, class by class. ``others``: evaluate the sets and statistics beyond the
    first pair after every epoch that is evaluated, or after the last alone.
    """

    stats: str | list[str] = "running"
    every: int = 1  # epochs; the last epoch is always evaluated
    batch_size: int | None = None  # None: batch_size
    recalibrate_batches: int = 200
    order: str = "shuffled"
    seed: int = 0
    others: str = "every"

    def __post_init__(self):
        if not self.all_stats or len(set(map(str, self.all_stats))) < len(self.all_stats):
            raise ValueError(f"eval.stats={self.stats} must name one or more statistics, each once")
        for word in self.all_stats:
            one_of("eval", self, "stats", ("running", "batch", "recalibrated"), word)
        one_of("eval", self, "order", ("shuffled", "classes"))
        one_of("eval", self, "others", ("every", "last"))
        not_negative("eval", self, "seed")
        positive("eval", self, "every", "batch_size", "recalibrate_batches")

    @property
    def all_stats(self) -> tuple[str, ...]:
        """The statistics to evaluate under, in order."""
        return (self.stats,) if isinstance(self.stats, str) else tuple(self.stats)


@dataclass(frozen=True)
class Dist:
    """Processes. ``stats`` says how their running statistics are joined: mean, or rank0 (what most papers did)."""

    stats: str = "mean"

    def __post_init__(self):
        one_of("dist", self, "stats", ("mean", "rank0"))


@dataclass(frozen=True)
class Ema:
    """Exponential moving average of weights and float statistics; decay 0 is off."""

    decay: float = 0.0

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"ema.decay={self.decay} must be at least 0 and below 1 (0 is off, 0.9999 is usual)"
            )


@dataclass(frozen=True)
class Checkpoint:
    """When to save besides the end of an epoch (0 is never), and how many older checkpoints to keep."""

    every_steps: int = 0
    every_minutes: float = 15.0
    keep: int = 2

    def __post_init__(self):
        not_negative("checkpoint", self, "every_steps", "every_minutes")
        positive("checkpoint", self, "keep")


@dataclass(frozen=True)
class Log:
    """The device is asked for its numbers every ``every`` steps, never in between."""

    every: int = 50
    tensorboard: bool = True

    def __post_init__(self):
        positive("log", self, "every")


@dataclass(frozen=True)
class Hardware:
    """Where and how fast; nothing here but ``dtype`` and ``loss_scale`` changes the mathematics."""

    device: str = "auto"  # auto, cpu, gpu
    processes: int | str = "auto"  # auto: one a GPU; one on a CPU
    dtype: str = "auto"  # auto: fp16 on a GPU, fp32 on a CPU; or fp64, fp32, tf32, fp16, bf16
    loss_scale: float | str = "dynamic"  # fp16 only; a number is a static scale (the paper's is 128)
    channels_last: bool | str = "auto"
    compile: bool = False
    workers: int | str = "auto"  # loader workers of a process
    threads: int | str = "auto"  # of torch in a process
    deterministic: bool = False  # deterministic GPU algorithms only

    def __post_init__(self):
        one_of("hardware", self, "device", ("auto", "cpu", "gpu"))
        one_of("hardware", self, "dtype", ("auto", "fp64", "fp32", "tf32", "fp16", "bf16"))
        positive(
            "hardware",
            self,
            "processes",
            "threads",
            *(("loss_scale",) if self.loss_scale != "dynamic" else ()),
        )
        not_negative("hardware", self, "workers")
        if isinstance(self.loss_scale, str) and self.loss_scale != "dynamic":
            raise ValueError(f"hardware.loss_scale={self.loss_scale} must be dynamic or a number such as 128")
        for name in ("processes", "workers", "threads", "channels_last"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "auto":
                raise ValueError(
                    f"hardware.{name}={value} must be auto or a "
                    f"{'truth value' if name == 'channels_last' else 'whole number'}"
                )


@dataclass(frozen=True)
class Settings:
    """A whole run but for task, arch, norm and data, whose keys are the arguments of what they build."""

    seed: int = 0
    epochs: int = 120
    batch_size: int = 128
    run_dir: str | Path | None = None
    resume: str = "auto"
    dry: bool = False
    faithful: str = "paper"
    weights: str | Path | None = None
    freeze: list[str] = field(default_factory=list)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    mix: Mix = field(default_factory=Mix)
    eval: Eval = field(default_factory=Eval)
    dist: Dist = field(default_factory=Dist)
    ema: Ema = field(default_factory=Ema)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self):
        positive("", self, "epochs", "batch_size")
        not_negative("", self, "seed")
        one_of("", self, "resume", ("auto", "never"))
        one_of("", self, "faithful", ("paper", "code"))
        of = self.schedule
        if of.warmup_steps is None and of.warmup_epochs >= self.epochs and of.warmup_epochs > 0:
            raise ValueError(
                f"schedule.warmup_epochs={of.warmup_epochs:g} leaves nothing of "
                f"epochs={self.epochs}: set schedule.warmup_epochs={self.epochs // 10} or more epochs"
            )
        if of.milestones and of.milestones[-1] >= self.epochs:
            raise ValueError(
                f"schedule.milestones={of.milestones} are not all below epochs={self.epochs}: the last is never reached"
            )


def settings_from(config: dict) -> Settings:
    """Return the checked ``Settings`` of a composed configuration (its task, arch, norm and data are left aside).

    Raises ValueError with the key, the value and what is accepted.
    """
    return _checked(Settings, {key: value for key, value in config.items() if key not in BUILT}, "")


def sections() -> dict[str, type]:
    """Return section name -> its dataclass."""
    hints = typing.get_type_hints(Settings)
    return {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}


def _checked(cls: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        keys = ", ".join(f"{where}.{f.name}" for f in dataclasses.fields(cls))
        raise ValueError(f"{where}={values!r}: {where} is a section; set one of its keys ({keys})")
    hints = typing.get_type_hints(cls)
    arguments = {}
    for name, value in values.items():
        path = f"{where}.{name}" if where else name
        if name not in hints:
            raise ValueError(f"unknown key {path}{nearest(name, hints)}")
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = _checked(hints[name], value, path)
        else:
            value = checked(hints[name], value, path)
            whole = isinstance(value, int) and not isinstance(value, bool)
            arguments[name] = float(value) if whole and _wants_float(hints[name]) else value
    return cls(**arguments)


def _wants_float(hint: Any) -> bool:
    return float in alternatives(hint) and int not in alternatives(hint)


def positive(where: str, owner: Any, *names: str) -> None:
    """Raise ValueError for the first of ``names`` whose value is a number not above zero."""
    _limit(where, owner, names, lambda value: value > 0, "above 0")


def not_negative(where: str, owner: Any, *names: str) -> None:
    """Raise ValueError for the first of ``names`` whose value is a number below zero."""
    _limit(where, owner, names, lambda value: value >= 0, "0 or more")


def _limit(where, owner, names, holds, words):
    for name in names:
        value = getattr(owner, name)
        if isinstance(value, (int, float)) and not holds(value):
            raise ValueError(f"{where + '.' if where else ''}{name}={value} must be {words}")


def one_of(where: str, owner: Any, name: str, choices: tuple[str, ...], value: Any = None) -> None:
    """Raise ValueError, with the nearest choices, unless the value (or ``value``, an entry of it) is one of ``choices``."""
    value = getattr(owner, name) if value is None else value
    if value not in choices:
        path = f"{where + '.' if where else ''}{name}"
        raise ValueError(f"{path}={value}{nearest(str(value), choices, 'choices')}")
