"""Tasks: what a network learns and by which numbers it is judged. One file a task; ``find`` lists them."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from anorm.tasks.base import Judge, Metric, Task
from anorm.words import nearest

__all__ = ["Judge", "Metric", "Task", "find", "list_tasks"]


@cache
def _tasks() -> dict[str, type[Task]]:
    """Return name -> class, from the TASKS table of every file in this folder."""
    found: dict[str, type[Task]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        found.update(getattr(importlib.import_module(f"{__name__}.{info.name}"), "TASKS", {}))
    return found


def list_tasks() -> list[str]:
    """Return the names that ``find`` knows."""
    return list(_tasks())


def find(name: str) -> type[Task]:
    """Return the class of a task. Raises ValueError for an unknown name, naming the nearest."""
    if name not in _tasks():
        raise ValueError(f"task={name}{nearest(name, _tasks(), 'tasks')}")
    return _tasks()[name]
