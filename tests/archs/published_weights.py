"""Values for networks in the published naming: every tensor follows from its published name alone.

The arrays in ``arrays/`` (logits, gradients, statistics) were computed in float64 with exactly these values, so a name
map from the published names to ours is all that is needed to compare.
"""

import json
import lzma
import zlib
from pathlib import Path

import numpy as np
import torch

ARRAYS = Path(__file__).parent / "arrays"
NAMES = json.loads(lzma.decompress((ARRAYS / "published_names.json.xz").read_bytes()))
"""Model -> {"total": parameters, "params": [[name, shape], ...], "buffers": ...}, for 21 published models."""

# how to build each of them here: (arch, norm, arch options)
MODELS = {
    "resnet34_bn": ("resnet34", "bn", {}),
    "resnet34_an_bn1": ("resnet34", "an", {}),
    "resnet34_an_bn2": ("resnet34", {"name": "an", "place": "text"}, {}),
    "resnet34_an_bn12": ("resnet34", {"name": "an", "place": [1, 2]}, {}),
    "resnet50_bn": ("resnet50", "bn", {}),
    "resnet50_an": ("resnet50", "an", {}),
    "resnet50_an_bn3": ("resnet50", {"name": "an", "place": 3}, {}),
    "resnet50_an_bn123": ("resnet50", {"name": "an", "place": "block"}, {}),
    "resnet50_an_all": ("resnet50", {"name": "an", "place": "all"}, {}),
    "resnet50_an_deepstem": ("resnet50", "an", {"stem": "deep", "shortcut": "avgpool"}),
    "resnet50_se_bn2": ("resnet50", {"name": "se", "place": 2}, {}),
    "resnet50_se_bn3": ("resnet50", "se", {}),
    "resnet50_se_bn123": ("resnet50", {"name": "se", "place": "block"}, {}),
    "resnet101_an": ("resnet101", "an", {}),
    "densenet121_bn": ("densenet121", "bn", {}),
    "densenet121_an": ("densenet121", "an", {}),
    "mobilenetv2_bn": ("mobilenetv2", "bn", {"dropout": 0.0}),
    "mobilenetv2_an": ("mobilenetv2", "an", {"dropout": 0.0}),
    "aognet12m_bn": ("aognet12m", "bn", {"dropout": (0.0,) * 4}),
    "aognet12m_an": ("aognet12m", "an", {"dropout": (0.0,) * 4}),
    "aognet40m_an": ("aognet40m", "an", {"dropout": (0.0,) * 4}),
}


def draw(key: str, shape) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)


def value(name: str, shape) -> np.ndarray:
    """A float64 value of reasonable size for the tensor of that published name."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    if leaf == "running_var":
        return 0.5 + np.random.Generator(np.random.PCG64(zlib.crc32(name.encode()))).random(shape)
    z = draw(name, shape)
    if leaf == "weight_":  # mixtures (K, C) that sum to about 1
        return (1 + 0.1 * z) * 2 / shape[0]
    if leaf == "weight" and len(shape) > 1:
        unit_gain = len(shape) == 2 or ".attention." in name
        return z / np.sqrt(shape[1]) if unit_gain else z * np.sqrt(2 / np.prod(shape[1:]))
    return 1 + 0.1 * z if leaf == "weight" else 0.1 * z


def state(entries) -> dict[str, torch.Tensor]:
    """[[name, shape], ...] -> a state_dict in the published naming."""
    return {name: torch.from_numpy(np.asarray(value(name, tuple(shape)))) for name, shape in entries}


def model_input(model: str) -> torch.Tensor:
    return torch.from_numpy(draw(f"input:{model}", (4, 3, 64, 64)))


def logit_gradient(model: str) -> torch.Tensor:
    return torch.from_numpy(draw(f"grad:{model}", (4, 1000)) / 1000)
