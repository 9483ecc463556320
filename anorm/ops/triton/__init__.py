"""The Triton backend for CUDA tensors."""

from __future__ import annotations

import importlib.util
from functools import cache
from types import ModuleType

import torch

from anorm.ops.triton import laws
from anorm.ops.triton.library import INTERPRETED
from anorm.ops.triton.passes import affine, affine_backward, moments, moments_backward, prefers_torch

__all__ = [
    "affine",
    "affine_backward",
    "available",
    "laws_for",
    "moments",
    "moments_backward",
    "prefers_torch",
]


def available() -> str | None:
    """None where the kernels can run here, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return _unfit(torch.cuda.current_device())


@cache
def _unfit(device: int) -> str | None:
    """Why this GPU cannot run the kernels: below compute capability 8.0 only a trial tells."""
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    x = torch.ones(1, 16, 4, 4, device=f"cuda:{device}", dtype=torch.half)
    try:
        mean, _ = moments(x.to(memory_format=torch.channels_last))
        right = bool((mean == 1).all())
    except Exception as error:  # whatever Triton's compiler, ptxas or the driver raise: it becomes the reason
        return f"the installed Triton cannot compile for compute capability {capability[0]}.{capability[1]}: {error}"
    return (
        None
        if right
        else f"a trial kernel computes wrongly on compute capability {capability[0]}.{capability[1]}"
    )


def laws_for(dtype: torch.dtype) -> ModuleType | None:
    """The coefficient operators for maps of a dtype; None for float64, whose laws run as they are written."""
    return None if dtype == torch.float64 else laws
