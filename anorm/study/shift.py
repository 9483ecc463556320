"""Accuracy under shift: ImageNet-V2, -A, -R, -Sketch and -C from folders, ReaL labels; timm's class maps.

A network of ImageNet's 1,000 classes is evaluated as it is on its own images, with these differences:

    imagenet_v2       ROOT/CLASS/IMAGE, the class folders being numbers 0 to 999 (as published) or WordNet ids
    imagenet_a, _r    200 of the classes: the logits of the other 800 are left out
    imagenet_sketch   1,000 WordNet ids
    imagenet_c        ROOT[/GROUP]/CORRUPTION/SEVERITY/CLASS/IMAGE; images have their size already and are not
                      resized to eval_resize, only to image_size where they differ
    real              the own validation images (data.root) under the labels of Beyer et al. (2020), a list
                      for each image; those without a label do not count
"""

from __future__ import annotations

import json
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor, nn

from anorm.build import create_source
from anorm.config.frozen import Config
from anorm.data.index import index_folder
from anorm.data.sources.base import IMAGENET_MEAN, IMAGENET_STD, Dataset, EncodedImages
from anorm.data.sources.folder import FolderStore
from anorm.data.transforms import Crop
from anorm.engine.evaluate import Evaluator, Result
from anorm.engine.statistics import uses_batch_statistics
from anorm.words import nearest

On = Callable[[dict[str, Dataset]], Evaluator]

FOLDERS = ("imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch", "imagenet_c")
SHIFTS = (*FOLDERS, "real")
SUBSETS = {"imagenet_a": "imagenet_a_synsets.txt", "imagenet_r": "imagenet_r_synsets.txt"}  # timm's names
SEVERITIES = (1, 2, 3, 4, 5)
# AlexNet's, in percent, mean over severities: Hendrycks and Dietterich, 2019, hendrycks/robustness
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # of the "extra" archive: not in the means


def asked(words: list[str]) -> list[tuple[str, Path | None]]:
    """["imagenet_r=/data/imagenet-r", "real"] -> [(shift, place)]. Raises ValueError in words."""
    found = []
    for word in words:
        name, given, place = word.partition("=")
        if name not in SHIFTS:
            raise ValueError(f"unknown --shift {name!r}{nearest(name, SHIFTS)}")
        if name != "real" and not place:
            raise ValueError(f"--shift {word} needs a folder: --shift {name}=FOLDER")
        found.append((name, Path(place).expanduser() if given and place else None))
    return found


def synsets(name: str = "") -> list[str]:
    """The WordNet ids of a shift's classes in timm's order; without a name of all of ImageNet's."""
    file = SUBSETS.get(name, "imagenet_synsets.txt")
    return pkgutil.get_data("timm.data", f"_info/{file}").decode().split()


def check_classes(classes: list[str]) -> None:
    """Raises ValueError where a run's classes are not ImageNet's (readable names cannot be checked)."""
    if len(classes) != len(synsets()):
        raise ValueError(
            f"--shift needs a network of ImageNet's {len(synsets()):,} classes, and this one has "
            f"{len(classes)}"
        )
    if all(re.fullmatch(r"n\d{8}", name) for name in classes) and classes != synsets():
        raise ValueError(
            "--shift needs ImageNet's classes, sorted by their WordNet ids, and this network has others"
        )


def report(name: str, place: Path | None, config: Config, on: On) -> str:
    """The lines that validate.py prints for a shift. ``on``: what evaluates the network on a data set."""
    if name == "real":
        return real(place, config, on).words(config)
    if name == "imagenet_c":
        return corrupted(place, config, on).words(config)
    return shifted(name, place, config, on).words(config)


@dataclass(frozen=True)
class Shifted:
    """An evaluation on a folder of images. classes: whose logits count."""

    name: str
    folder: Path
    classes: int
    found: Result

    def words(self, config: Config) -> str:
        left_out = len(synsets()) - self.classes
        subset = f", the logits of the other {left_out} left out" if left_out else ""
        return (
            f"{self.name} ({self.folder}): top-1 {self.found['top1']:.4f} % top-5 {self.found['top5']:.4f} % loss "
            f"{self.found['loss']:.6f} ({self.found.images} images of {self.classes:,} classes{subset}; "
            f"{protocol(config)})"
        )


def shifted(name: str, folder: Path, config: Config, on: On) -> Shifted:
    """Evaluate on a folder of class folders. Raises ValueError where they are not the shift's classes."""
    classes = synsets(name)
    kept = torch.tensor([place for place, synset in enumerate(synsets()) if synset in set(classes)])
    restrict = None if len(classes) == len(synsets()) else lambda network: Restricted(network, kept)
    return Shifted(name, folder, len(classes), _evaluate(on({name: images_of(name, folder, config)}), restrict))


def images_of(name: str, folder: Path, config: Config, resize: int | None = None) -> EncodedImages:
    """The images of a folder of class folders, labelled as ImageNet's 1,000 classes are, read as configured.

    resize: short side before the crop, in place of the configuration's.
    """
    if not folder.is_dir():
        raise ValueError(f"--shift {name}: {folder} is not a folder")
    data = config.data.options
    # the archives hold a README beside the class folders
    index = index_folder(folder, "skip", data.get("cache", True))
    store = FolderStore(index)
    store.labels = _labels(name, folder, index.classes)[store.labels]
    crop = Crop(
        data.get("image_size", 224),
        resize or data.get("eval_resize"),
        data.get("interpolation", "bilinear"),
    )
    mean, std = data.get("mean", IMAGENET_MEAN), data.get("std", IMAGENET_STD)
    return EncodedImages(store, crop, data.get("on_error", "error"), data.get("loader", "torch"), mean, std)


def _labels(name: str, folder: Path, folders: list[str]) -> Tensor:
    """For each class folder its place in ImageNet's classes. Sorted as words, the number 10 follows 1."""
    every, expected = synsets(), synsets(name)
    if sorted(folders) == sorted(map(str, range(len(expected)))) and len(expected) == len(every):
        return torch.tensor([int(number) for number in folders])
    missing, unknown = sorted(set(expected) - set(folders)), sorted(set(folders) - set(expected))
    if missing or unknown:
        parts = [f"{len(missing)} missing ({_some(missing)})"] if missing else []
        parts += [f"{len(unknown)} unknown ({_some(unknown)})"] if unknown else []
        raise ValueError(
            f"{folder} does not hold the {len(expected):,} class folders of {name}: {', '.join(parts)}; "
            f"give the folder that holds folders such as {expected[0]}"
        )
    places = {synset: place for place, synset in enumerate(every)}
    return torch.tensor([places[synset] for synset in folders])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


class Restricted(nn.Module):
    """A network whose logits other than ``kept`` are minus infinity."""

    def __init__(self, network: nn.Module, kept: Tensor) -> None:
        super().__init__()
        self.network, self.kept = network, kept

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        left_out = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        left_out[self.kept.to(logits.device)] = False
        return logits.masked_fill(left_out, -torch.inf)


def _evaluate(evaluator: Evaluator, wrap: Callable[[nn.Module], nn.Module] | None = None) -> Result:
    try:
        found = evaluator(network=wrap(evaluator.model) if wrap else None, first_alone=True)
        return found[evaluator.pairs[0]]
    finally:
        evaluator.close()


@dataclass(frozen=True)
class Corrupted:
    """Top-1 and top-5 accuracy in percent of each corruption at the severities 1 to 5."""

    folder: Path
    top1: dict[str, list[float]]
    top5: dict[str, list[float]]
    images: int

    @property
    def counted(self) -> list[str]:
        """The corruptions that the means are over."""
        return [name for name in self.top1 if name in ALEXNET_ERRORS]

    @property
    def mce(self) -> float | None:
        """Mean corruption error in percent of AlexNet's; None unless all 15 corruptions are there."""
        if len(self.counted) < len(ALEXNET_ERRORS):
            return None
        return 100 * fmean((100 - fmean(self.top1[name])) / ALEXNET_ERRORS[name] for name in self.counted)

    def words(self, config: Config) -> str:
        top1, top5 = (
            fmean(v for name in self.counted for v in values[name]) for values in (self.top1, self.top5)
        )
        width = max(map(len, (*self.top1, "corruption")))
        mark = {name: "" if name in ALEXNET_ERRORS else "  not in the means" for name in self.top1}
        missing = [name for name in ALEXNET_ERRORS if name not in self.top1]
        mce = (
            f"mCE {self.mce:.2f} %: errors in percent of AlexNet's, of 224 px"
            if self.mce is not None
            else (f"mCE: not given, as {len(missing)} of 15 corruptions are missing ({_some(missing)})")
        )
        return "\n".join(
            [
                f"imagenet_c ({self.folder}): top-1 {top1:.4f} % top-5 {top5:.4f} %, mean of "
                f"{len(self.counted)} corruptions at 5 severities ({self.images} images; "
                f"{protocol(config, resized=False)})",
                f"  {'top-1 by severity':{width}}" + "".join(f"{s:8}" for s in SEVERITIES) + "    mean",
                *(
                    f"  {name:{width}}" + "".join(f"{v:8.2f}" for v in (*values, fmean(values))) + mark[name]
                    for name, values in self.top1.items()
                ),
                f"  {mce}",
            ]
        )


def corrupted(folder: Path, config: Config, on: On) -> Corrupted:
    """Evaluate on every corruption and severity of ImageNet-C that ``folder`` holds."""
    top1, top5, images = {}, {}, 0
    size = config.data.options.get("image_size", 224)
    for name, place in _corruptions(folder).items():
        found = [
            _evaluate(on({f"{name} {s}": images_of("imagenet_c", place / str(s), config, resize=size)}))
            for s in SEVERITIES
        ]
        top1[name], top5[name] = [f["top1"] for f in found], [f["top5"] for f in found]
        images += sum(f.images for f in found)
    return Corrupted(folder, top1, top5, images)


def _corruptions(folder: Path) -> dict[str, Path]:
    """Name -> folder, which may lie in a folder of its group (noise, blur, weather, digital, extra)."""
    if not folder.is_dir():
        raise ValueError(f"--shift imagenet_c: {folder} is not a folder")
    found = {}
    for name in (*ALEXNET_ERRORS, *EXTRA):
        places = [path for path in (folder / name, *sorted(folder.glob(f"*/{name}"))) if path.is_dir()]
        if places:
            found[name] = places[0]
    if not any(name in ALEXNET_ERRORS for name in found):
        raise ValueError(
            f"{folder} holds no corruption of ImageNet-C: expected folders such as gaussian_noise or "
            "noise/gaussian_noise"
        )
    for name, place in found.items():
        if missing := [s for s in SEVERITIES if not (place / str(s)).is_dir()]:
            raise ValueError(
                f"{place} lacks the severities {', '.join(map(str, missing))}: {name} has folders 1 to 5"
            )
    return found


@dataclass(frozen=True)
class Real:
    """Accuracy in percent under ReaL labels, of the images that have one, and under the original labels."""

    top1: float
    top5: float
    images: int
    original: Result

    def words(self, config: Config) -> str:
        return (
            f"real: top-1 {self.top1:.4f} % top-5 {self.top5:.4f} % of the {self.images} images with ReaL "
            f"labels; original labels: top-1 {self.original['top1']:.4f} % top-5 {self.original['top5']:.4f} % of "
            f"{self.original.images} images ({protocol(config)})"
        )


def real(labels: Path | None, config: Config, on: On) -> Real:
    """Evaluate on the own validation images under ReaL labels: a JSON file with a list of classes for each
    image in the order of the official numbers, or, for None, the one that timm ships. Raises ValueError under batch
    statistics.
    """
    source = create_source(config)
    check_classes(source.classes)
    val = source.val
    if not isinstance(val, EncodedImages) or val.on_error != "error":
        raise ValueError("--shift real needs ImageNet's validation images as files, and data.on_error=error")
    judge = _real_labels([_official(val.store.name(i)) for i in range(len(val))], labels)
    evaluator = on({"val": val})
    if evaluator.pairs[0].stats == "batch" or uses_batch_statistics(evaluator.model):
        raise ValueError(
            "--shift real hears answers in the order of the images, and where batch statistics are used images come in "
            "shuffled batches: set eval.stats=running or recalibrated"
        )
    found = _evaluate(evaluator, lambda network: Listening(network, judge.add_result))
    accuracy = judge.get_accuracy()
    return Real(accuracy[1], accuracy[5], len(judge.is_correct[1]), found)


def _official(name: str) -> str:
    """The official file name in whatever a data set calls an image."""
    number = re.search(r"ILSVRC2012_val_\d{8}", name)
    if not number:
        raise ValueError(
            f"--shift real needs the official names of the validation images, and {name} has none"
        )
    return f"{number[0]}.JPEG"


def _real_labels(names: list[str], labels: Path | None):
    from timm.data.real_labels import RealLabelsImagenet

    shown = labels or "the file of labels that timm ships"
    if labels and not labels.is_file():
        raise ValueError(f"--shift real: there is no file {labels}")
    try:
        judge = RealLabelsImagenet(names, labels and str(labels))
    except AssertionError as error:
        raise ValueError(
            f"{shown} is of another number of images than the {len(names)} to be evaluated"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{labels} is no JSON file of a list for each image: get real.json again ({error})"
        ) from error
    if unknown := sorted(set(names) - judge.real_labels.keys()):
        raise ValueError(f"{shown} has no labels for {unknown[0]}")
    if not any(judge.real_labels.values()):
        raise ValueError(f"{shown} holds no label at all")
    return judge


class Listening(nn.Module):
    """A network whose logits are also told to ``hear``, batch by batch."""

    def __init__(self, network: nn.Module, hear: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.network, self.hear = network, hear

    def forward(self, images: Tensor) -> Tensor:
        logits = self.network(images)
        self.hear(logits)
        return logits


def protocol(config: Config, resized: bool = True) -> str:
    """Under which the numbers are, for the end of their line."""
    data = config.data.options
    crop = Crop(data.get("image_size", 224), data.get("eval_resize"), data.get("interpolation", "bilinear"))
    size = f"{crop.image_size} px" + (f" of {crop.short_side}" if resized else ", not resized further")
    return (
        f"{size}, {crop.interpolation}, {config.settings.eval.all_stats[0]} statistics, {config.settings.hardware.dtype}"
    )
