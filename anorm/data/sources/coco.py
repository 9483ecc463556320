"""Detection data in COCO's format: instances JSON with polygons, run lengths and crowds, and a folder of images."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor

from anorm.data.decode import BadImage, decode
from anorm.data.scenes import Resize, Scenes
from anorm.data.sources.base import ON_ERROR, Source
from anorm.files import file_digest

__all__ = ["SOURCES", "Annotations", "CocoScenes", "coco", "read_annotations"]

_log = logging.getLogger(__name__)

RESIZE_OF = {"legacy": "opencv"}
"""How the images of a geometry are resized; antialiased for the others."""
LISTED = 5


@dataclass
class Annotations:
    """A JSON file, checked. images: those that can be used, by the order of their ids. objects: their annotations, pickled
    each, as millions of Python objects would be copied into every worker. names: of the categories, by the order of ids.

    problems: what is wrong, one message each. small: how many annotations are under one pixel wide or high: training
    passes over them as MMDetection did, evaluation counts them.
    """

    file: Path
    images: list[dict]
    objects: list[bytes]
    categories: list[int]
    names: list[str]
    problems: list[str] = field(default_factory=list)
    small: int = 0

    def __len__(self) -> int:
        return len(self.images)

    def of(self, index: int) -> list[dict]:
        """The annotations of an image."""
        return pickle.loads(self.objects[index])


def read_annotations(file: Path, folder: Path) -> Annotations:
    """Read and check an instances JSON; whatever is wrong is left out and named in ``problems``.

    Raises ValueError for a file that is not of this format at all.
    """
    content = _read(file)
    categories = sorted(content["categories"], key=lambda c: c["id"])
    found = Annotations(file, [], [], [c["id"] for c in categories], [str(c["name"]) for c in categories])
    if len(set(found.categories)) != len(found.categories):
        raise ValueError(f"{file}: two categories have one id")
    images = _images(content["images"], folder, found.problems)
    objects: dict[int, list[dict]] = {number: [] for number in images}
    known, ids = set(found.categories), set()
    listed = {image.get("id") for image in content["images"]}
    for annotation in content["annotations"]:
        number = annotation.get("id")
        what = f"{file.name}: annotation {number} of image {annotation.get('image_id')}"
        if number in ids:
            found.problems.append(f"{what}: an annotation of this id stands before it")
            continue
        ids.add(number)
        image = images.get(annotation.get("image_id"))
        if image is None:
            if annotation.get("image_id") not in listed:
                found.problems.append(f"{what}: there is no such image")
            continue
        problem = _problem(annotation, image, known)
        if problem:
            found.problems.append(f"{what} ({image['file_name']}): {problem}")
        else:
            found.small += min(annotation["bbox"][2:]) < 1
            objects[image["id"]].append(annotation)
    for number in sorted(images):
        found.images.append(images[number])
        found.objects.append(pickle.dumps(objects[number]))
    return found


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no file {file}: data.root wants a folder with annotations in it"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON, or was cut off: {error}") from error
    missing = [
        key
        for key in ("images", "annotations", "categories")
        if not isinstance(content, dict) or key not in content
    ]
    if missing:
        raise ValueError(f"{file} has no {', '.join(missing)}: it is not in COCO's format")
    return content


def _images(entries: list[dict], folder: Path, problems: list[str]) -> dict[int, dict]:
    """Id -> entry of the images whose files are there."""
    try:
        files = {entry.name for entry in os.scandir(folder)}
    except OSError as error:
        raise ValueError(f"the folder of images {folder} cannot be read ({error.strerror})") from error
    images: dict[int, dict] = {}
    names: dict[str, int] = {}
    for image in entries:
        number, name = image.get("id"), image.get("file_name")
        what = f"image {number} ({name})"
        if number in images:
            problems.append(f"{what}: an image of this id stands before it")
        elif name in names:
            problems.append(f"{what}: image {names[name]} is the same file")
        elif name not in files and not (folder / str(name)).is_file():
            problems.append(f"{what}: {folder / str(name)} does not exist")
        elif not all(isinstance(image.get(side), int) and image[side] > 0 for side in ("height", "width")):
            problems.append(
                f"{what}: height {image.get('height')} and width {image.get('width')} are no size"
            )
        else:
            images[number], names[name] = image, number
    return images


def _problem(annotation: dict, image: dict, categories: set[int]) -> str | None:
    """What is wrong with an annotation, in words."""
    box = annotation.get("bbox")
    if annotation.get("category_id") not in categories:
        return f"there is no category {annotation.get('category_id')}"
    if not isinstance(box, list) or len(box) != 4 or not all(_finite(side) for side in box):
        return f"its box {box} is not x, y, width, height"
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return f"its box {box} is empty"
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return f"its box {box} lies outside the image of {image['width']} x {image['height']}"
    shape = annotation.get("segmentation")
    if isinstance(shape, list):
        if not shape:
            return "it has no polygon"
        for polygon in shape:
            if not isinstance(polygon, list) or len(polygon) % 2 or len(polygon) < 6:
                return "a polygon of it has less than three points"
            if not all(_finite(value) for value in polygon):
                return "a polygon of it is not of numbers"
    elif isinstance(shape, dict):
        if shape.get("size") != [image["height"], image["width"]]:
            return f"its mask is of {shape.get('size')}, the image of {[image['height'], image['width']]}"
        counts = shape.get("counts")
        if isinstance(counts, list) and sum(counts) != image["height"] * image["width"]:
            return "its run lengths do not fill the image"
    else:
        return "it has neither polygons nor run lengths"
    return None


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


class CocoScenes(Scenes):
    """The images of one split.

    training: only images of at least 32 pixels with something to learn from (crowds are not), unless ``empty``.
    """

    def __init__(
        self,
        annotations: Annotations,
        folder: Path,
        resize: Resize,
        flip: float,
        training: bool,
        empty: bool,
        on_error: str,
        semantic: Path | None,
        identity: str,
    ) -> None:
        self.annotations, self.folder, self.semantic = annotations, folder, semantic
        self.training = training
        self.kept = [
            i
            for i, image in enumerate(annotations.images)
            if not training
            or (
                min(image["height"], image["width"]) >= 32
                and (empty or any(map(learnable, annotations.of(i))))
            )
        ]
        if not self.kept:
            raise ValueError(f"{annotations.file}: no image is left to use")
        sizes = [(annotations.images[i]["height"], annotations.images[i]["width"]) for i in self.kept]
        super().__init__(resize, flip, torch.tensor(sizes), on_error)
        self.categories = annotations.categories
        self.identity = identity

    def read(self, index: int, masks: bool):
        entry, annotations = self._entry(index)
        image, height, width = (
            decoded(entry, self.folder, self.annotations.file),
            entry["height"],
            entry["width"],
        )
        label = {category: i + 1 for i, category in enumerate(self.categories)}
        used = [a for a in annotations if learnable(a)] if self.training else annotations
        boxes = torch.tensor([a["bbox"] for a in used], dtype=torch.float64).reshape(-1, 4)
        labels = torch.tensor([label[a["category_id"]] for a in used], dtype=torch.int64)
        bitmaps = None
        if masks:
            bitmaps = (
                torch.stack([bitmap(a, height, width) for a in used])
                if used
                else torch.zeros(0, height, width)
            )
            bitmaps = bitmaps.to(torch.uint8)
        return image, boxes, labels, bitmaps, self._semantic(entry) if self.training else None

    def truth(self, index: int) -> tuple[dict, list[dict]]:
        return self._entry(index)

    def _entry(self, index: int) -> tuple[dict, list[dict]]:
        return self.annotations.images[self.kept[index]], self.annotations.of(self.kept[index])

    def _semantic(self, entry: dict) -> Tensor | None:
        if self.semantic is None:
            return None
        path = self.semantic / Path(entry["file_name"]).with_suffix(".png").name
        from PIL import Image

        encoded = _bytes(path)
        with Image.open(io.BytesIO(encoded.numpy().tobytes())) as picture:
            found = torch.from_numpy(numpy.array(picture))
        if found.shape != (entry["height"], entry["width"]):
            raise BadImage(f"{path} is of {tuple(found.shape)}, its image {entry['id']} of another size")
        return found


def decoded(entry: dict, folder: Path, file: Path) -> Tensor:
    """The image of an entry, uint8 (3,H,W). Raises BadImage, also where its size is not the entry's."""
    path, height, width = folder / entry["file_name"], entry["height"], entry["width"]
    image = decode(_bytes(path), str(path))
    if tuple(image.shape[1:]) != (height, width):
        raise BadImage(
            f"{path} (image {entry['id']}) is of {image.shape[2]} x {image.shape[1]} pixels, and of {width} x {height} "
            f"in {file.name}"
        )
    return image


def learnable(annotation: dict) -> bool:
    """Whether a detector trains on it: no crowd, not to be ignored, with an area, at least one pixel wide and high."""
    marked = annotation.get("iscrowd") or annotation.get("ignore")
    return not marked and annotation.get("area", 1) > 0 and min(annotation["bbox"][2:]) >= 1


def bitmap(annotation: dict, height: int, width: int) -> Tensor:
    """An annotation's polygons or run lengths -> mask (H,W) of bool."""
    from pycocotools import mask as coder

    shape = annotation["segmentation"]
    if isinstance(shape, list):
        rle = coder.merge(coder.frPyObjects(shape, height, width))
    else:
        rle = coder.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
    with warnings.catch_warnings():
        # pycocotools 2.0.11 with numpy 2: its array type lacks an argument that numpy asks for
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.from_numpy(coder.decode(rle).astype(bool))


def _bytes(path: Path) -> Tensor:
    try:
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise BadImage(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or 'it is empty'})"
        ) from error


def place_of(root: Path, split: str) -> tuple[Path, Path]:
    """The file of annotations and the folder of images of a split."""
    places = [root / split, root / "images" / split]
    folder = next((place for place in places if place.is_dir()), places[0])
    return root / "annotations" / f"instances_{split}.json", folder


def coco(
    root: str | Path,
    train: str = "train2017",
    val: str = "val2017",
    short_side: int = 800,
    long_side: int = 1333,
    resize: str | None = None,
    flip: float = 0.5,
    empty: bool = False,
    on_error: str = "error",
    geometry: str | None = None,
    semantic_classes: int | None = None,
) -> Source:
    """ROOT/annotations/instances_SPLIT.json and ROOT/SPLIT (or ROOT/images/SPLIT) for two splits.

    resize: "antialias" or "opencv"; None: as the geometry says (legacy: opencv). empty: train on images without objects
    too. on_error: "error", or "skip" what is wrong (it is counted and listed). geometry, semantic_classes: the task's;
    with semantic_classes ROOT/stuffthingmaps/SPLIT holds a PNG for each training image.

    Raises ValueError for anything wrong with the files, naming file and id.
    """
    if on_error not in ON_ERROR:
        raise ValueError(
            f"data.on_error={on_error!r} is unknown: choose error (stop) or skip (count and list)"
        )
    for name, value in (("short_side", short_side), ("long_side", long_side)):
        if value < 32:
            raise ValueError(f"data.{name}={value} must be at least 32 pixels")
    sized = Resize(short_side, long_side, resize or RESIZE_OF.get(geometry, "antialias"))
    sets = []
    for number, split in enumerate((train, val)):
        file, folder = place_of(Path(root).expanduser(), split)
        found = read_annotations(file, folder)
        if found.problems and on_error == "error":
            raise ValueError(
                f"{file}: {len(found.problems)} things are wrong; mend them, or pass over them with data.on_error=skip "
                f"(python tools/check_coco.py {root} lists all):\n  " + "\n  ".join(found.problems[:LISTED])
            )
        for problem in found.problems[:LISTED]:
            _log.warning("passed over: %s", problem)
        if len(found.problems) > LISTED:
            _log.warning("passed over: %d more in %s", len(found.problems) - LISTED, file)
        training = number == 0
        semantic = Path(root) / "stuffthingmaps" / split if semantic_classes and training else None
        if semantic is not None and not semantic.is_dir():
            raise ValueError(
                f"there is no folder {semantic}: get COCO's stuffthingmaps, or set task.semantic_classes=0"
            )
        identity = f"{file_digest(file)}-{len(found)}-{on_error}"
        sets.append(
            CocoScenes(
                found, folder, sized, flip if training else 0.0, training, empty, on_error, semantic, identity
            )
        )
    first, second = (scenes.annotations for scenes in sets)
    if (first.categories, first.names) != (second.categories, second.names):
        raise ValueError(f"{first.file} and {second.file} have different categories")
    return Source(sets[0], {"val": sets[1]}, first.names, f"{sets[0].identity}-{sets[1].identity}")


SOURCES = {"coco": coco}
