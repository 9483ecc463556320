"""Validation images that lie side by side: their classes from Kaggle's list, the official devkit, or a list of folders."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import scipy.io
from photographs import picture, write_folder
from PIL import Image

from anorm.data import shards
from anorm.data.loaders import EvalLoader, TrainLoader
from anorm.data.sources import create
from anorm.prepare.archives import KAGGLE, find
from anorm.prepare.imagenet import Preparation, index, override, prepare

WNIDS = ["n01440764", "n01443537", "n01484850"]
TRUTH = [2, 0, 1, 1, 0, 2]  # places in WNIDS
NAMES = [f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(6)]
TOOL = Path(__file__).parents[2] / "tools/prepare_imagenet.py"


@pytest.fixture
def flat(tmp_path):
    """train/CLASS/IMAGE and val/IMAGE."""
    root = write_folder(tmp_path / "set", classes=WNIDS, train=2, val=0)
    for name in WNIDS:
        (root / "val" / name).rmdir()
    for i, name in enumerate(NAMES):
        Image.fromarray(picture(100 + i)).save(root / "val" / name)
    return root


def kaggle(folder):
    lines = [
        f"{n.removesuffix('.JPEG')},{WNIDS[k]} 1 2 3 4 {WNIDS[k]} 5 6 7 8"
        for n, k in zip(NAMES, TRUTH, strict=True)
    ]
    (folder / "LOC_val_solution.csv").write_text(
        "\n".join(["ImageId,PredictionString", *reversed(lines)]) + "\n"
    )


def devkit(folder):
    """ILSVRC ids do not follow the order of the WordNet ids: id 1 is the last class here."""
    synsets = numpy.zeros(3, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for i, wnid in enumerate(reversed(WNIDS)):
        synsets[i] = (i + 1, wnid, "words")
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.mat").write_bytes(meta.getvalue())
    ids = "".join(f"{3 - k}\n" for k in TRUTH)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(ids)


def val_list(folder):
    (folder / "val_classes.txt").write_text("\n".join(WNIDS[k] for k in TRUTH))


LISTS = {
    "Kaggle": kaggle,
    "Kaggle, in val": lambda folder: kaggle(folder / "val"),
    "devkit": lambda folder: devkit(folder / "ILSVRC2012_devkit_t12/data"),
    "ground truth and meta.mat": devkit,
    "ground truth in val": lambda folder: devkit(folder / "val"),
    "folders": val_list,
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("form", ["folder", "shards"])
def test_validation_images_find_their_classes(flat, tmp_path, kind, form):
    LISTS[kind](flat)
    prepare(Preparation(flat, tmp_path / "out", form, any_counts=True))
    name = "imagefolder" if form == "folder" else "imagenet_shards"
    source = create(name, root=str(tmp_path / "out"), image_size=8)
    assert source.classes == WNIDS and len(source.val) == 6
    for i in range(6):
        place = NAMES.index(next(n for n in NAMES if n.removesuffix(".JPEG") in source.val.store.name(i)))
        assert int(source.val.labels[i]) == TRUTH[place]
        assert source.val.store.read(i).numpy().tobytes() == (flat / "val" / NAMES[place]).read_bytes()


def test_kaggles_own_layout_is_found(flat, tmp_path):
    top = tmp_path / "kaggle"
    (top / KAGGLE).parent.mkdir(parents=True)
    os.rename(flat, top / KAGGLE)
    kaggle(top)
    assert [(item.class_name, item.name) for item in find(top)["val"]] == sorted(
        (WNIDS[k], name) for name, k in zip(NAMES, TRUTH, strict=True)
    )


def test_an_official_number_says_which_line_is_an_images(flat):
    """Of 50,000 some may be missing: the others keep their classes."""
    devkit(flat)
    (flat / "val" / NAMES[1]).unlink()
    found = {item.name: item.class_name for item in find(flat)["val"]}
    assert found == {name: WNIDS[k] for name, k in zip(NAMES, TRUTH, strict=True) if name != NAMES[1]}


def test_the_advice_of_a_flat_folder_leads_to_its_end(flat, tmp_path):
    """What train.py says is typed as it stands; so is what that says, until training would begin."""
    with pytest.raises(ValueError) as caught:
        create("imagefolder", root=str(flat))
    command = str(caught.value).split("validation images ")[1].split(" does that")[0]
    words = shlex.split(command.replace("--to NEW", f"--to {tmp_path / 'new'}"))
    assert words[:2] == ["python", "tools/prepare_imagenet.py"]
    words = [sys.executable, str(TOOL), *words[2:], "--any", "--workers", "1"]

    def tool():
        return subprocess.run(words, capture_output=True, text=True)

    done = tool()
    assert done.returncode == 2 and "LOC_val_solution.csv (Kaggle) or val_classes.txt" in done.stderr
    assert f"into {flat}" in done.stderr
    kaggle(flat)
    done = tool()
    assert done.returncode == 0, done.stderr
    root = shlex.split(done.stdout.splitlines()[-1])[-1].removeprefix("data.root=")
    assert create("imagefolder", root=root).classes == WNIDS


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda root: None, "classes of the validation images are missing: put .* into .*/set$"),
        (lambda root: (root / "LOC_val_solution.csv").write_text("a,b\n1,2\n"), "is no list of ImageId,"),
        (
            lambda root: (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nx,\n"),
            "is no list of",
        ),
        (
            lambda root: (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\nx,n1 1\n"),
            f"has no line for {NAMES[0]}",
        ),
        (lambda root: [devkit(root), (root / "meta.mat").unlink()], "put the devkit's meta.mat"),
        (lambda root: [devkit(root), (root / "meta.mat").write_bytes(b"?")], "do not fit together"),
        (
            lambda root: [
                devkit(root),
                (root / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n2\n"),
            ],
            f"has the classes of 2 images, and none for {NAMES[2]}",
        ),
        (lambda root: (root / "val_classes.txt").write_text("a b"), f"of 2 images, and none for {NAMES[2]}"),
        (
            lambda root: (root / "val_classes.txt").write_text(" ".join(["n1"] * 6)),
            "the classes of train and val differ.*only in train: n01440764.*only in val: n1",
        ),
        (
            lambda root: (root / "val" / "x").mkdir(),
            r"val/ILSVRC2012_val_00000001.JPEG lies beside the class folders: move it away$",
        ),
        (
            lambda root: [path.unlink() for path in (root / "val").iterdir()],
            "val holds no class folders: it is empty",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_said(flat, tmp_path, spoil, words):
    spoil(flat)
    with pytest.raises(ValueError, match=words) as caught:
        prepare(Preparation(flat, tmp_path / "out", any_counts=True))
    assert "prepare_imagenet" not in str(caught.value) and "data.on_error" not in str(caught.value)


def test_a_damaged_image_that_was_replaced_is_taken_and_the_rest_stays(flat, tmp_path):
    kaggle(flat)
    asked = Preparation(flat, tmp_path / "out", "shards", short_side=16, any_counts=True)
    bad = flat / "val" / NAMES[0]
    content = bad.read_bytes()
    bad.write_bytes(b"damaged")
    with pytest.raises(
        ValueError, match=f"{NAMES[0]} is not a readable image .*: replace it in the source and repeat"
    ):
        prepare(asked)
    before = os.stat(tmp_path / "out/train-000000.tar").st_mtime_ns
    bad.write_bytes(content)
    prepare(asked)
    assert os.stat(tmp_path / "out/train-000000.tar").st_mtime_ns == before
    (flat / "val" / NAMES[0]).rename(flat / "val" / "ILSVRC2012_val_00000009.JPEG")
    with pytest.raises(ValueError, match="was begun with other images|has no line for"):
        prepare(asked)


def test_a_preparation_of_an_earlier_version_goes_on(flat, tmp_path):
    import json

    kaggle(flat)
    asked = Preparation(flat, tmp_path / "out", any_counts=True)
    prepare(asked)
    path = tmp_path / "out/prepared.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in before.items() if key != "names"}))
    (tmp_path / "out/train" / WNIDS[0] / "x.JPEG.partial").write_bytes(b"")  # as a kill left it
    prepare(asked)
    assert json.loads(path.read_text()) == before
    assert create("imagefolder", root=str(tmp_path / "out")).classes == WNIDS


def test_the_index_of_every_split_is_written_and_keeps_the_classes_names(flat, tmp_path, caplog):
    kaggle(flat)
    out = tmp_path / "out"
    prepare(Preparation(flat, out, "shards", any_counts=True))
    identity = create("imagenet_shards", root=str(out)).identity
    (out / "val.index.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"val.index.npz is damaged .*--index \S+ writes it again"):
        create("imagenet_shards", root=str(out))
    index(out)
    assert "val.index.npz is damaged" in caplog.text
    assert create("imagenet_shards", root=str(out)).identity == identity
    os.rename(out / "val-000000.tar", out / "validation-000000.tar")
    (out / "val.index.npz").unlink()
    with pytest.raises(ValueError, match=r"validation.index.npz is missing: .*--index"):
        create("imagenet_shards", root=str(out), val="validation")
    index(out)
    assert create("imagenet_shards", root=str(out), val="validation").identity == identity
    with pytest.raises(ValueError, match="holds no shards such as train-000000.tar"):
        index(flat)


def test_shards_of_validation_images_alone_can_be_evaluated_on(flat, tmp_path):
    kaggle(flat)
    out = tmp_path / "out"
    prepare(Preparation(flat, out, "shards", any_counts=True))
    whole = create("imagenet_shards", root=str(out), image_size=8)
    for path in out.glob("train*"):
        path.unlink()
    found = create("imagenet_shards", root=str(out), image_size=8)
    assert found.classes == WNIDS and found.val.identity == whole.val.identity
    assert sum(len(batch.indices) for batch in EvalLoader(found.val, 4)) == 6
    with pytest.raises(ValueError, match="holds no shards train-.*can be evaluated only"):
        TrainLoader(found, 0, 2, 2)


def test_an_index_of_an_earlier_set_gives_way_to_a_larger_one(tmp_path):
    shards.write_shard(tmp_path / "train-0.tar", [("a", b"image", 0)])
    shards.write_index(tmp_path, "train", ["ant"])
    shards.write_shard(tmp_path / "train-0.tar", [("a", b"image", 0), ("b", b"image", 1)])
    with pytest.raises(ValueError, match=r"labels run from 0 to 1, for 1 classes; .*remove it \(\*.index.npz\)"):
        index(tmp_path)
    (tmp_path / "train.index.npz").unlink()
    index(tmp_path)
    assert shards.classes_of(tmp_path, "train") == ["0", "1"]


@pytest.mark.parametrize(
    "content, words", [(b"not a tar", "is not a readable tar file"), (None, "is no number")]
)
def test_a_damaged_shard_is_named(tmp_path, content, words):
    shards.write_shard(tmp_path / "train-0.tar", [("a", b"image", "cat")])
    if content:
        (tmp_path / "train-0.tar").write_bytes(content)
    with pytest.raises(ValueError, match=f"train-0.tar.*{words}"):
        index(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "/plain/path-1.0",
        "/with space",
        "/a=b",
        "/a,b",
        "/it's",
        '/a"b',
        "/a\\",
        '/a\\"b',
        "/caf\xe9",
        "/a(b)[c]{d}",
        "/~x",
        "/${x}",
        "/a#b;c&d|e",
        "/2012",
        "/off",
    ],
)
def test_the_printed_command_names_any_folder(path):
    """Read as the shell, Hydra and OmegaConf read it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    [word] = shlex.split(override("data.root", path))
    found = OverridesParser.create().parse_override(word).value()
    assert OmegaConf.create({"root": found}).root == path
