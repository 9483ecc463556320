"""Weights made from names, as the reference arrays' models have them; the arrays themselves."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

ARRAYS = Path(__file__).parent / "arrays"


def arrays(name):
    """Name -> tensor of one file."""
    with np.load(ARRAYS / f"{name}.npz", allow_pickle=False) as file:
        return {
            key: torch.from_numpy(file[key]) if file[key].dtype.kind != "U" else file[key] for key in file
        }


def described(name):
    return json.loads((ARRAYS / f"{name}.json").read_text())


def fill(name, shape):
    """The tensor that the recipe makes of a name (in the authors' naming) and a shape."""
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.zeros(shape, dtype=torch.int64)
    random = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    if last == "running_var":
        return torch.from_numpy(np.asarray(0.5 + random.random(shape)))
    z = torch.from_numpy(np.asarray(random.standard_normal(shape)))
    if last in ("running_mean", "bias_", "bias"):
        return 0.1 * z
    if last == "weight_":
        return (1.0 + 0.1 * z) * 2.0 / shape[0]
    if len(shape) == 1:
        return 1.0 + 0.1 * z
    fan = np.prod(shape[1:])
    return z / np.sqrt(fan) if len(shape) == 2 or ".attention." in name else z * np.sqrt(2.0 / fan)


def unpack(bits, width):
    """numpy's packbits on the last axis, undone."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=-1)[..., :width])
