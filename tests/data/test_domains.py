"""Domains: which are chosen, what is held out, official lists, published digits, and what is refused."""

import bz2
import os

import numpy as np
import pytest
import torch
from photographs import age, picture
from PIL import Image

from anorm.data.random import stream
from anorm.data.sources import create

CLASSES = ("dog", "horse")


def write_domain(folder, seed, count=5, classes=CLASSES):
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(100 * seed + 10 * label + i, 40, 40)).save(folder / name / f"{i}.png")


@pytest.fixture
def root(tmp_path):
    """Three domains of ten images."""
    for seed, name in enumerate(("art", "photo", "sketch")):
        write_domain(tmp_path / "set" / name, seed)
    age(tmp_path / "set")
    return tmp_path / "set"


def paths(dataset, root):
    images = getattr(dataset, "images", dataset)
    return [os.path.relpath(images.store.name(i), root) for i in range(len(dataset))]


def error(root, **options):
    with pytest.raises(ValueError) as caught:
        create("domains", root=str(root), **options)
    return str(caught.value)


def test_the_rest_is_tested_and_a_part_of_the_training_domains_selects(root):
    source = create("domains", root=str(root), train=["photo"], held_out=0.2)
    assert source.classes == list(CLASSES)
    assert list(source.evals) == ["val", "art", "sketch"]
    trained, held = paths(source.train, root), paths(source.val, root)
    assert len(trained) == 8 and len(held) == 2 and not set(trained) & set(held)
    assert sorted(source.val.labels.tolist()) == [0, 1]
    assert all(path.startswith("photo/") for path in trained + held)
    assert paths(source.evals["art"], root) == [f"art/{c}/{i}.png" for c in CLASSES for i in range(5)]
    assert source.evals["art"].labels.tolist() == [0] * 5 + [1] * 5
    # the split is the data's: neither the run nor the other domains change it
    both = create("domains", root=str(root), test=["art"], held_out=0.2)
    assert list(both.evals) == ["val", "art"] and len(both.train) == 16
    assert set(held) <= set(paths(both.val, root))


def test_images_labels_and_crops_are_those_of_the_files(root):
    source = create("domains", root=str(root), train=["photo"], image_size=40)
    fetched = source.evals["sketch"].fetch([6], None)
    assert np.array_equal(
        fetched.images[0].permute(1, 2, 0), np.asarray(Image.open(root / "sketch/horse/1.png"))
    )
    cropped = create(
        "domains",
        root=str(root),
        train=["photo"],
        image_size=24,
        crop_scale=[0.3, 0.6],
        flip=True,
        jitter=0.4,
    ).train
    a, b, c = (cropped.fetch([3], [stream(0, "augment", e, 3)]).images for e in (0, 0, 1))
    assert a.shape == (1, 3, 24, 24) and torch.equal(a, b) and not torch.equal(a, c)
    assert not cropped.in_memory and source.train.in_memory


def test_gray_images_have_one_channel(root):
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    options = {"train": ["photo"], "image_size": 40, "gray": True}
    gray = create("domains", root=str(root), **options).val
    colour = create("domains", root=str(root), **options | {"gray": False}).val
    found = gray.fetch([0, 1], None).images
    assert found.shape == (2, 1, 40, 40)
    expected = rgb_to_grayscale(colour.fetch([0, 1], None).images)
    assert (
        found.int() - expected.int()
    ).abs().max() <= 1  # torchvision's weights have four digits and it cuts off
    # a feed that crops anew in every epoch gives three channels, made gray on the device
    cropped = create("domains", root=str(root), **options, crop_scale=[0.5, 1.0])
    batch = cropped.val.finish(cropped.val.fetch([0, 1], None), torch.device("cpu"), torch.contiguous_format)
    plain = (found.float() / 255 - 0.5) / 0.5
    assert batch.inputs.shape == (2, 1, 40, 40) and torch.allclose(batch.inputs, plain, atol=1e-6)


def test_selection_on_test_domains_has_a_name_that_says_so(root):
    source = create("domains", root=str(root), train=["photo"], selection="test_domains")
    assert list(source.evals) == ["selected_on_test", "val", "art", "sketch"]
    assert sorted(paths(source.val, root)) == sorted(
        paths(source.evals["art"], root) + paths(source.evals["sketch"], root)
    )
    assert "data.selection=oracle is unknown" in error(root, train=["photo"], selection="oracle")


def test_wrong_domains_are_said(root):
    assert "has no domain 'foto': did you mean photo" in error(root, train=["foto"])
    assert "photo stands in data.train and in data.test" in error(
        root, train=["photo", "art"], test=["photo"]
    )
    assert (
        "data.train is not set: choose domains to train on, such as data.train=[art] (art, photo, sketch)"
        in error(root)
    )
    assert "no domain is left for data.test" in error(root, train=["photo", "art", "sketch"])
    assert "names a domain twice" in error(root, train=["photo", "photo"])
    assert "data.test=[] must be a list of domains" in error(root, train=["photo"], test=[])
    assert "data.held_out=1.0" in error(root, train=["photo"], held_out=1.0)
    assert "is not a folder" in error(root / "nowhere", train=["photo"])
    (root / "val").mkdir()
    assert "cannot be called val" in error(root, train=["photo"])


def test_class_sets_that_differ_are_said(root):
    write_domain(root / "cartoon", 7, classes=("dog", "house"))
    words = error(root, train=["photo"])
    assert "the domains photo and cartoon differ in their classes" in words
    assert "only in the one: horse; only in the other: house" in words
    create("domains", root=str(root), train=["photo"], test=["art"])  # unused domains are not looked into


def test_domains_with_a_split_of_their_own(tmp_path):
    for seed, name in enumerate(("clean", "dirty")):
        write_domain(tmp_path / name / "train", seed, count=6)
        write_domain(tmp_path / name / "test", 10 + seed, count=2)
    source = create("domains", root=str(tmp_path), train=["clean"])
    assert len(source.train) == 10 and len(source.val) == 2 and len(source.evals["dirty"]) == 4
    assert all(
        path.startswith("clean/train/")
        for path in paths(source.train, tmp_path) + paths(source.val, tmp_path)
    )
    assert all(path.startswith("dirty/test/") for path in paths(source.evals["dirty"], tmp_path))
    import shutil

    shutil.rmtree(tmp_path / "dirty" / "test")
    assert "dirty has a folder train alone" in error(tmp_path, train=["clean"])


# ---- official lists


@pytest.fixture
def lists(root):
    (root / "splits").mkdir()
    for name in ("art", "photo", "sketch"):
        lines = [f"{name}/{c}/{i}.png {label}\n" for label, c in enumerate(CLASSES) for i in range(5)]
        (root / "splits" / f"{name}_train.txt").write_text("".join(lines[:4] + lines[5:9]))
        (root / "splits" / f"{name}_crossval.txt").write_text(lines[4] + lines[9])
        (root / "splits" / f"{name}_test.txt").write_text("".join(reversed(lines)))
    return root / "splits"


def test_official_lists_take_the_place_of_the_seeded_split(root, lists):
    source = create("domains", root=str(root), train=["photo"])
    assert paths(source.val, root) == ["photo/dog/4.png", "photo/horse/4.png"]
    assert len(source.train) == 8 and len(source.evals["art"]) == 10
    assert source.evals["art"].labels.tolist() == [0] * 5 + [1] * 5
    assert len(create("domains", root=str(root), train=["photo"], splits=None, held_out=0.4).val) == 4


def test_wrong_lists_are_said_with_their_line(root, lists):
    def after(name, text):
        before = (lists / name).read_text()
        (lists / name).write_text(text(before))
        words = error(root, train=["photo"])
        (lists / name).write_text(before)
        return words

    assert "photo_train.txt, line 9: there is no image" in after(
        "photo_train.txt", lambda t: t + "photo/dog/77.png 0\n"
    )
    assert "line 9: 'photo/dog/0.png' is not 'PATH LABEL'" in after(
        "photo_train.txt", lambda t: t + "photo/dog/0.png\n"
    )
    words = after("photo_crossval.txt", lambda t: t.replace(" 1", " 2").replace(" 0", " 1"))
    assert "photo_crossval.txt, line 1: photo/dog/4.png has the label 1, and its folder is class 0" in words
    assert "lists that count from 1 are to be lowered by 1" in words
    words = after("photo_crossval.txt", lambda t: t + "photo/dog/0.png 0\n")
    assert "0.png stands in" in words and "photo_crossval.txt" in words
    assert "a second time (line 1)" in after("art_test.txt", lambda t: t + t.splitlines()[0] + "\n")
    assert "lists no images" in after("art_test.txt", lambda t: "\n")
    (lists / "sketch_test.txt").unlink()
    assert "sketch_test.txt is missing: data.splits=null" in error(root, train=["photo"])


# ---- digits as they are published


def idx(kind, array):
    header = bytes([0, 0, kind, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


@pytest.fixture
def published(tmp_path):
    """The four formats, twenty training and ten test images each; the pixels tell set, split and number apart."""
    made = {}
    for number, name in enumerate(("mnist", "usps", "svhn", "mnist_m")):
        (tmp_path / name).mkdir()
        for part, count in (("train", 20), ("test", 10)):
            rng = np.random.default_rng([number, count])
            size = {"mnist": (28, 28), "usps": (16, 16)}.get(name, (32, 32, 3))
            made[name, part] = rng.integers(0, 256, (count, *size), dtype=np.uint8), np.arange(count) % 10
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, published_as in (("train", "train"), ("test", "t10k")):
        images, labels = made["mnist", part]
        (raw / f"{published_as}-images-idx3-ubyte").write_bytes(idx(8, images))
        (raw / f"{published_as}-labels-idx1-ubyte").write_bytes(idx(8, labels.astype(np.uint8)))
        images, labels = made["usps", part]
        lines = []
        for image, label in zip(images, labels, strict=True):
            values = " ".join(f"{k + 1}:{v / 255 * 2 - 1:.9f}" for k, v in enumerate(image.flatten()))
            lines.append(f"{label + 1} {values}\n")
        (tmp_path / "usps" / ("usps.bz2" if part == "train" else "usps.t.bz2")).write_bytes(
            bz2.compress("".join(lines).encode())
        )
        images, labels = made["svhn", part]
        from scipy.io import savemat

        ten = np.where(labels == 0, 10, labels)[:, None].astype(np.uint8)
        savemat(tmp_path / "svhn" / f"{part}_32x32.mat", {"X": images.transpose(1, 2, 3, 0), "y": ten})
        images, labels = made["mnist_m", part]
        (tmp_path / "mnist_m" / f"mnist_m_{part}").mkdir()
        lines = []
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(tmp_path / "mnist_m" / f"mnist_m_{part}" / f"{i:08d}.png")
            lines.append(f"{i:08d}.png {label}\n")
        (tmp_path / "mnist_m" / f"mnist_m_{part}_labels.txt").write_text("".join(lines))
    return tmp_path, made


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision compares SVHN's checksums with those of the published files."""
    monkeypatch.setattr(
        "torchvision.datasets.svhn.check_integrity", lambda path, md5=None: os.path.isfile(path)
    )


def test_published_digits_are_read_as_they_are(published, unchecked):
    root, made = published
    for name, size in (("mnist", 28), ("usps", 16), ("svhn", 32), ("mnist_m", 32)):
        others = [other for other in ("mnist", "usps", "svhn", "mnist_m") if other != name][:1]
        source = create("domains", root=str(root), train=others, test=[name], image_size=size)
        assert source.classes == [str(d) for d in range(10)]
        fetched = source.evals[name].fetch(range(10), None)
        images, labels = made[name, "test"]
        images = images if images.ndim == 4 else np.repeat(images[..., None], 3, -1)
        # USPS is published as -1 .. 1, which torchvision rounds down
        assert np.abs(fetched.images.permute(0, 2, 3, 1).numpy().astype(int) - images).max() <= (
            1 if name == "usps" else 0
        )
        assert fetched.labels.tolist() == labels.tolist()
        source = create("domains", root=str(root), train=[name], image_size=size, held_out=0.4)
        assert len(source.train) == len(source.val) == 10  # of two a class one is held out


def test_broken_published_digits_are_said(published, unchecked):
    root, _ = published
    (root / "mnist_m" / "mnist_m_test_labels.txt").write_text("00000000.png seven\n")
    assert "mnist_m_test_labels.txt, line 1: '00000000.png seven' is not 'NAME LABEL'" in error(
        root, train=["mnist"], test=["mnist_m"]
    )
    (root / "usps" / "usps.t.bz2").unlink()
    assert "usps has usps.bz2 but not the whole set, or a broken file" in error(
        root, train=["mnist"], test=["usps"]
    )
    (root / "mnist" / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01")
    assert "mnist has MNIST/raw but not the whole set" in error(root, train=["mnist"], test=["svhn"])


def test_mnist_is_also_found_beside_its_archives(tmp_path):
    """The idx files themselves, under the names of the archives."""
    for name in ("mnist", "other"):
        (tmp_path / name).mkdir()
        for part, count in (("train", 20), ("t10k", 10)):
            images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
            (tmp_path / name / f"{part}-images.idx3-ubyte").write_bytes(idx(8, images))
            (tmp_path / name / f"{part}-labels.idx1-ubyte").write_bytes(
                idx(8, (np.arange(count) % 10).astype(np.uint8))
            )
    source = create("domains", root=str(tmp_path), train=["mnist"], image_size=28)
    assert np.array_equal(source.evals["other"].fetch(range(10), None).images[:, 0], images)


def test_all_domains_can_be_tested_without_one_to_train_on(root):
    source = create("domains", root=str(root), test=["art", "photo", "sketch"])
    assert list(source.evals) == ["art", "photo", "sketch"] and source.classes == list(CLASSES)
    with pytest.raises(ValueError, match="are all domains of .*evaluated only"):
        len(source.train)
