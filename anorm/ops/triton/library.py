"""How an operator of the Triton backend is declared, and what its passes and laws share."""

from __future__ import annotations

import os

import torch

__all__ = ["INTERPRETED", "operator", "power"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_KEYS = ("CUDA", "CPU") if INTERPRETED else ("CUDA",)


def power(value: int) -> int:
    """The smallest power of two that is not below value."""
    return 1 << (value - 1).bit_length()


_library = torch.library.Library("anorm_triton", "DEF")


def operator(name: str, schema: str, implementation, fake):
    """Define an operator: fixed arity, no aliasing, strides as they come; -> its overload, bound once."""
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(f"{name}{schema}", tags=tags)
    for key in _KEYS:
        _library.impl(name, implementation, key)
    torch.library.register_fake(f"anorm_triton::{name}", fake, lib=_library)
    return getattr(torch.ops.anorm_triton, name).default
