"""What a task, an architecture, a norm and a data set take, and their sections with every default spelled out.

``train.yaml`` and its groups spell out what is worth reading; whatever else is an argument of what a section builds is
an option too, found in its signature.
"""

from __future__ import annotations

import importlib
from typing import Any

from anorm import tasks
from anorm.archs import foreign
from anorm.config.compose import BUILT
from anorm.config.settings import Settings, sections
from anorm.config.values import Option, checked, options_of
from anorm.data import sources
from anorm.norms.build import norm_classes
from anorm.norms.placement import Placement
from anorm.registry import arch_builders


def options(section: str, node: Any = None) -> dict[str, Option] | None:
    """Return the keys that a section takes; of a section in ``BUILT`` those of what ``node["name"]`` builds.

    "" is the top level. None: any key (a class that takes ``**options``, or another library's function).
    """
    if section in BUILT:
        found = _arguments(section, node)
        return None if found is None else {"name": Option(str)} | found
    return options_of(sections()[section] if section else Settings)


def complete(section: str, node: dict[str, Any]) -> dict[str, Any]:
    """Return a section of ``BUILT`` with every default spelled out and every value checked.

    Raises ValueError for a value that is not of its argument's type.
    """
    if "name" not in node:
        raise ValueError(f"{section}.name is missing: choose {section}=...")
    known = _arguments(section, node) or {}
    defaults = {key: option.default for key, option in known.items()}
    if section == "norm" and node["name"] == "module":
        known = options_of(Placement) | _of_target(node.get("target"))
    return {"name": node["name"]} | _checked(section, defaults | node, known)


def check_pair(arch: dict[str, Any], norm: dict[str, Any]) -> None:
    """Raise ValueError where an architecture and a norm, both complete, do not go together, or one lacks its name."""
    if ":" in arch["name"]:
        foreign.find(arch["name"])
    elif ":" in norm["name"]:
        raise ValueError(
            f"norm={norm['name']} goes with arch=timm:NAME or arch=torchvision:NAME; for "
            f"arch={arch['name']} take norm=module norm.target=CLASS"
        )
    if norm["name"] == "module" and not norm.get("target"):
        raise ValueError("norm=module needs the class of the layer: norm.target=package.module.Class")


def _checked(path: str, node: dict[str, Any], known: dict[str, Option]) -> dict[str, Any]:
    """Return the values of ``node`` as the arguments take them, those of a norm within a norm (its base) too."""
    found = {}
    for key, value in node.items():
        option = known.get(key, Option())
        if not (option.required and value is None):  # what builds it says that it is missing
            value = checked(str if key == "name" else option.hint, value, f"{path}.{key}")
        if isinstance(value, dict) and path.split(".")[0] == "norm" and value.get("name") in norm_classes():
            value = _checked(f"{path}.{key}", value, options_of(norm_classes()[value["name"]]))
        found[key] = value
    return found


def _arguments(section: str, node: dict[str, Any]) -> dict[str, Option] | None:
    """Return key -> option of what a section of ``BUILT`` builds; None where any key may be given or nothing is known."""
    name = node.get("name")
    if section == "task":
        if name not in tasks.list_tasks():
            return None
        return options_of(tasks.find(name), hidden=("classes", "channels", "mix"))
    if section == "arch":
        builder = arch_builders().get(name)
        return options_of(builder, hidden=("norm", "num_classes", "in_channels")) if builder else None
    if section == "norm":
        law = norm_classes().get(name)
        if law is None or name == "module":  # whose class takes what it takes
            return None
        hidden = ("name", "channels", "act", "options", "site")
        # last, as it wins: an option whose default depends on the site (AN's k, SE's reduction) is None
        found = {}
        for called in (Placement, law, law.at):
            found |= options_of(called, hidden)
        return found
    assert section == "data", section
    return options_of(sources.find(name)) if name in sources.list_sources() else None


def _of_target(dotted: Any) -> dict[str, Option]:
    """Return the options of the class that norm=module names; none where it cannot be imported, as building it will say."""
    module, _, name = str(dotted).rpartition(".")
    try:
        return {"target": Option(str | None)} | options_of(getattr(importlib.import_module(module), name))
    except (ImportError, AttributeError, ValueError, TypeError):
        return {"target": Option(str | None)}
