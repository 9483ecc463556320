"""The compiled library of the C++ backend: built, loaded, and the way an operator of it is declared."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from anorm.native import BuildError, Library

__all__ = ["LIBRARY", "available", "build", "instruction_set", "operator"]

_log = logging.getLogger(__name__)
_TORCH = Path(torch.__file__).parent

LIBRARY = Library(
    name=f"cpu-torch{torch.__version__}",
    folder=Path(__file__).parent,
    # the passes are vectors by hand, the laws' loops are not
    sources={"passes.cpp": "-O2", "laws.cpp": "-O3", "switchable.cpp": "-O3"},
    headers=(
        "isa.h", "vector.h", "passes.h", "cells.h", "channels.h", "laws.h", "switchable.h",
    ),
    # neither -ffast-math nor -march: see passes.cpp; the two -fno are about errno and floating-point traps only
    flags=(
        "-std=c++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
        "-fno-trapping-math", "-Wno-psabi", "-w",
    ),
    link=("-fopenmp", f"-L{_TORCH / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"),
    built_for=f"{torch.__version__} {torch.version.git_version}",
    include=(_TORCH / "include", _TORCH / "include/torch/csrc/api/include"),
)  # fmt: skip


def build(rebuild: bool = False) -> str:
    """Compile the kernels if the cache does not hold them (about a minute and a half of one core), load them, and
    return the library's path. Raises BuildError with the reason where that is not possible.
    """
    if not (_TORCH / "include").is_dir():
        raise BuildError(
            f"this torch has no C++ headers ({_TORCH / 'include'}); install torch's wheel from PyPI or pytorch.org"
        )
    path = LIBRARY.compiled(
        rebuild, lambda: _log.warning("compiling the C++ kernels, once (a minute or two)")
    )
    _load(str(path))
    return str(path)


@cache
def _load(path: str) -> None:
    torch.ops.load_library(path)


@cache
def available() -> str | None:
    """None if the kernels are loaded (built now if need be), else the reason in words. The answer is kept."""
    try:
        build()
    except (BuildError, OSError) as error:  # OSError: the loader refused the library
        return str(error)
    return None


def instruction_set() -> str:
    """The kernels in use: "avx512", "avx2" or "baseline" (ANORM_CPU_ISA may ask for a narrower one than there is)."""
    return torch.ops.anorm_cpu.instruction_set()


# ---- operators: schemas and shapes here, kernels in C++ ------------------------------------------------------------

_library = torch.library.Library("anorm_cpu", "DEF")
_library.define("instruction_set() -> str")


def operator(schema: str, fake: Callable):
    """Define an operator whose CPU kernel the compiled library brings; its shape function is ``fake``."""
    name = _library.define(schema)
    torch.library.register_fake(f"anorm_cpu::{name}", fake, lib=_library)
    return getattr(torch.ops.anorm_cpu, name).default
