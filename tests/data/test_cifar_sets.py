"""CIFAR as torchvision downloads it and as class folders; held-out images; corrupted sets."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from photographs import age
from PIL import Image
from torchvision import datasets

from anorm.data.corruptions import corrupt
from anorm.data.random import stream
from anorm.data.sources import create

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def pictures(count, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10


@pytest.fixture
def folders(tmp_path):
    """Four training and two test images a class as PNG files."""
    for split, count, seed in (("train", 40, 0), ("test", 20, 1)):
        for i, (image, label) in enumerate(zip(*pictures(count, seed), strict=True)):
            place = tmp_path / "cifar" / split / NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i:03d}.png")
    age(tmp_path / "cifar")
    return tmp_path / "cifar"


@pytest.fixture
def unpacked(tmp_path, monkeypatch):
    """The same images as torchvision unpacks them. Only the published checksums are set to those of our files."""
    folder = tmp_path / "published" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    (images, labels), (test, test_labels) = pictures(40, 0), pictures(20, 1)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return name, hashlib.md5(data).hexdigest()

    def batch(rows, of):
        return {"data": rows.transpose(0, 3, 1, 2).reshape(len(rows), -1), "labels": of.tolist()}

    train = [
        write(f"data_batch_{k + 1}", batch(images[8 * k : 8 * k + 8], labels[8 * k : 8 * k + 8]))
        for k in range(5)
    ]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [list(entry) for entry in train])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [list(write("test_batch", batch(test, test_labels)))])
    name, digest = write("batches.meta", {"label_names": NAMES})
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": digest})
    return folder.parent


def by_content(dataset):
    fetched = dataset.fetch(range(len(dataset)), None)
    return sorted(
        (image.numpy().tobytes(), int(label))
        for image, label in zip(fetched.images, fetched.labels, strict=True)
    )


def test_both_layouts_hold_the_same_images_and_labels(folders, unpacked):
    of_folders, of_torchvision = create("cifar10", root=str(folders)), create("cifar10", root=str(unpacked))
    assert of_folders.classes == of_torchvision.classes == NAMES
    assert list(of_folders.evals) == list(of_torchvision.evals) == ["test"]
    assert by_content(of_folders.train) == by_content(of_torchvision.train)
    assert by_content(of_folders.val) == by_content(of_torchvision.val)
    images, labels = pictures(20, 1)
    fetched = of_torchvision.val.fetch(range(20), None)
    assert (
        np.array_equal(fetched.images.permute(0, 2, 3, 1), images)
        and fetched.labels.tolist() == labels.tolist()
    )


def test_held_out_images_are_of_every_class_and_not_trained_on(folders):
    source = create("cifar10", root=str(folders), held_out=10)
    assert list(source.evals) == ["val", "test"] and len(source.train) == 30
    assert sorted(source.val.labels.tolist()) == list(range(10))
    held, trained = (set(by_content(part)) for part in (source.val, source.train))
    assert not held & trained and held | trained == set(
        by_content(create("cifar10", root=str(folders)).train)
    )
    assert source.identity == create("cifar10", root=str(folders), held_out=10).identity
    for wrong in (5, 40, -10):
        with pytest.raises(ValueError, match=f"data.held_out={wrong} must be a multiple of the 10 classes"):
            create("cifar10", root=str(folders), held_out=wrong)


def test_training_shifts_by_up_to_pad_and_mirrors(folders):
    train = create("cifar10", root=str(folders)).train
    still = torch.nn.functional.pad(train.fetch([7], None).images[0], (4,) * 4)
    seen = set()
    for i in range(400):
        image = train.fetch([7], [stream(0, "augment", i, 7)]).images[0]
        found = [
            (row, column, mirrored)
            for row in range(9)
            for column in range(9)
            for mirrored in (False, True)
            if torch.equal(
                still[:, row : row + 32, column : column + 32].flip(-1)
                if mirrored
                else still[:, row : row + 32, column : column + 32],
                image,
            )
        ]
        assert len(found) == 1
        seen.add(found[0])
    # of 162 equally likely places 400 draws leave 162 (161/162)^400 = 14 unseen on average, standard deviation below 4
    assert len(seen) > 130
    alone = train.fetch([3], [stream(0, "augment", 9, 3)]).images[0]
    assert torch.equal(train.fetch([7, 3], [stream(0, "augment", 9, i) for i in (7, 3)]).images[1], alone)


def test_colour_steps_depend_on_their_own_stream_and_leave_the_global_one(folders):
    train = create(
        "cifar10", root=str(folders), rotation=15, autoaugment="cifar10", jitter=0.4, grayscale=0.5
    ).train
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = (train.fetch([7], [stream(0, "augment", epoch, 7)]).images for epoch in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c) and a.dtype == torch.uint8
    assert torch.equal(torch.get_rng_state(), before)
    plain = create("cifar10", root=str(folders), pad=0, flip=False, grayscale=1.0).train
    gray = plain.fetch([7], [stream(0, "augment", 0, 7)]).images[0]
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"autoaugment": "cifar"}, "did you mean cifar10"),
        ({"jitter": 2.0}, "data.jitter"),
        ({"rotation": -1.0}, "data.rotation"),
        ({"pad": 32}, "data.pad"),
        ({"std": [0, 1, 1]}, "data.std"),
        ({"corruptions": ["fog"]}, "data.corrupted"),
    ],
)
def test_impossible_options_are_said(folders, options, words):
    with pytest.raises(ValueError, match=words):
        create("cifar10", root=str(folders), **options)


def test_missing_and_broken_files_are_said_with_the_command_that_fetches_them(folders, unpacked, tmp_path):
    with pytest.raises(ValueError, match="data.root is not set"):
        create("cifar10")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"neither cifar-10-batches-py nor .*(?s:.)*CIFAR10\('.*empty', download=True\)"
    ):
        create("cifar10", root=str(tmp_path / "empty"))
    (unpacked / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"CIFAR10 that cannot be read(?s:.)*download=True"):
        create("cifar10", root=str(unpacked))
    with pytest.raises(ValueError, match="10 class folders; CIFAR-100 has 100"):
        create("cifar100", root=str(folders))
    Image.new("RGB", (31, 32)).save(folders / "test" / "cat" / "small.png")
    with pytest.raises(ValueError, match="small.png is 32 x 31 pixels"):
        create("cifar10", root=str(folders))


# ---- corrupted sets


def test_corruptions_made_here_are_ninety_five_sets_with_a_name_that_says_so(folders):
    source = create("cifar10", root=str(folders), corrupted="like")
    names = list(source.evals)
    assert len(names) == 96 and names[0] == "test"
    assert all(name.startswith("cifar10_c_like-") for name in names[1:])
    assert len({dataset.identity for dataset in source.evals.values()}) == 96
    fetched = source.evals["cifar10_c_like-fog-4"].fetch([3, 11], None)
    clean = source.val.fetch([3, 11], None)
    assert torch.equal(fetched.images, corrupt(clean.images, "fog", 4, [3, 11]))
    assert torch.equal(fetched.labels, clean.labels)


def test_some_corruptions_severities_and_images_can_be_chosen(folders):
    options = {
        "corrupted": "like",
        "corruptions": ["fog", "snow"],
        "severities": [1, 5],
        "corrupted_images": 7,
    }
    source = create("cifar10", root=str(folders), **options)
    assert list(source.evals)[1:] == [f"cifar10_c_like-{n}-{s}" for n in ("fog", "snow") for s in (1, 5)]
    sets = [source.evals[name] for name in list(source.evals)[1:]]
    assert all(len(found) == 7 and torch.equal(found.chosen, sets[0].chosen) for found in sets)
    for wrong, words in (
        ({"corruptions": ["fogg"]}, "did you mean fog"),
        ({"severities": [6]}, "data.severities"),
        ({"corrupted_images": 21}, "data.corrupted_images=21"),
        ({"corrupted": str(folders / "nowhere")}, "is not a folder: give the one that holds CIFAR-10-C"),
    ):
        with pytest.raises(ValueError, match=words):
            create("cifar10", root=str(folders), **options | wrong)


@pytest.fixture
def npy(tmp_path):
    """Two corruptions of four images in the published layout: the rows of severity 1 first, labels five times."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for name, seed in (("fog", 2), ("snow", 3)):
        np.save(folder / f"{name}.npy", pictures(20, seed)[0])
    np.save(folder / "labels.npy", np.tile(np.array([3, 1, 4, 1], dtype=np.uint8), 5))
    return folder


def test_published_arrays_are_read_a_severity_at_a_time(folders, npy):
    source = create("cifar10", root=str(folders), corrupted=str(npy), corruptions=["fog", "snow"])
    assert len(source.evals) == 11
    found = source.evals["cifar10_c-snow-2"].fetch([0, 3], None)
    assert np.array_equal(found.images.permute(0, 2, 3, 1), pictures(20, 3)[0][[4, 7]])
    assert found.labels.tolist() == [3, 1]


def test_broken_arrays_are_said(folders, npy):
    def error(**options):
        with pytest.raises(ValueError) as caught:
            create(
                "cifar10", root=str(folders), corrupted=str(npy), **{"corruptions": ["fog", "snow"]} | options
            )
        return str(caught.value)

    assert "lacks gaussian_noise.npy, shot_noise.npy, impulse_noise.npy and 14 more of CIFAR-10-C" in error(
        corruptions=None
    )
    whole = (npy / "snow.npy").read_bytes()
    (npy / "snow.npy").write_bytes(whole[:1000])
    assert "snow.npy is not a whole npy file" in error()
    (npy / "snow.npy").write_bytes(b"")
    assert "snow.npy is not a whole npy file" in error()
    np.save(npy / "snow.npy", pictures(19, 3)[0])
    assert "holds uint8 [19, 32, 32, 3]; of 20 labels it must be uint8 [20, 32, 32, 3]" in error()
    np.save(npy / "snow.npy", pictures(20, 3)[0].astype(np.float32))
    assert "holds float32" in error()
    np.save(npy / "labels.npy", np.tile(np.array([3, 10]), 5))
    assert "labels.npy must hold five times the labels of the test images, 0 to 9" in error()


def test_a_folder_of_test_images_alone_can_be_evaluated_on(folders):
    import shutil

    whole = create("cifar10", root=str(folders)).val
    shutil.rmtree(folders / "train")
    source = create("cifar10", root=str(folders))
    assert by_content(source.val) == by_content(whole) and source.image_size == 32
    with pytest.raises(
        ValueError, match="no folder train: without training images the network can be evaluated only"
    ):
        len(source.train)


def test_places_of_corrupted_sets_and_lists_are_paths_and_their_words_are_not(tmp_path, monkeypatch):
    """A run that is resumed from another folder finds them."""
    from commands import ROOT

    from anorm.config.frozen import Config

    monkeypatch.chdir(tmp_path)

    def data(*arguments):
        return Config.compose(ROOT / "configs", list(arguments)).data.options

    assert data("data=cifar10", "data.corrupted=there")["corrupted"] == str(tmp_path / "there")
    assert data("data=cifar10", "data.corrupted=like")["corrupted"] == "like"
    assert data("data=domains", "data.splits=there")["splits"] == str(tmp_path / "there")
    assert data("data=domains")["splits"] == "auto" and data("data=domains", "data.splits=null")["splits"] is None
