"""The C++ backend for CPU tensors."""

from __future__ import annotations

from types import ModuleType

import torch

from anorm.ops.cpu import laws
from anorm.ops.cpu.library import LIBRARY, available, build, instruction_set
from anorm.ops.cpu.passes import affine, affine_backward, moments, moments_backward, prefers_torch

__all__ = [
    "LIBRARY",
    "affine",
    "affine_backward",
    "available",
    "build",
    "instruction_set",
    "laws_for",
    "moments",
    "moments_backward",
    "prefers_torch",
]


def laws_for(dtype: torch.dtype) -> ModuleType:
    """The coefficient operators for maps of a dtype: all have them."""
    return laws
