"""Classes of a photograph by a run's last weights; the run folder holds all that is needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from anorm.build import create_network, create_task
from anorm.data.decode import decode
from anorm.data.transforms import Crop
from anorm.engine.runfolder import CARD, configuration_in, last_weights
from anorm.weights import load_weights


@dataclass(frozen=True)
class Predictor:
    """model: in evaluation mode, with the run's last weights. read: image file -> normalised (1, C, S, S)."""

    model: nn.Module
    read: Callable[[Path], Tensor]
    classes: list[str]
    image_size: int


def _card(folder: Path) -> dict:
    """Return the card of the run's data. Raises ValueError where the folder holds no run."""
    if not (folder / CARD).is_file():
        raise ValueError(f"{folder} has no {CARD}: is it a run folder?")
    return json.loads((folder / CARD).read_text())


def predictor(folder: Path) -> Predictor:
    """Return what predicts with the last weights of a run. Raises ValueError where the folder holds no run, or one whose
    card tells no crop.
    """
    card = _card(folder)
    config = configuration_in(folder)
    if "eval_resize" not in card:
        raise ValueError(f"{folder} is of task={config.task.name}: only networks that classify images are used here")
    crop = Crop(card["image_size"], card["eval_resize"], card["interpolation"])
    mean, std = (torch.tensor(card[key]).view(-1, 1, 1) * 255 for key in ("mean", "std"))
    model = create_network(config, create_task(config, card["classes"], len(card["mean"])))
    load_weights(model, last_weights(folder))

    def read(path: Path) -> Tensor:
        encoded = torch.frombuffer(bytearray(path.read_bytes()) or bytearray(1), dtype=torch.uint8)
        return ((crop.evaluate(decode(encoded, str(path))) - mean) / std)[None]

    return Predictor(model.eval(), read, card["classes"], card["image_size"])


def detecting(folder: Path) -> tuple[nn.Module, Callable[[Path], tuple[Tensor, tuple]], list[str]]:
    """Return the detector in evaluation mode with the run's last weights, a function from an image file to the image,
    uint8 (3, H, W), and the detector's inputs, and the class names.
    """
    card, config = _card(folder), configuration_in(folder)
    task = create_task(config, card["classes"], len(card["mean"]))
    model = create_network(config, task)
    load_weights(model, last_weights(folder))

    def read(path: Path) -> tuple[Tensor, tuple]:
        encoded = torch.frombuffer(bytearray(path.read_bytes()) or bytearray(1), dtype=torch.uint8)
        image = decode(encoded, str(path))
        return image, task.inputs_of(image, card)

    return model.eval(), read, card["classes"]


def likeliest(predictor: Predictor, path: Path, top: int = 5) -> list[tuple[float, str]]:
    """Return (probability, class) of the ``top`` likeliest classes of an image, at most as many as there are."""
    with torch.no_grad():
        probabilities = predictor.model(predictor.read(path))[0].softmax(0)
    found = probabilities.topk(min(top, len(predictor.classes)))
    return [(float(value), predictor.classes[index]) for value, index in zip(*found, strict=True)]
