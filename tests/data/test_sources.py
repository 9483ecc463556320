import inspect
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from photographs import age, difference, picture, write_folder
from PIL import Image

from anorm.data import index, sources
from anorm.data.decode import BadImage
from anorm.data.random import stream
from anorm.data.sources import create

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_yaml_names_a_source_and_sets_only_options_it_takes(path):
    config = yaml.safe_load(path.read_text())
    config.pop("recipe", None)
    name = config.pop("name")
    assert name in sources.list_sources()
    taken = inspect.signature(sources.find(name)).parameters
    assert set(config) <= set(taken), set(config) - set(taken)


def test_every_source_has_a_yaml():
    assert {yaml.safe_load(path.read_text())["name"] for path in CONFIGS} == set(sources.list_sources())


# ---- digits


def test_digits_have_a_fixed_stratified_split():
    source = create("digits")
    assert len(source.train) == 1438 and len(source.val) == 359
    assert source.identity == create("digits").identity
    for dataset, share in ((source.train, 0.8), (source.val, 0.2)):
        counts = torch.bincount(dataset.labels, minlength=10)
        whole = torch.bincount(torch.cat([source.train.labels, source.val.labels]))
        assert ((counts - share * whole).abs() <= 0.5).all()
    assert source.identity != create("digits", val_share=0.3).identity


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    source = create("digits", image_size=8)
    both = torch.cat(
        [dataset.fetch(range(len(dataset)), None).images[:, 0] for dataset in (source.train, source.val)]
    )
    originals = torch.from_numpy(load_digits().images * (255 / 16)).round().to(torch.uint8)
    assert sorted(map(bytes, both.numpy())) == sorted(map(bytes, originals.numpy()))


def test_digits_shift_by_up_to_three_pixels_and_one_by_one_as_in_a_batch():
    train = create("digits").train
    still = train.fetch([5], None).images[0, 0]
    seen = set()
    for i in range(300):
        image, label = train.sample(5, stream(0, "augment", i, 5))
        assert image.shape == (3, 32, 32) and label == train.labels[5]
        moves = [
            (dy, dx)
            for dy in range(-3, 4)
            for dx in range(-3, 4)
            if torch.equal(shift(still, dy, dx), image[0])
        ]
        assert moves
        seen.add(moves[0])
    assert len(seen) == 49
    batch = train.fetch([3, 5, 9], [stream(0, "augment", 1, i) for i in (3, 5, 9)])
    for position, i in enumerate((3, 5, 9)):
        assert torch.equal(batch.images[position], train.sample(i, stream(0, "augment", 1, i))[0])


def shift(image, dy, dx):
    padded = torch.nn.functional.pad(image, (3, 3, 3, 3))
    return padded[3 - dy : 3 - dy + image.shape[0], 3 - dx : 3 - dx + image.shape[1]]


def test_digits_statistics_are_those_of_the_training_images():
    source = create("digits")
    pixels = source.train.fetch(range(len(source.train)), None).images.double() / 255
    assert source.mean == pytest.approx([pixels.mean().item()] * 3, abs=1e-12)
    assert source.std == pytest.approx([pixels.std().item()] * 3, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 0},
        {"image_size": 4},
        {"max_shift": -1},
        {"max_shift": 32},
        {"val_share": 0.0},
        {"val_share": 1.0},
    ],
)
def test_digits_refuse_impossible_options(options):
    with pytest.raises(ValueError, match=f"data.{next(iter(options))}"):
        create("digits", **options)


# ---- synthetic


def test_synthetic_images_are_fixed_and_of_the_given_shape():
    source = create("synthetic", image_size=16, num_classes=7, train_images=300, val_images=20)
    assert (len(source.train), len(source.val), source.num_classes) == (300, 20, 7)
    fetched = source.train.fetch([299, 0], [stream(0, "augment", 0, i) for i in (299, 0)])
    assert fetched.images.shape == (2, 3, 16, 16) and fetched.images.dtype == torch.uint8
    again = create("synthetic", image_size=16, num_classes=7, train_images=300, val_images=20)
    assert torch.equal(again.train.fetch([299, 0], None).images, fetched.images)
    assert source.train.labels.max() == 6


@pytest.mark.parametrize("option", ["image_size", "num_classes", "train_images", "val_images"])
def test_synthetic_refuses_sizes_below_one(option):
    with pytest.raises(ValueError, match=f"data.{option}=0 must be at least 1"):
        create("synthetic", **{option: 0})


# ---- folders


def test_a_folder_is_read_in_the_order_of_its_names(folder):
    source = create("imagefolder", root=str(folder), image_size=24)
    assert source.classes == ["ant", "bee", "cat"]
    assert len(source.train) == 21 and len(source.val) == 9
    names = [os.path.relpath(source.train.store.name(i), folder) for i in range(21)]
    assert names == sorted(names) and names[8] == "train/bee/bee_1.JPEG"
    assert source.train.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    image, label = source.val.sample(4, None)
    assert image.shape == (3, 24, 24) and image.dtype == torch.uint8 and label == 1


def test_each_split_has_an_identity_of_its_own(folder):
    """Evaluations are comparable when their images are the same, whatever was trained on."""

    def splits():
        source = create("imagefolder", root=str(folder), cache=False)
        return source.train.identity, source.val.identity

    train, val = splits()
    assert train != val
    Image.fromarray(picture(5)).save(folder / "train" / "ant" / "new.png")
    assert splits()[0] != train and splits()[1] == val
    Image.fromarray(picture(6)).save(folder / "val" / "ant" / "new.png")
    assert splits()[1] != val
    for name, options in (("digits", {"val_share": 0.3}), ("synthetic", {"val_images": 7})):
        assert create(name).val.identity == create(name).val.identity != create(name, **options).val.identity
        assert create(name).val.identity != create(name).train.identity


def test_identity_follows_names_classes_and_sizes_but_not_the_place(folder, tmp_path):
    def identity(root=folder):
        return create("imagefolder", root=str(root)).identity

    first = identity()
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert identity(tmp_path / "elsewhere") == first
    os.rename(folder / "train/ant/ant_3.JPEG", folder / "train/ant/ant_33.JPEG")
    renamed = identity()
    assert renamed != first
    Image.fromarray(picture(9)).save(folder / "train/cat/cat_9.JPEG")
    assert identity() not in (first, renamed)


def test_the_index_cache_is_used_and_notices_changes(folder, monkeypatch):
    listed = []
    scan = index._scan
    monkeypatch.setattr(index, "_scan", lambda *args: listed.append(args[0].name) or scan(*args))
    first = create("imagefolder", root=str(folder))
    again = create("imagefolder", root=str(folder))
    assert listed == ["train", "val"] and again.identity == first.identity
    assert again.train.store.name(20) == first.train.store.name(20)

    os.remove(folder / "train/bee/bee_0.JPEG")
    assert len(create("imagefolder", root=str(folder)).train) == 20  # not stale, and too fresh to be kept
    assert len(create("imagefolder", root=str(folder)).train) == 20
    assert listed == ["train", "val", "train", "train"]
    assert len(create("imagefolder", root=str(folder), cache=False).train) == 20
    assert listed[4:] == ["train", "val"]


def test_a_damaged_index_cache_is_replaced(folder, caplog):
    create("imagefolder", root=str(folder))
    for path in index.cache_folder().glob("*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    assert len(create("imagefolder", root=str(folder)).train) == 21
    assert "unreadable" in caplog.text
    caplog.clear()
    assert len(create("imagefolder", root=str(folder)).train) == 21
    assert not caplog.text


def test_a_machine_without_a_home_keeps_no_index(folder, monkeypatch, caplog):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(index.Path, "home", home)
    for cache in (True, False):
        assert len(create("imagefolder", root=str(folder), cache=cache).train) == 21
    assert caplog.text.count("no file index is kept") == 2  # of train and of val


def test_a_cache_that_cannot_be_written_is_no_error(folder, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(create("imagefolder", root=str(folder)).train) == 21
    assert "could not keep the file index" in caplog.text


@pytest.mark.parametrize(
    "name, text",
    [
        ("LOC_synset_mapping.txt", "cat domestic cat, Felis\nant ant, emmet\nzebra unused\nbee honey bee\n"),
        ("classes.txt", "ant ant, emmet\nbee honey bee\ncat domestic cat, Felis\n"),
        ("classes.txt", "ant, emmet\nhoney bee\ndomestic cat, Felis\n"),
    ],
)
def test_class_names_come_from_a_name_file(folder, name, text):
    (folder / name).write_text(text)
    expected = ["ant, emmet", "honey bee", "domestic cat, Felis"]
    assert create("imagefolder", root=str(folder)).classes == expected


def test_a_name_file_of_another_set_is_an_error(folder):
    (folder / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="classes.txt names 2 classes, but there are 3 class folders"):
        create("imagefolder", root=str(folder))


def test_png_named_jpeg_and_cmyk_files_are_read_like_the_others(folder):
    Image.fromarray(picture(50)).save(folder / "train/ant/a_png.JPEG", "PNG")
    Image.fromarray(picture(51)).convert("CMYK").save(folder / "train/ant/a_cmyk.JPEG", "JPEG", quality=100)
    train = create("imagefolder", root=str(folder), image_size=24).train
    assert [os.path.basename(train.store.name(i)) for i in range(2)] == ["a_cmyk.JPEG", "a_png.JPEG"]
    assert difference(train.decoded(1).permute(1, 2, 0), picture(50)) == 0
    # CMYK keeps 8 bits and JPEG at quality 100 loses little on a smooth picture
    assert difference(train.decoded(0).permute(1, 2, 0), picture(51)) <= 8


def test_imagenet_is_a_folder_of_a_thousand_classes(folder):
    with pytest.raises(ValueError, match="expects 1000 class folders, found 3: use data=imagefolder"):
        create("imagenet", root=str(folder))
    assert inspect.signature(sources.find("imagenet")) == inspect.signature(sources.find("imagefolder"))


# ---- what a user can get wrong


def test_unknown_source_and_option():
    with pytest.raises(ValueError, match="data source 'cifar' is unknown: choose one of cifar10, "):
        create("cifar")
    with pytest.raises(ValueError, match="data=digits has no option colour; it takes image_size"):
        create("digits", colour=1)
    with pytest.raises(ValueError, match="data=digits reads no folder"):
        create("digits", root="/somewhere")


def no_root(folder):
    return None, r"data.root is not set"


def missing_root(folder):
    return folder / "nowhere", r"nowhere is not a folder: set it \(for data=imagenet also \$IMAGENET_DIR\)"


def missing_val(folder):
    shutil.rmtree(folder / "val")
    return folder, r"val is not a folder: put the class folders there, or set data.root"


def empty_val(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    return folder, r"val holds no class folders: it is empty"


def flat_val(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    shutil.copy(folder / "train/ant/ant_0.JPEG", folder / "val/ILSVRC2012_val_00000001.JPEG")
    return folder, r"no class folders but files such as ILSVRC2012_val_00000001.JPEG: .*prepare_imagenet"


def differing_classes(folder):
    os.rename(folder / "val/bee", folder / "val/wasp")
    return folder, r"differ.*only in .*train: bee; only in .*val: wasp"


def empty_class(folder):
    (folder / "train/dog").mkdir()
    return folder, r"train/dog holds no images"


def other_file(folder):
    (folder / "train/cat/notes.txt").write_text("x")
    return folder, r"train/cat/notes.txt is not an image file: remove it, or set data.on_error=skip"


def nested_folder(folder):
    (folder / "train/cat/images").mkdir()
    return folder, r"train/cat/images is a folder where an image should be"


def file_beside_classes(folder):
    (folder / "train/list.txt").write_text("x")
    return folder, r"train/list.txt lies beside the class folders"


@pytest.mark.parametrize(
    "spoil",
    [
        no_root,
        missing_root,
        missing_val,
        empty_val,
        flat_val,
        differing_classes,
        empty_class,
        other_file,
        nested_folder,
        file_beside_classes,
    ],
)
def test_a_wrong_folder_is_explained_in_a_line_or_two(folder, spoil):
    root, words = spoil(folder)
    with pytest.raises(ValueError, match=words) as caught:
        create("imagefolder", root=root and str(root))
    assert str(caught.value).count("\n") <= 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"image_size": 0}, "image_size=0"),
        ({"mean": (0.5,)}, "three values"),
        ({"std": (0.2, 0.0, 0.2)}, "above zero"),
        ({"on_error": "ignore"}, "choose error .* or skip"),
    ],
)
def test_wrong_options_are_refused(folder, options, words):
    with pytest.raises(ValueError, match=words):
        create("imagefolder", root=str(folder), **options)


def test_non_images_are_skipped_and_listed_where_asked(folder, caplog):
    (folder / "train/cat/notes.txt").write_text("x")
    (folder / "train/list.txt").write_text("x")
    age(folder)
    for _ in range(2):  # the second reads the cache
        source = create("imagefolder", root=str(folder), on_error="skip")
        assert len(source.train) == 21
        assert [os.path.basename(path) for path in source.train.store.index.skipped] == [
            "list.txt",
            "notes.txt",
        ]
    # the index of on_error=skip does not serve on_error=error
    with pytest.raises(ValueError, match="list.txt"):
        create("imagefolder", root=str(folder))


def spoil_file(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def test_a_corrupt_file_is_named_when_it_is_read(folder):
    spoil_file(folder / "train/bee/bee_2.JPEG")
    train = create("imagefolder", root=str(folder), image_size=16).train
    with pytest.raises(BadImage, match=r"train/bee/bee_2.JPEG is not a readable image"):
        train.sample(9, stream(0, "augment", 0, 9))


def test_skipping_replaces_training_images_and_leaves_out_evaluation_images(folder):
    spoil_file(folder / "train/bee/bee_2.JPEG")
    spoil_file(folder / "val/ant/ant_1.JPEG")
    source = create("imagefolder", root=str(folder), image_size=16, on_error="skip")
    fetched = source.train.fetch([8, 9, 10], [stream(0, "augment", 0, i) for i in (8, 9, 10)])
    assert fetched.indices.tolist() == [8, 10, 10] and len(fetched.images) == 3
    assert [index for index, _ in fetched.bad] == [9] and "bee_2.JPEG" in fetched.bad[0][1]
    fetched = source.val.fetch([0, 1, 2], None)
    assert (
        fetched.indices.tolist() == [0, 2] and fetched.labels.tolist() == [0, 0] and len(fetched.images) == 2
    )


def test_a_set_without_one_readable_image_ends(tmp_path):
    root = write_folder(tmp_path / "one", classes=("ant",), train=2, val=1)
    for path in (root / "train/ant").iterdir():
        spoil_file(path)
    train = create("imagefolder", root=str(root), on_error="skip").train
    with pytest.raises(BadImage, match="every one of the 2 training images"):
        train.sample(0, stream(0, "augment", 0, 0))
