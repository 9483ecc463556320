"""Folders with ImageNet's class names and a tiny picture in each, from whose colour the class can be read."""

import pkgutil

import torch
from PIL import Image
from torch import nn

SIDE = 8


def indices(name):
    """timm's list of the places of a subset's classes: "a" or "r"."""
    return [int(line) for line in pkgutil.get_data("timm.data", f"_info/imagenet_{name}_indices.txt").split()]


SYNSETS = pkgutil.get_data("timm.data", "_info/imagenet_synsets.txt").decode().split()


def picture(label):
    """Red, green and blue hold the digits of the class, at 8 x 8 pixels."""
    return Image.new(
        "RGB", (SIDE, SIDE), tuple(25 * digit for digit in (label % 10, label // 10 % 10, label // 100))
    )


def write_classes(folder, labels=range(1000), name=lambda label: SYNSETS[label], file=lambda label: "0.png"):
    """folder/CLASS/IMAGE, an image a class."""
    for label in labels:
        place = folder / name(label)
        place.mkdir(parents=True)
        picture(label).save(place / file(label))
    return folder


class Rule(nn.Module):
    """A network that reads the class k from the picture. Even classes it names rightly, for odd ones it says
    k + 1 and then k; but where 3 divides an odd k, k comes last.
    """

    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))

    def forward(self, images):
        digits = ((images * self.std + self.mean) * 255 / 25).round().long()[:, :, SIDE // 2, SIDE // 2]
        k = (digits * torch.tensor([1, 10, 100])).sum(1, keepdim=True)
        last = (k % 3 == 0) & (k % 2 == 1)
        logits = torch.zeros(len(images), 1000).scatter(1, k, torch.where(last, -1.0, 2.0))
        return logits.scatter(1, (k + k % 2) % 1000, 3.0)


def right_first(label, classes):
    """Whether the rule's first answer among ``classes`` is right."""
    return label % 2 == 0 or (label + 1) % 1000 not in classes and label % 3 != 0


def right_among_five(label):
    return label % 2 == 0 or label % 3 != 0
