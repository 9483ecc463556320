"""Domain generalization: train on some domains, evaluate on each of the others."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
import torch
from torch import Tensor

from anorm.data.augment import Augment
from anorm.data.decode import decode
from anorm.data.index import index_folder, is_service
from anorm.data.random import stream
from anorm.data.sources.base import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Absent,
    Batch,
    Dataset,
    EncodedImages,
    FetchedImages,
    LabelledImages,
    Source,
)
from anorm.data.sources.folder import FolderStore
from anorm.data.sources.published_digits import DIGITS, published_digits
from anorm.data.sources.stored import StoredImages, check_levels, content_digest, to_gray
from anorm.data.transforms import Crop
from anorm.words import nearest

SPLITS = "splits"
SELECTIONS = ("val", "test_domains")
ON_TEST = "selected_on_test"


def domains(
    root: str | Path | None = None,
    train: Sequence[str] | None = None,
    test: Sequence[str] | None = None,
    held_out: float = 0.1,
    splits: Path | Literal["auto"] | None = "auto",
    selection: str = "val",
    image_size: int = 32,
    gray: bool = False,
    crop_scale: tuple[float, float] | None = None,
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    eval_resize: int | None = None,
    interpolation: str = "bilinear",
    pad: int = 0,
    flip: bool = False,
    rotation: float = 0.0,
    autoaugment: str | None = None,
    jitter: float = 0.0,
    grayscale: float = 0.0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    on_error: str = "error",
    cache: bool = True,
    loader: str = "torch",
) -> Source:
    """Domains are the folders of ``root``: DOMAIN/CLASS/IMAGE, or DOMAIN/{train,test}/CLASS/IMAGE, or one of the published
    sets of digits (``published_digits``). Class folders must be the same in all that are used.

    train, test: lists of domains; one of them may be left out, and is then all the others. Labels of domains are not kept.
    The evaluation sets are ``val``, a part of the training domains that is not trained on and that chooses the best epoch,
    and each test domain under its name: all its images, or those of its folder ``test``.
    held_out: val's share of every class of every training domain, drawn once whatever the run's seed.
    splits: a folder of official lists, DOMAIN_train.txt, DOMAIN_crossval.txt and DOMAIN_test.txt, a line "PATH LABEL" an
    image, which take the place of held_out; "auto" for ROOT/splits where that exists, null for none.
    selection: "val", or "test_domains": the best epoch is then chosen on all images of the test domains, as a set with the
    name selected_on_test, which tables show. Such numbers are not of unseen domains.
    image_size: side in pixels. gray: one channel. crop_scale, crop_ratio: of a random resized crop; null: the whole image,
    and images are then decoded once and kept in memory. eval_resize: short side before the evaluation's centre crop
    (default: image_size). pad, flip: random shift (of whole images) and mirroring; rotation .. grayscale: see ``Augment``.
    mean, std: a value a channel (default: 0.5 for gray images, else ImageNet's).
    Where ``test`` names all domains, the source can be evaluated on and not trained on.
    Raises ValueError, in words, for unknown or overlapping domains, unlike classes and lists that do not fit the files.
    """
    if root is None:
        raise ValueError("data.root is not set: give the folder that holds a folder for each domain")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"data.root={root} is not a folder: give the one that holds a folder for each domain"
        )
    if selection not in SELECTIONS:
        raise ValueError(f"data.selection={selection} is unknown: choose val or test_domains")
    if not 0 < held_out < 1:
        raise ValueError(f"data.held_out={held_out} must be a share between 0 and 1")
    learned, tested = _chosen_domains(folder, train, test)
    lists = folder / SPLITS if splits == "auto" else Path(splits).expanduser() if splits else None
    if splits == "auto" and not lists.is_dir():
        lists = None
    found = {name: _open(folder / name, on_error, cache) for name in (*learned, *tested)}
    classes = _one_list_of_classes(found)

    parts = [_divided(folder, found[name], lists, held_out) for name in learned]
    test_parts = {name: _tested(folder, found[name], lists) for name in tested}
    channels = 1 if gray else 3
    mean = tuple(mean if mean is not None else [0.5] if gray else IMAGENET_MEAN)
    std = tuple(std if std is not None else [0.5] if gray else IMAGENET_STD)
    check_levels(mean, std, channels)
    whole = crop_scale is None
    scale, ratio = ((1.0, 1.0), (1.0, 1.0)) if whole else (tuple(crop_scale), tuple(crop_ratio))
    crop = Crop(image_size, eval_resize or image_size, interpolation, scale, ratio, flip)
    augment = Augment(rotation, autoaugment, jitter, grayscale)
    if not 0 <= pad < image_size:
        raise ValueError(f"data.pad={pad} must lie between 0 and data.image_size={image_size}")
    if pad and not whole:
        raise ValueError("data.pad shifts whole images: leave it out, or leave out data.crop_scale")

    def images(pieces: list[Part], training: bool) -> LabelledImages:
        joined = DomainImages(Joined(pieces), crop, augment, gray, mean, std, on_error, loader)
        if not whole or loader != "torch":
            return joined
        moves = {"pad": pad, "flip": flip, "augment": augment} if training else {}
        return DecodedOnce(joined, **moves)

    trained: Dataset = Absent(
        f"data.test={tested} are all domains of {folder}: without training images the network can be evaluated only"
    )
    evals = {}
    if parts:
        trained = images([part for part, _ in parts], True)
        evals = {"val": images([part for _, part in parts], False)}
    evals |= {name: images([part], False) for name, part in test_parts.items()}
    if selection == "test_domains":
        evals = {ON_TEST: images(list(test_parts.values()), False)} | evals
    identity = hashlib.blake2b(
        "".join(f"{name} {part.identity} " for name, part in {"train": trained, **evals}.items()).encode(),
        digest_size=16,
    ).hexdigest()
    return Source(trained, evals, classes, f"domains-{identity}")


# ---- which domains


def _chosen_domains(
    folder: Path, train: Sequence[str] | None, test: Sequence[str] | None
) -> tuple[list[str], list[str]]:
    known = sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not is_service(entry.name) and entry.name != SPLITS
    )
    if not known:
        raise ValueError(f"data.root={folder} holds no folders: a domain is a folder of class folders")
    if train is None and test is None:
        raise ValueError(
            f"data.train is not set: choose domains to train on, such as data.train=[{known[0]}] ({', '.join(known)})"
        )
    for key, names in (("train", train), ("test", test)):
        if names is None:
            continue
        if isinstance(names, str) or not names:
            raise ValueError(f"data.{key}={names} must be a list of domains, such as [{known[0]}]")
        for name in names:
            if name not in known:
                raise ValueError(
                    f"data.{key}: {folder} has no domain {name!r}{nearest(str(name), known, 'domains')}"
                )
        if len(set(names)) < len(names):
            raise ValueError(f"data.{key}={list(names)} names a domain twice")
    learned = list(train) if train is not None else [name for name in known if name not in test]
    tested = list(test) if test is not None else [name for name in known if name not in train]
    both = sorted(set(learned) & set(tested))
    if both:
        raise ValueError(
            f"{', '.join(both)} stand{'s' if len(both) == 1 else ''} in data.train and in data.test: a test domain must "
            "be unseen"
        )
    if not tested:
        raise ValueError(f"no domain is left for data.test: {folder} has {', '.join(known)}")
    for name in tested:
        if name in ("val", ON_TEST):
            raise ValueError(f"a test domain cannot be called {name}: rename the folder {folder / name}")
    return learned, tested


# ---- what a domain holds


class ArrayStore:
    """Decoded images, uint8 (n,3,H,W), of a published set."""

    def __init__(self, images: Tensor, labels: Tensor, title: str):
        self.images, self.labels, self.title = images, labels, title

    def pixels(self, index: int) -> Tensor:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"{self.title}: image {index}"

    def digest(self) -> str:
        return content_digest(self.images, self.labels)


@dataclass(frozen=True)
class Domain:
    """A domain as it lies on disk: its images by split, {"all": ...} or {"train": ..., "test": ...}."""

    name: str
    classes: list[str]
    stores: dict[str, FolderStore | ArrayStore]


@dataclass(frozen=True)
class Part:
    """Some images of a store."""

    store: FolderStore | ArrayStore
    indices: numpy.ndarray

    @property
    def labels(self) -> Tensor:
        return self.store.labels[torch.from_numpy(self.indices)]


def _open(folder: Path, on_error: str, cache: bool) -> Domain:
    arrays = published_digits(folder)
    if arrays is not None:
        stores = {name: ArrayStore(*found, f"{folder} {name}") for name, found in arrays.items()}
        return Domain(folder.name, DIGITS, stores)
    divided = [name for name in ("train", "test") if (folder / name).is_dir()]
    if len(divided) == 1:
        raise ValueError(
            f"{folder} has a folder {divided[0]} alone: it needs train and test, or the class folders themselves"
        )
    indices = {name: index_folder(folder / name, on_error, cache) for name in divided} or {
        "all": index_folder(folder, on_error, cache)
    }
    first = next(iter(indices.values()))
    for name, index in indices.items():
        if index.classes != first.classes:
            raise ValueError(
                f"{folder}: the class folders of train and {name} differ{_differing(first.classes, index.classes)}"
            )
    return Domain(
        folder.name, list(first.classes), {name: FolderStore(index) for name, index in indices.items()}
    )


def _one_list_of_classes(found: dict[str, Domain]) -> list[str]:
    first = next(iter(found.values()))
    for domain in found.values():
        if domain.classes != first.classes:
            raise ValueError(
                f"the domains {first.name} and {domain.name} differ in their classes"
                f"{_differing(first.classes, domain.classes)}, so their labels would not agree"
            )
    return first.classes


def _differing(a: list[str], b: list[str]) -> str:
    only = [", ".join(sorted(set(x) - set(y))[:3]) for x, y in ((a, b), (b, a))]
    return f" (only in the one: {only[0] or 'none'}; only in the other: {only[1] or 'none'})"


def _divided(folder: Path, domain: Domain, lists: Path | None, held_out: float) -> tuple[Part, Part]:
    """(what is trained on, what is held out) of a training domain."""
    store = next(iter(domain.stores.values()))  # all, or train
    if lists is not None:
        paths = [lists / f"{domain.name}_{kind}.txt" for kind in ("train", "crossval")]
        train, held = (_listed(path, folder, domain, store) for path in paths)
        twice = numpy.intersect1d(train, held)
        if len(twice):
            raise ValueError(
                f"{store.name(twice[0])} stands in {paths[0]} and in {paths[1].name}: an image is trained on or held out"
            )
        return Part(store, train), Part(store, held)
    labels, out = store.labels.numpy(), []
    for label in range(len(domain.classes)):
        members = numpy.flatnonzero(labels == label)
        if len(members) < 2:
            raise ValueError(
                f"{domain.name}/{domain.classes[label]} has {len(members)} image: one is to be held out"
            )
        draws = stream(0, f"held out of {domain.name.replace('/', ' ')}", label)
        share = min(len(members) - 1, max(1, round(held_out * len(members))))
        out.append(members[torch.randperm(len(members), generator=draws)[:share].numpy()])
    held = numpy.sort(numpy.concatenate(out))
    return Part(store, numpy.setdiff1d(numpy.arange(len(labels)), held)), Part(store, held)


def _tested(folder: Path, domain: Domain, lists: Path | None) -> Part:
    """The images that a test domain is evaluated on."""
    store = next(reversed(domain.stores.values()))  # all, or test
    if lists is not None:
        return Part(store, _listed(lists / f"{domain.name}_test.txt", folder, domain, store))
    return Part(store, numpy.arange(len(store.labels)))


def _listed(path: Path, folder: Path, domain: Domain, store: FolderStore | ArrayStore) -> numpy.ndarray:
    """The images of a list, in the order of the store. Raises ValueError for a line that does not fit the files."""
    if not isinstance(store, FolderStore):
        raise ValueError(
            f"data.splits: {domain.name} is a published set of its own split; set data.splits=null"
        )
    if not path.is_file():
        raise ValueError(f"the list {path} is missing: data.splits=null draws a held-out part instead")
    places = {os.path.relpath(store.name(i), folder): i for i in range(len(store.labels))}
    found: dict[int, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        name, _, label = line.strip().rpartition(" ")
        where = f"{path}, line {number}"
        if not name or not label.isdigit():
            raise ValueError(f"{where}: {line.strip()!r} is not 'PATH LABEL'")
        index = places.get(os.path.normpath(name))
        if index is None:
            raise ValueError(f"{where}: there is no image {folder / name}")
        if index in found:
            raise ValueError(f"{where}: {name} stands there a second time (line {found[index]})")
        if int(label) != int(store.labels[index]):
            raise ValueError(
                f"{where}: {name} has the label {label}, and its folder is class {int(store.labels[index])}, counted from 0 "
                "in the order of the names (lists that count from 1 are to be lowered by 1)"
            )
        found[index] = number
    if not found:
        raise ValueError(f"{path} lists no images")
    return numpy.array(sorted(found), dtype=numpy.int64)


# ---- images of several domains


class Joined:
    """Parts of several stores, one after another."""

    def __init__(self, parts: list[Part]):
        self.parts = parts
        self.labels = torch.cat([part.labels for part in parts])
        self.ends = numpy.cumsum([len(part.indices) for part in parts])

    def place(self, index: int) -> tuple[FolderStore | ArrayStore, int]:
        """(store, index in it) of an image."""
        k = int(numpy.searchsorted(self.ends, index, side="right"))
        start = self.ends[k - 1] if k else 0
        return self.parts[k].store, int(self.parts[k].indices[index - start])

    def read(self, index: int) -> Tensor:
        store, at = self.place(index)
        return store.read(at)

    def name(self, index: int) -> str:
        store, at = self.place(index)
        return store.name(at)

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            digest.update(part.store.digest().encode() + part.indices.tobytes())
        return digest.hexdigest()


class DomainImages(EncodedImages):
    """Images of several domains; of one channel where ``gray``; augmented after the crop, in training."""

    def __init__(
        self,
        store: Joined,
        crop: Crop,
        augment: Augment,
        gray: bool,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        on_error: str,
        loader: str,
    ):
        super().__init__(store, crop, on_error, loader)
        if augment and loader != "torch":
            raise ValueError(
                f"data.loader={loader} crops and mirrors only: rotation, autoaugment, jitter and grayscale need data.loader=torch"
            )
        self.augment, self.gray, self.mean, self.std = augment, gray, mean, std
        words = f"{self.identity} {'gray' if gray else ''}"
        self.identity = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()

    def decoded(self, index: int) -> Tensor:
        store, at = self.store.place(index)
        if isinstance(store, ArrayStore):
            return store.pixels(at)
        return decode(self.read(index), self.store.name(index))

    def _cropped(self, index: int, rng: torch.Generator) -> Tensor:
        if isinstance(self.store.place(index)[0], ArrayStore):
            pixels = self.decoded(index)
            window = self.crop.window(pixels.shape[1], pixels.shape[2], rng)
            image = self.crop.train(window.cut(pixels), window)
        else:
            image = super()._cropped(index, rng)
        return self.augment(image, rng) if self.augment else image

    def finish(
        self, fetched: FetchedImages, device: torch.device, memory_format: torch.memory_format
    ) -> Batch:
        if self.gray:
            fetched = fetched._replace(images=to_gray(fetched.images))
        return super().finish(fetched, device, memory_format)


class DecodedOnce(LabelledImages):
    """Every image as evaluation sees it, decoded when the first is asked for and kept. ``moves``: what training does to it."""

    in_memory = True

    def __init__(self, images: DomainImages, **moves):
        self.images, self.moves, self.crop = images, moves, images.crop
        self.labels, self.image_size, self.mean, self.std = (
            images.labels,
            images.image_size,
            images.mean,
            images.std,
        )
        self.identity = images.identity

    @functools.cached_property
    def stored(self) -> StoredImages:
        fetched = self.images.fetch(range(len(self.images)), None)
        if fetched.bad:
            raise ValueError(
                f"{len(fetched.bad)} images are unreadable, the first: {fetched.bad[0][1]}; data.on_error=skip needs "
                "data.crop_scale, which reads images anew in every epoch"
            )
        pixels = to_gray(fetched.images) if self.images.gray else fetched.images
        return StoredImages(pixels, fetched.labels, self.mean, self.std, identity=self.identity, **self.moves)

    def fetch(self, indices: Sequence[int], rngs: Sequence[torch.Generator] | None) -> FetchedImages:
        return self.stored.fetch(indices, rngs)


SOURCES = {"domains": domains}
