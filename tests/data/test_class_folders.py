"""What is a class, and what it is called: service folders, numbers as names, lists of names in doubt."""

import logging
import os

import pytest
from photographs import age, picture, write_folder
from PIL import Image

from anorm.data.sources import create
from anorm.data.sources.folder import class_names

SERVICE = [
    ".ipynb_checkpoints",
    "@eaDir",
    "__MACOSX",
    ".git",
    "$RECYCLE.BIN",
    "System Volume Information",
    ".Trash-0",
]


def put(folder, name="x.jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(1)).save(folder / name)


@pytest.mark.parametrize("on_error", ["error", "skip"])
def test_service_folders_and_files_are_passed_over_and_said(folder, on_error, caplog):
    plain = create("imagefolder", root=str(folder), on_error=on_error)
    for split in ("train", "val"):
        for name in SERVICE:
            put(folder / split / name)
            put(folder / split / "ant" / name)
        for name in ("._ant_0.JPEG", ".DS_Store", "Thumbs.db", "desktop.ini"):
            (folder / split / "ant" / name).write_bytes(b"no image")
    (folder / "val/.listing").write_text("")
    age(folder)
    for _ in range(2):  # the second reads the cache
        caplog.clear()
        found = create("imagefolder", root=str(folder), on_error=on_error)
        assert found.classes == ["ant", "bee", "cat"]
        assert (len(found.train), len(found.val), found.identity) == (21, 9, plain.identity)
        assert f"passed over in {folder / 'train'}" in caplog.text and "and 15 more" in caplog.text
        assert len(found.val.store.index.skipped) == 19


def test_nothing_is_said_of_an_ordinary_folder(folder, caplog):
    with caplog.at_level(logging.WARNING):
        create("imagefolder", root=str(folder))
    assert not caplog.text


@pytest.mark.parametrize("on_error", ["error", "skip"])
def test_a_class_without_an_image_is_an_error_also_where_bad_files_are_skipped(folder, on_error):
    for split in ("train", "val"):
        (folder / split / "dog").mkdir()
    (folder / "train/dog/.hidden.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="train/dog holds no images: a class needs some"):
        create("imagefolder", root=str(folder), on_error=on_error)


def test_a_class_of_other_files_alone_is_an_error_that_names_one(folder):
    for split in ("train", "val"):
        (folder / split / "dog").mkdir()
        (folder / split / "dog/readme.txt").write_text("x")
    with pytest.raises(ValueError, match="train/dog holds no images, but readme.txt"):
        create("imagefolder", root=str(folder), on_error="skip")


@pytest.mark.parametrize("split, other", [("train", "val"), ("val", "train")])
def test_a_class_of_one_split_alone_is_named(folder, split, other):
    put(folder / split / "dog")
    with pytest.raises(ValueError, match=rf"differ.*only in \S*/{split}: dog$"):
        create("imagefolder", root=str(folder), on_error="skip")


def test_timms_reader_does_not_take_a_service_folder_for_a_class(folder):
    for split in ("train", "val"):
        put(folder / split / ".ipynb_checkpoints")
    with pytest.raises(ValueError, match="takes the folder .ipynb_checkpoints for a class.*data=imagefolder"):
        create("timm", reader="folder", root=str(folder), val="val")


def test_a_folder_that_may_not_be_listed_is_named(folder, monkeypatch):
    def refuse(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"train/bee cannot be listed \(Permission denied\)"):
        create("imagefolder", root=str(folder), cache=False)


# ---- names. Folders (in the order of their labels), the list, and the names or the error

TEN = "zero one two three four five six seven eight nine".split()
NUMBERS = sorted(map(str, range(11)))
NAMED = {
    "numbers, names alone": (NUMBERS, [*TEN, "ten"], ["zero", "one", "ten", *TEN[2:]]),
    "numbers from 1": (NUMBERS[1:], [*TEN[1:], "ten"], ["one", "ten", *TEN[2:]]),
    "some of the numbers": (["0", "10", "2"], [*TEN, "ten"], ["zero", "ten", "two"]),
    "ImageNetV2": (sorted(map(str, range(1000))), [f"c{i}" for i in range(1000)], None),
    "numbers, each with its name": (NUMBERS, [f"{i} n{i}" for i in range(11)], None),
    "numbers, the folders alone": (NUMBERS, [str(i) for i in range(11)], NUMBERS),
    "padded numbers, names alone": ([f"{i:04}" for i in range(11)], [*TEN, "ten"], [*TEN, "ten"]),
    "padded folders, plain list": (
        ["000", "001", "010"],
        ["10 ten", "0 zero", "1 one"],
        ["zero", "one", "ten"],
    ),
    "iNaturalist": (
        ["00000_Animalia_Annelida", "00001_Animalia_Arthropoda", "00010_Plantae"],
        ["worm", "insect", "plant"],
        ["worm", "insect", "plant"],
    ),
    "Places": (["airfield", "alley", "arch"], ["airfield a", "alley b", "arch c"], ["a", "b", "c"]),
    "Places' own list": (
        ["airfield", "alley"],
        ["/a/airfield 0", "/a/alley 1"],
        ["/a/airfield 0", "/a/alley 1"],
    ),
    "WordNet ids": (
        ["n01440764", "n01443537"],
        ["n01443537 goldfish", "n01440764 tench"],
        ["tench", "goldfish"],
    ),
    "the folders alone, in another order": (
        ["ant", "bee", "cat"],
        ["cat", "ant", "bee"],
        ["ant", "bee", "cat"],
    ),
    "folders with spaces": (["big ant", "big bee"], ["big bee B", "big ant A"], ["A", "B"]),
    "one of them its own name": (["ant", "bee"], ["ant", "honey bee"], ["ant", "honey bee"]),
    "a mark at the beginning": (["ant", "bee"], ["\ufeffant A", "bee B"], ["A", "B"]),
    "names that mean false": (["no", "off"], ["off aus", "no nein"], ["nein", "aus"]),
}
IN_DOUBT = {
    "numbers without a beginning": (["1", "2", "5"], TEN, "names 10 classes, but there are 3 class folders"),
    "tens": (
        ["10", "100", "20"],
        ["a", "b", "c"],
        "by path: 10, 100, 20; by number: 10, 20, 100; the names: a, b, c",
    ),
    "numbers in names": (
        ["1_ant", "10_cat", "2_bee"],
        ["ant", "bee", "cat"],
        "by number: 1_ant, 2_bee, 10_cat",
    ),
    "a folder at another place": (["ant", "bee", "cat"], ["bee", "wasp", "cat"], "the names: bee, wasp, cat"),
    "a misspelt folder": (
        ["ant", "bee", "cat"],
        ["ant A", "bee B", "cta C"],
        "no line for the class folder cat",
    ),
    "too few": (["ant", "bee", "cat"], ["one", "two"], "names 2 classes, but there are 3 class folders"),
    "nothing": (["ant", "bee"], [], "names 0 classes"),
    "nothing for numbers": (["0", "1"], [], "names 0 classes"),
}


@pytest.mark.parametrize("case", NAMED)
def test_names_go_to_their_folders(case, tmp_path):
    folders, lines, expected = NAMED[case]
    (tmp_path / "classes.txt").write_text("\n".join(lines), encoding="utf-8")
    if expected is None:
        number = {"ImageNetV2": "c{}", "numbers, each with its name": "n{}"}[case]
        expected = [number.format(name) for name in folders]
    assert class_names(tmp_path, folders) == expected


@pytest.mark.parametrize("case", IN_DOUBT)
def test_a_list_in_doubt_is_refused(case, tmp_path):
    folders, lines, words = IN_DOUBT[case]
    (tmp_path / "classes.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=words) as caught:
        class_names(tmp_path, folders)
    assert "write 'folder name' on each line" in str(caught.value)


def test_labels_of_numbered_folders_stay_and_their_names_follow(tmp_path):
    """A run made before names went by number resumes: order, labels and identity are those of the paths."""
    root = write_folder(tmp_path / "set", classes=NUMBERS, train=1, val=1)
    identity = create("imagefolder", root=str(root)).identity
    (root / "classes.txt").write_text("\n".join([*TEN, "ten"]))
    source = create("imagefolder", root=str(root))
    assert source.identity == identity
    for i in range(11):
        number = os.path.basename(os.path.dirname(source.train.store.name(i)))
        assert source.classes[source.train.labels[i]] == [*TEN, "ten"][int(number)]
    assert [os.path.basename(os.path.dirname(source.val.store.name(i))) for i in range(3)] == ["0", "1", "10"]
