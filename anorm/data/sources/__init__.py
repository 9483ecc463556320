"""Sources by name. Each module here has SOURCES = {name: function}; a function's keywords are its yaml's keys."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path

from anorm.data.sources.base import Batch, Dataset, Fetched, FetchedImages, LabelledImages, Source

__all__ = [
    "Batch",
    "Dataset",
    "Fetched",
    "FetchedImages",
    "LabelledImages",
    "Source",
    "create",
    "list_sources",
]


def _sources() -> dict[str, Callable[..., Source]]:
    found: dict[str, Callable[..., Source]] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= getattr(importlib.import_module(f"{__name__}.{module.name}"), "SOURCES", {})
    return found


def list_sources() -> list[str]:
    return sorted(_sources())


def create(name: str, root: str | Path | None = None, **options) -> Source:
    """Build the source `name` from the folder `root` (None for those that need none) and its own options.

    Raises ValueError for an unknown name or option, and for anything wrong with the data, saying what to do.
    """
    build = find(name)
    accepted = inspect.signature(build).parameters
    if root is not None and "root" not in accepted:
        raise ValueError(f"data={name} reads no folder: leave out data.root={root}")
    if "root" in accepted and root is None and accepted["root"].default is inspect.Parameter.empty:
        raise ValueError(f"data.root is not set: give data.root=FOLDER, where data={name} lies")
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"data={name} has no option {', '.join(unknown)}; it takes {', '.join(accepted)}")
    return build(**({"root": root} if "root" in accepted else {}), **options)


def find(name: str) -> Callable[..., Source]:
    """Return the function that builds a source; its arguments are the source's options. Raises ValueError."""
    sources = _sources()
    if name not in sources:
        raise ValueError(f"data source {name!r} is unknown: choose one of {', '.join(sorted(sources))}")
    return sources[name]
