"""The options of a configuration: which there are, their defaults, and what "auto" means on a machine.

``train.yaml`` and its groups spell out what is worth reading; whatever else an architecture, a norm or a data set
takes as an argument is an option too, found in its signature.
"""

from __future__ import annotations

import dataclasses
import inspect

from anorm import tasks
from anorm.archs import foreign
from anorm.config.compose import BUILT
from anorm.config.machine import Machine, check_batches, decide
from anorm.config.settings import sections, settings_from
from anorm.data import sources
from anorm.norms.build import norm_classes
from anorm.norms.placement import Placement
from anorm.registry import arch_builders


def accepted(section: str, config: dict) -> set[str] | None:
    """The keys that a section takes: the arguments of what it builds. None: any (a class that takes ``**options``)."""
    if section in sections():
        return {field.name for field in dataclasses.fields(sections()[section])}
    arguments = _arguments(section, config[section])
    return None if arguments is None else set(arguments) | {"name"}


def complete(config: dict) -> dict:
    """The configuration with every default spelled out; a run's signature is taken over this.

    Raises ValueError for a value of the wrong type or outside its limits.
    """
    full = dataclasses.asdict(settings_from(config))
    config = {"task": {"name": "classification"}} | config  # a frozen one may be older than this section
    for section in BUILT:
        if "name" not in config[section]:
            raise ValueError(f"{section}.name is missing: choose {section}=...")
        full[section] = (
            {"name": config[section]["name"]} | (_arguments(section, config[section]) or {}) | config[section]
        )
    if ":" in full["arch"]["name"]:
        foreign.find(full["arch"]["name"])
    elif ":" in full["norm"]["name"]:
        raise ValueError(
            f"norm={full['norm']['name']} goes with arch=timm:NAME or arch=torchvision:NAME; for "
            f"arch={full['arch']['name']} take norm=module norm.target=CLASS"
        )
    if full["norm"]["name"] == "module" and not full["norm"].get("target"):
        raise ValueError("norm=module needs the class of the layer: norm.target=package.module.Class")
    return full


def _arguments(section: str, node: dict) -> dict | None:
    """Key -> default of what an arch, norm or data entry builds; None where any key may be given or nothing
    is known.
    """
    name = node.get("name")
    if section == "arch":
        called, hidden = arch_builders().get(name), {"norm", "num_classes", "in_channels"}
        signatures = [called] if called else []
    elif section == "norm":
        called, hidden = norm_classes().get(name), {"name", "channels", "act", "options"}
        # last, as it wins: an option whose default depends on the site (AN's k, SE's reduction) is None
        signatures, hidden = [Placement, called, called.at] if called else [], hidden | {"site"}
    elif section == "task":
        called, hidden = tasks.find(name) if name in tasks.list_tasks() else None, {"classes", "channels", "mix"}
        signatures = [called] if called else []
    else:
        assert section == "data", section
        hidden = set()
        signatures = [sources.signature_of(name)] if name in sources.list_sources() else []
    found = {}
    for called in signatures:
        signature = called if isinstance(called, inspect.Signature) else inspect.signature(called)
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD and called is not Placement and name == "module":
                return None
            if parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in hidden:
                default = None if parameter.default is parameter.empty else parameter.default
                found[parameter.name] = list(default) if isinstance(default, tuple) else default
    return found if signatures else None


def resolve(config: dict, started: int | None = None, machine: Machine | None = None) -> dict:
    """``config`` with every "auto" of its hardware decided for ``machine`` (default: this one), and its
    batches checked.

    started: the number of processes that another launcher started. Raises ValueError where the machine lacks what is
    asked for, or where the batches do not fit the processes.
    """
    settings = settings_from(config)
    hardware = decide(settings.hardware, started, machine)
    check_batches(settings.batch_size, settings.optim.global_batch, hardware.processes)
    return config | {"hardware": dataclasses.asdict(hardware)}


def resolve_for(config: dict, machine: Machine) -> dict:
    """``config`` with device and precision (part of its signature) decided for a machine elsewhere."""
    decided = resolve(config, machine=machine)["hardware"]
    kept = {key: decided[key] for key in ("device", "dtype")}
    return config | {"hardware": config["hardware"] | kept}
