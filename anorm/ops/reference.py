"""The four passes in plain PyTorch: the definition that every other backend is tested against.

Also the path for double backward: under ``create_graph=True`` every expression below is differentiable. Statistics
are accumulated in float32 (float64 for float64). ``torch.var`` is never called: on a CPU it costs a hundred means.
The equations are in README.md beside this file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from anorm.ops.activations import masked

__all__ = ["affine", "affine_backward", "available", "laws_for", "moments", "moments_backward"]


def available() -> None:
    """Always usable."""
    return None


def laws_for(dtype: torch.dtype) -> None:
    """No law is computed in one call: each runs as it is written."""
    return None


def moments(x: Tensor, var: bool = True) -> tuple[Tensor, Tensor | None]:
    """(Eq. 1) mean and biased variance over H x W, (N, C) each: two passes, never E[x^2] - E[x]^2.

    The second term takes out what the rounding of the mean put in (Chan, Golub and LeVeque, 1983).
    """
    mean = x.mean((2, 3), dtype=_acc(x))
    if not var:
        return mean, None
    d = _minus(x, mean)
    rest = d.mean((2, 3)).square()
    return mean, (_times(d, d).mean((2, 3)) - rest).clamp_min(0)


def affine(
    x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, act: str
) -> Tensor:
    """(Eq. 2) y = act(scale * (x - centre) + shift [+ residual]), in x's dtype and layout."""
    y = _before_act(x, centre, scale, shift, residual)
    if act == "relu":
        return F.relu(y, inplace=_overwrites())
    if act == "relu6":
        return F.hardtanh(y, 0.0, 6.0, inplace=_overwrites())
    assert act == "none", act
    return y


def affine_backward(
    dy: Tensor, x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, y: Tensor | None, act: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(Eq. 3, 4) (dscale, dshift, g): sums over H x W, (N, C); g is returned where it was masked by a given y."""
    g = dy if act == "none" else masked(act, dy, _before_act(x, centre, scale, shift) if y is None else y)
    acc = _acc(x)
    dshift = g.sum((2, 3), dtype=acc)
    dscale = _times(_minus(x, centre), g).sum((2, 3))
    return dscale, dshift, None if y is None or act == "none" else g


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
    """(Eq. 5) dx = scale * g + dvar2 * (x - mean) + dmean1, with dvar2 = 2 dvar / HW and dmean1 = dmean / HW."""
    g = dy if act == "none" else masked(act, dy, _before_act(x, centre, scale, shift))
    if dmean1 is None:
        dx = g * _map(scale)
    elif dvar2 is None:
        dx = torch.addcmul(_map(dmean1), g, _map(scale))
    else:
        dx = _times(_minus(x, mean), _map(dvar2)).add_(_map(dmean1)).addcmul_(g, _map(scale))
    return dx.to(x.dtype)


def _before_act(
    x: Tensor, centre: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None
) -> Tensor:
    z = _plus(_times(_minus(x, centre), _map(scale)), _map(shift))
    if residual is not None:
        z = _plus(z, residual)
    return z.to(x.dtype)


def _acc(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _map(coefficient: Tensor) -> Tensor:
    """(C,) or (N, C) -> broadcastable over (N, C, H, W)."""
    return coefficient[..., None, None]


def _minus(x: Tensor, centre: Tensor) -> Tensor:
    """x - centre in the accumulation dtype, always in new memory."""
    if x.dtype == centre.dtype:
        return x - _map(centre)
    return _plus(x.to(centre.dtype), -_map(centre))


def _overwrites() -> bool:
    """Whether a map of ours may be overwritten: not where autograd, a tangent or vmap may need what it was."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def _times(fresh: Tensor, factor: Tensor) -> Tensor:
    return fresh.mul_(factor) if _overwrites() else fresh * factor


def _plus(fresh: Tensor, term: Tensor) -> Tensor:
    return fresh.add_(term) if _overwrites() else fresh + term
