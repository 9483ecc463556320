"""Configuration -> objects: the only file of the package that knows the configuration's tree."""

from __future__ import annotations

import dataclasses
import inspect

from anorm.engine.settings import sections


def accepted(section: str, config: dict) -> set[str] | None:
    """The keys that a section takes: the arguments of what it builds. None: any (a class that takes ``**options``)."""
    node = config[section]
    if section in sections():
        return {field.name for field in dataclasses.fields(sections()[section])}
    if section == "arch":
        from anorm.registry import arch_builders

        builder = arch_builders().get(node.get("name"))
        return {"name"} | (_arguments(builder) - {"norm", "num_classes", "in_channels"}) if builder else None
    if section == "norm":
        from anorm.norms.build import norm_classes
        from anorm.norms.placement import Placement

        law = norm_classes().get(node.get("name"))
        if law is None or _takes_any(law):
            return None
        return (_arguments(Placement) | _arguments(law)) - {"channels", "act", "options"}
    assert section == "data", section
    from anorm.data import sources

    if node.get("name") not in sources.list_sources():
        return None
    return {"name", "root"} | set(sources.signature_of(node["name"]).parameters)


def _arguments(called) -> set[str]:
    return set(inspect.signature(called).parameters)


def _takes_any(called) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(called).parameters.values())
