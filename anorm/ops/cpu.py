"""The C++ backend for CPU tensors: the four passes, built on first use (or ahead, by ``python -m anorm build``)."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["affine", "affine_backward", "available", "build", "instruction_set", "moments", "moments_backward"]

_ACTS = {"none": 0, "relu": 1, "relu6": 2}

_log = logging.getLogger(__name__)

# ---- operators: schemas and shapes here, kernels in cpu.cpp --------------------------------------------------------

_library = torch.library.Library("anorm_cpu", "DEF")


def _operator(schema: str, fake):
    """Define an operator whose CPU kernel the C++ library brings, and its shape function; its overload is returned."""
    name = _library.define(schema)
    torch.library.register_fake(f"anorm_cpu::{name}", fake, lib=_library)
    return getattr(torch.ops.anorm_cpu, name).default


def _map(x: Tensor) -> Tensor:
    """A result with x's shape, dtype and (made dense) layout."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x)
    last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.empty_like(x, memory_format=torch.channels_last if last else torch.contiguous_format)


def _cells(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


_moments = _operator("moments(Tensor x) -> (Tensor mean, Tensor var)", lambda x: (_cells(x), _cells(x)))
_mean = _operator("mean(Tensor x) -> Tensor", _cells)
_affine = _operator(
    "affine(Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor? residual, int act) -> Tensor",
    lambda x, *_: _map(x),
)
_affine_backward = _operator(
    "affine_backward(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, int act)"
    " -> (Tensor dscale, Tensor dshift)",
    lambda dy, x, *_: (_cells(x), _cells(x)),
)
_affine_backward_residual = _operator(
    "affine_backward_residual(Tensor dy, Tensor x, Tensor centre, Tensor y, int act)"
    " -> (Tensor dscale, Tensor dshift, Tensor g)",
    lambda dy, x, *_: (_cells(x), _cells(x), _map(x)),
)
_moments_backward = _operator(
    "moments_backward(Tensor dy, Tensor x, Tensor centre, Tensor scale, Tensor shift, Tensor? mean, Tensor? dvar2,"
    " Tensor? dmean1, int act) -> Tensor",
    lambda dy, x, *_: _map(x),
)
_library.define("isa() -> str")


def moments(x: Tensor, var: bool = True) -> tuple[Tensor, Tensor | None]:
    return _moments(x) if var else (_mean(x), None)


def affine(x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str) -> Tensor:
    return _affine(x, centre, scale, shift, residual, _ACTS[act])


def affine_backward(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, y: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor | None]:
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
    return _moments_backward(dy, x, centre, scale, shift, mean, dvar2, dmean1, _ACTS[act])


# ---- building and loading ------------------------------------------------------------------------------------------
if __name__ != "__main__" and os.environ.get("ANORM_SO"):
    torch.ops.load_library(os.environ["ANORM_SO"])
