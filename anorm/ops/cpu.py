"""The C++ backend for CPU tensors: the four passes (``reference.py`` defines them); ``cpu_laws`` has the coefficients.

What lies between the passes has the statistics' dtype: float32, and float64 for float64 maps. Results are the same for
any number of threads. Operators are functional; their kernels live in a library that holds them for several
instruction sets and chooses when it is loaded, so one build serves every machine of its architecture.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from anorm.native import BuildError, Library

__all__ = [
    "affine",
    "affine_backward",
    "available",
    "build",
    "instruction_set",
    "laws",
    "moments",
    "moments_backward",
    "operator",
    "prefers_torch",
]

SMALL = 64
"""H * W up to which ``prefers_torch`` holds."""

_ACTS = {"none": 0, "relu": 1, "relu6": 2}

_log = logging.getLogger(__name__)

# ---- building ------------------------------------------------------------------------------------------------------

_TORCH = Path(torch.__file__).parent

LIBRARY = Library(
    name=f"cpu-torch{torch.__version__}",
    folder=Path(__file__).parent,
    # the passes are vectors by hand, the laws' loops are not
    sources={"cpu.cpp": "-O2", "cpu_laws.cpp": "-O3", "cpu_switchable.cpp": "-O3"},
    headers=(
        "cpu_isa.h", "cpu_vector.h", "cpu_passes.h", "cpu_cells.h", "cpu_channels.h", "cpu_laws.h", "cpu_switchable.h",
    ),
    # neither -ffast-math nor -march: see cpu.cpp; the two -fno are about errno and floating-point traps only
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


def _map(x: Tensor) -> Tensor:
    """Shape, dtype and layout of a map made for x; of one that is not dense, as the kernels would make it dense."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def _cells(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


_moments = operator("moments(Tensor x) -> (Tensor mean, Tensor var)", lambda x: (_cells(x), _cells(x)))
_mean = operator("mean(Tensor x) -> Tensor", _cells)
_affine = operator(
    "affine(Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor? residual, int act) -> Tensor",
    lambda x, *_: _map(x),
)
_affine_backward = operator(
    "affine_backward(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, int act)"
    " -> (Tensor dscale, Tensor dshift)",
    lambda dy, x, *_: (_cells(x), _cells(x)),
)
_affine_backward_residual = operator(
    "affine_backward_residual(Tensor dy, Tensor x, Tensor centre, Tensor y, int act)"
    " -> (Tensor dscale, Tensor dshift, Tensor g)",
    lambda dy, x, *_: (_cells(x), _cells(x), _map(x)),
)
_moments_backward = operator(
    "moments_backward(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor? mean, Tensor? dvar2,"
    " Tensor? dmean1, int act) -> Tensor",
    lambda dy, x, *_: _map(x),
)


@cache
def laws(dtype: torch.dtype) -> ModuleType:
    """The coefficient operators for maps of a dtype (any), as ``hot.py`` calls them."""
    return importlib.import_module("anorm.ops.cpu_laws")


def prefers_torch(x: Tensor) -> bool:
    """Whether one function of torch, where a law has one, beats six calls here: small contiguous maps (benchmarks/).

    Its group_norm refuses single values; other dtypes were not measured.
    """
    small = 1 < x.shape[2] * x.shape[3] <= SMALL and x.numel() > 0
    return small and x.dtype in (torch.float32, torch.bfloat16) and x.is_contiguous()


# ---- the four passes -----------------------------------------------------------------------------------------------
# x (N, C, H, W): float32, float64, bfloat16 or float16; contiguous, channels_last, or else made so. Coefficients (C,)
# or (N, C) of any strides. dy, y and the residual: any strides. ValueError for a shape or dtype that does not fit.


def moments(x: Tensor, var: bool = True) -> tuple[Tensor, Tensor | None]:
    """Mean and biased variance over H x W, (N, C) each; the variance to 1e-6 up to a mean of 1e4 deviations."""
    return _moments(x) if var else (_mean(x), None)


def affine(
    x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Tensor:
    """y = act(scale * (x - centre) + shift [+ residual]), in x's dtype and layout; act: none, relu or relu6."""
    return _affine(x, centre, scale, shift, residual, _ACTS[act])


def affine_backward(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, y: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dscale, dshift, g): sums over H x W of g * (x - centre) and of g = dy * act'.

    Without y the mask is recomputed from x and g is None; with y (a residual was added before the activation) the
    mask is read off y, and g, the residual's gradient, is returned.
    """
    if y is None or act == "none":
        return *_affine_backward(dy, x, centre, scale, shift, _ACTS[act]), None
    return _affine_backward_residual(dy, x, centre, y, _ACTS[act])


def moments_backward(
    dy: Tensor,
    x: Tensor,
    centre: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor | None,
    dvar2: Tensor | None,
    dmean1: Tensor | None,
    act: str,
) -> Tensor:
    """dx = scale * g + dvar2 * (x - mean) + dmean1, g = dy * act' with the mask recomputed from x.

    dvar2 may be None (then mean is not read), or dvar2 and dmean1 both. mean, dvar2, dmean1: (C,) or (N, C).
    """
    return _moments_backward(dy, x, centre, scale, shift, mean, dvar2, dmean1, _ACTS[act])
