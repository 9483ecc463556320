"""The other ways of feeding give what data.loader=torch gives."""

import gc
import os
import re
import weakref

import numpy
import pytest
import torch
from photographs import write_folder
from PIL import Image

from anorm.data.feeds import device as device_feed
from anorm.data.feeds.dali import DaliFeed
from anorm.data.loaders import EvalLoader, TrainLoader
from anorm.data.sources import create

LOADERS = ["device", "dali"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = write_folder(tmp_path_factory.mktemp("feeds") / "set", train=9, val=5)
    path = root / "train/ant/ant_0.JPEG"
    Image.open(path).save(path, "PNG")
    path = root / "train/bee/bee_3.JPEG"
    Image.open(path).convert("CMYK").save(path, "JPEG", quality=95)
    path = root / "val/ant/ant_1.JPEG"
    Image.open(path).convert("L").save(path, "JPEG")
    turned = Image.Exif()
    turned[0x0112] = 6  # no loader turns images
    for path, form in (
        (root / "train/ant/ant_5.JPEG", "JPEG"),
        (root / "val/bee/bee_0.JPEG", "JPEG"),
        (root / "val/bee/bee_2.JPEG", "TIFF"),
    ):
        Image.open(path).save(path, form, exif=turned)
    return root


@pytest.fixture(autouse=True)
def dali_where_asked(request):
    if "dali" in request.node.name:
        pytest.importorskip("nvidia.dali", reason="the extra anorm[dali] is not installed")


def source(root, loader, **options):
    return create(
        "imagefolder", root=str(root), cache=False, **{"image_size": 24, "loader": loader} | options
    )


def levels(batch, source):
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (source.mean, source.std))
    return (batch.inputs * std + mean) * 255


def assert_close(ours, theirs, source, loader):
    assert torch.equal(ours.indices, theirs.indices) and torch.equal(ours.targets, theirs.targets)
    difference = (levels(ours, source) - levels(theirs, source)).abs()
    if loader == "device":
        # the same filter in floating point: one level, and a second where both of its passes round the other way
        assert difference.max() < 2.1 and difference.mean() < 0.1
    else:
        # another JPEG decoder, which in a region interpolates colour at its edges from fewer pixels
        assert difference.mean() < 0.5 and (difference > 2.5).float().mean() < 0.02


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_images_are_those_of_the_torch_loader(root, loader, interpolation):
    plain, other = (
        source(root, "torch", interpolation=interpolation),
        source(root, loader, interpolation=interpolation),
    )
    assert plain.identity == other.identity
    steps = [list(TrainLoader(s, 3, 8, 4).epoch(1)) for s in (plain, other)]
    for theirs, ours in zip(*steps, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert_close(a, b, plain, loader)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("batch, world", [(4, 1), (7, 2), (2, 16)])
def test_evaluation_is_exact(root, loader, batch, world):
    plain, other, seen = source(root, "torch"), source(root, loader), []
    for rank in range(world):
        expected, found = (
            list(EvalLoader(plain.val, batch, rank, world)),
            list(EvalLoader(other.val, batch, rank, world)),
        )
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b, plain, loader)
            seen += a.indices.tolist()
    assert seen == list(range(15))


@pytest.mark.parametrize("loader", LOADERS)
def test_resume_and_broken_off_epochs_are_exact(root, loader):
    feeding = TrainLoader(source(root, loader), 0, 6, 3)
    whole = list(feeding.epoch(2))
    steps = feeding.epoch(1)
    next(steps)
    del steps
    for start in (1, 3, 4):
        for ours, theirs in zip(feeding.epoch(2, start), whole[start:], strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    feeding.close()


@pytest.mark.parametrize("loader", LOADERS)
def test_a_bad_file_is_named(tmp_path, loader):
    root = write_folder(tmp_path / "set")
    (root / "train/bee/bee_2.JPEG").write_bytes(b"\xff\xd8\xff damaged")
    with pytest.raises(ValueError, match=r"bee_2.JPEG is not a readable image"):
        list(TrainLoader(source(root, loader), 0, 21, 21).epoch(0))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("damage", ["nothing left", "cut"])
def test_skipped_files_are_replaced_and_left_out_as_by_the_torch_loader(tmp_path, loader, damage, caplog):
    root = write_folder(tmp_path / "set")
    for name in ("train/bee/bee_2.JPEG", "val/ant/ant_0.JPEG"):
        content = (root / name).read_bytes()
        (root / name).write_bytes(
            b"\xff\xd8\xff damaged" if damage == "nothing left" else content[: len(content) // 2]
        )
    plain, other = source(root, "torch", on_error="skip"), source(root, loader, on_error="skip")
    trains, vals = (
        [TrainLoader(s, 0, 7, 7) for s in (plain, other)],
        [EvalLoader(s.val, 2) for s in (plain, other)],
    )
    for theirs, ours in zip(*(train.epoch(0) for train in trains), strict=True):
        assert_close(ours[0], theirs[0], plain, loader)
    images = [torch.cat([batch.indices for batch in val]).tolist() for val in vals]
    assert images == [[1, 2, 3, 4, 5, 6, 7, 8]] * 2
    assert list(trains[1].skipped) == [9] and list(vals[1].skipped) == [0]


def test_a_set_that_does_not_fit_is_refused_with_the_numbers(root, monkeypatch):
    monkeypatch.setattr(device_feed, "_free_memory", lambda device: 50_000)
    with pytest.raises(
        ValueError, match=r"data.loader=device: \d+ of 27 images already take .* GB .* use data.loader=torch"
    ):
        TrainLoader(source(root, "device"), 0, 8, 4)


def test_images_of_many_sizes_are_cut_out_a_few_at_a_time(root, monkeypatch):
    """Windows are padded to the largest of those that are cut out at once."""
    expected = list(EvalLoader(source(root, "device").val, 15))[0]
    monkeypatch.setattr(device_feed, "WINDOWS", 3 * 60 * 60)
    [found] = EvalLoader(source(root, "device").val, 15)
    assert torch.equal(found.indices, expected.indices)
    assert (levels(found, source(root, "torch")) - levels(expected, source(root, "torch"))).abs().max() < 1.1


def test_a_feed_of_dali_ends_with_its_last_name(root):
    """DALI's threads are not in a process that is forked later: nothing must be left for a collector there."""
    loader = TrainLoader(source(root, "dali"), 0, 8, 4)
    next(loader.epoch(0))
    feed = weakref.ref(loader._feed)
    gc.collect()
    gc.disable()
    try:
        del loader
        assert feed() is None
    finally:
        gc.enable()


def test_what_dali_alone_refuses_is_decoded_by_others(root, monkeypatch, caplog):
    """A file that the torch loader reads ends no run: the requests under way are repeated with bitmaps."""
    content = (root / "train/ant/ant_3.JPEG").read_bytes()
    # DALI is given damage where the others are given the file
    readable, given = DaliFeed._readable, []

    def damaged(feed, index):
        data, height, width = readable(feed, index)
        if data.tobytes() == content:
            given.append(index)
            data = numpy.frombuffer(content[:200] + bytes(40) + content[-2:], dtype=numpy.uint8)
        return data, height, width

    monkeypatch.setattr(DaliFeed, "_readable", damaged)
    plain, other = source(root, "torch"), source(root, "dali")
    for theirs, ours in zip(
        TrainLoader(plain, 0, 9, 9).epoch(0), TrainLoader(other, 0, 9, 9).epoch(0), strict=True
    ):
        assert_close(ours[0], theirs[0], plain, "dali")
    assert given == [given[0]] and re.search(r"DALI refuses one of \d+ images", caplog.text)


@pytest.mark.parametrize("loader", ["torch", *LOADERS])
def test_a_file_that_is_gone_is_a_bad_file(tmp_path, loader):
    root = write_folder(tmp_path / "set")
    skipping, strict = source(root, loader, on_error="skip"), source(root, loader)
    (root / "train/bee/bee_2.JPEG").unlink()  # indexed before
    train = TrainLoader(skipping, 0, 21, 21, workers=1)
    [[batch]] = train.epoch(0)
    assert len(batch.targets) == 21 and list(train.skipped) == [9]
    assert "bee_2.JPEG cannot be read (No such file or directory)" in train.skipped[9]
    train.close()
    with pytest.raises(ValueError, match=r"bee_2.JPEG cannot be read"):
        list(TrainLoader(strict, 0, 21, 21, workers=1).epoch(0))


def test_memory_that_the_system_does_not_give_is_explained(root, monkeypatch):
    monkeypatch.setattr(device_feed, "_free_memory", lambda device: 2**60)
    with pytest.raises(ValueError, match=r"the system gives no .* GB for images \(Cannot allocate memory\)"):
        TrainLoader(source(root, "device"), 0, 8, 4)


def test_dali_that_is_not_installed_is_explained(root, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match="pip install nvidia-dali-cuda130"):
        TrainLoader(source(root, "dali"), 0, 8, 4)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")
def test_images_that_workers_decoded_for_the_device_keep_no_files_open(root, monkeypatch):
    monkeypatch.setattr(device_feed, "CHUNK", 2)
    before = len(os.listdir("/proc/self/fd"))
    helped = TrainLoader(source(root, "device"), 0, 9, 9, workers=2)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    for ours, theirs in zip(
        helped.epoch(0), TrainLoader(source(root, "device"), 0, 9, 9).epoch(0), strict=True
    ):
        assert torch.equal(ours[0].inputs, theirs[0].inputs)
