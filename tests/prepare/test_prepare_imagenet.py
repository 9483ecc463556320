"""tools/prepare_imagenet.py on small files in the official form."""

import fcntl
import io
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy
import pytest
import scipy.io
import torch
from photographs import difference, picture
from PIL import Image

from anorm.data import shards
from anorm.data.loaders import EvalLoader, TrainLoader
from anorm.data.sources import create
from anorm.prepare import archives

TOOL = Path(__file__).parents[2] / "tools" / "prepare_imagenet.py"
WNIDS = ["n01440764", "n01443537", "n01484850"]
TRAIN, VAL = 5, 6


def jpeg(seed, height=60, width=80):
    buffer = io.BytesIO()
    Image.fromarray(picture(seed, height, width)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def tar_of(entries, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in entries:
            add(tar, name, content)
    return buffer.getvalue()


def truth():
    """ILSVRC ids do not follow the order of the WordNet ids: 1 is the last class here."""
    return [1, 3, 2, 2, 3, 1]


@pytest.fixture
def official(tmp_path):
    """The three official files, with 3 classes, 5 training images each and 6 validation images."""
    folder = tmp_path / "official"
    folder.mkdir()
    inner = [
        (f"{wnid}.tar", tar_of([(f"{wnid}_{i}.JPEG", jpeg(10 * c + i)) for i in range(TRAIN)]))
        for c, wnid in enumerate(WNIDS)
    ]
    (folder / archives.TRAIN_TAR).write_bytes(tar_of(inner))
    (folder / archives.VAL_TAR).write_bytes(
        tar_of([(f"ILSVRC2012_val_{i + 1:08d}.JPEG", jpeg(100 + i)) for i in range(VAL)])
    )
    synsets = numpy.zeros(3, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for i, wnid in enumerate(reversed(WNIDS)):
        synsets[i] = (i + 1, wnid, f"words of {wnid}")
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    lines = "".join(f"{number}\n" for number in truth()).encode()
    (folder / archives.DEVKIT).write_bytes(
        tar_of(
            [
                ("ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue()),
                ("ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", lines),
            ],
            "w:gz",
        )
    )
    return folder


@pytest.fixture(scope="module")
def main():
    """The tool within this process, where it works without others."""
    tool = runpy.run_path(str(TOOL))
    return lambda argv: tool["main"]([*argv, "--workers", "1"])


def expected_val():
    """Class folder -> validation images, from the ids above."""
    folders = dict(enumerate(reversed(WNIDS), start=1))
    return {(folders[number], f"ILSVRC2012_val_{i + 1:08d}.JPEG") for i, number in enumerate(truth())}


def test_official_files_become_class_folders(official, tmp_path):
    out = tmp_path / "imagenet"
    command = [
        sys.executable,
        str(TOOL),
        "--from",
        str(official),
        "--to",
        str(out),
        "--any",
        "--workers",
        "2",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train: 15 images, val: 6 images; 21 compared" in done.stdout
    assert {(p.parent.name, p.name) for p in out.glob("val/*/*")} == expected_val()
    assert (out / "train/n01443537/n01443537_2.JPEG").read_bytes() == jpeg(12)
    source = create("imagefolder", root=str(out), image_size=24)
    assert source.classes == WNIDS and len(source.train) == 15 and len(source.val) == 6


@pytest.mark.parametrize("short_side", [0, 32])
def test_official_files_become_shards(official, tmp_path, main, short_side):
    out = tmp_path / "shards"
    assert (
        main(
            [
                "--from",
                str(official),
                "--to",
                str(out),
                "--format",
                "shards",
                "--short-side",
                str(short_side),
                "--any",
            ]
        )
        == 0
    )
    source = create("imagenet_shards", root=str(out), image_size=24)
    assert source.classes == WNIDS and len(source.train) == 15 and len(source.val) == 6
    store = source.val.store
    assert {(WNIDS[store.labels[i]], store.key[i].decode() + ".JPEG") for i in range(6)} == expected_val()
    for i in range(15):
        key, content = source.train.store.key[i].decode(), source.train.store.read(i).numpy().tobytes()
        original = jpeg(10 * WNIDS.index(key[:9]) + int(key[10:]))
        if short_side:
            image = Image.open(io.BytesIO(content))
            assert image.size == (43, 32)
            resized = Image.open(io.BytesIO(original)).resize((43, 32), Image.Resampling.BICUBIC)
            assert difference(image, resized) <= 24  # JPEG at quality 90 with half-resolution colour
        else:
            assert content == original


def test_other_classes_of_validation_images(official, tmp_path, main):
    folders = dict(enumerate(reversed(WNIDS), start=1))
    (official / archives.DEVKIT).unlink()
    with pytest.raises(ValueError, match="the classes of the validation images are missing"):
        archives.find(official)
    lines = ["ImageId,PredictionString"] + [
        f"ILSVRC2012_val_{i + 1:08d},{folders[number]} 1 2 3 4 {folders[number]} 5 6 7 8"
        for i, number in enumerate(truth())
    ]
    (official / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    assert {item[:2] for item in archives.find(official)["val"]} == expected_val()
    (official / "LOC_val_solution.csv").unlink()
    (official / "val_classes.txt").write_text("\n".join(folders[number] for number in truth()))
    assert {item[:2] for item in archives.find(official)["val"]} == expected_val()


def test_repeating_the_command_goes_on_and_makes_the_same_bytes(official, tmp_path, main):
    out, again = tmp_path / "a", tmp_path / "b"
    command = ["--from", str(official), "--format", "shards", "--short-side", "32", "--any"]
    assert main([*command, "--to", str(out)]) == main([*command, "--to", str(again)]) == 0
    for name in ("train-000000.tar", "val-000000.tar"):
        assert (out / name).read_bytes() == (again / name).read_bytes()
    before = os.stat(out / "train-000000.tar").st_mtime_ns
    os.remove(out / "val-000000.tar")
    assert main([*command, "--to", str(out)]) == 0
    assert os.stat(out / "train-000000.tar").st_mtime_ns == before
    assert (out / "val-000000.tar").read_bytes() == (again / "val-000000.tar").read_bytes()


def test_a_killed_preparation_leaves_no_half_file_and_goes_on(official, tmp_path, main):
    out = tmp_path / "imagenet"
    command = ["--from", str(official), "--to", str(out), "--any"]
    process = subprocess.Popen(
        [sys.executable, str(TOOL), *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not list(out.glob("train/*/*.JPEG")):
        time.sleep(0.001)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for path in out.glob("train/*/*.JPEG"):
        assert path.read_bytes() == jpeg(10 * WNIDS.index(path.parent.name) + int(path.stem[10:]))
    assert main(command) == 0
    assert len(list(out.glob("train/*/*"))) == 15 and len(list(out.glob("val/*/*"))) == 6


def test_other_options_on_what_was_begun_are_refused(official, tmp_path, main, capsys):
    out = str(tmp_path / "shards")
    command = ["--from", str(official), "--to", out, "--format", "shards", "--any"]
    assert main([*command, "--short-side", "32"]) == 0
    assert main([*command, "--short-side", "40"]) == 2
    assert "was begun with other short_side" in capsys.readouterr().err


def test_what_was_damaged_afterwards_is_found(official, tmp_path, main, capsys):
    out = tmp_path / "imagenet"
    command = ["--from", str(official), "--to", str(out), "--any"]
    assert main(command) == 0
    path = out / "train/n01440764/n01440764_0.JPEG"
    content = path.read_bytes()
    path.write_bytes(content[:-10] + bytes(10))
    assert main(command) == 2
    assert "n01440764_0.JPEG is not what its source gives" in capsys.readouterr().err
    path.write_bytes(content[:-10])  # as a loss of power leaves it: written anew
    assert main(command) == 0 and path.read_bytes() == content


def test_a_shard_that_lacks_images_is_found(official, tmp_path, main, capsys):
    out = tmp_path / "shards"
    command = ["--from", str(official), "--to", str(out), "--any", "--format", "shards"]
    assert main(command) == 0
    with tarfile.open(out / "val-000000.tar") as tar:
        entries = [(m.name, tar.extractfile(m).read()) for m in tar]
    (out / "val-000000.tar").write_bytes(tar_of(entries[:-2]))
    assert main(command) == 2
    assert "holds 5 images of val instead of 6: remove val-*.tar" in capsys.readouterr().err


def test_workers_end_with_the_preparation_that_was_killed(official, tmp_path, main):
    """And while it lives another one is refused."""
    out = tmp_path / "shards"
    command = ["--from", str(official), "--to", str(out), "--any", "--format", "shards", "--short-side", "32"]
    slow = """if True:
        import os, pathlib, sys, time
        from anorm.prepare import imagenet as tool
        with tool.alone(pathlib.Path(sys.argv[1])):
            for _ in tool.in_processes(((split, tool.Job("", [], None, 0, 0)) for split in ["train"] * 9), 2):
                children = pathlib.Path(f"/proc/self/task/{os.getpid()}/children").read_text()
                print(children, flush=True)
                time.sleep(600)
    """
    out.mkdir()
    process = subprocess.Popen([sys.executable, "-c", slow, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) >= 2
        done = subprocess.run([sys.executable, str(TOOL), *command], capture_output=True, text=True)
        assert done.returncode == 2 and "another preparation writes to" in done.stderr
    finally:
        process.kill()
        process.communicate()
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
    assert main(command) == 0


def test_without_room_nothing_is_begun(official, tmp_path, main, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    command = ["--from", str(official), "--to", str(tmp_path / "out"), "--any"]
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        assert main(command) == 2
    assert "are needed" in capsys.readouterr().err
    assert main([*command, "--short-side", "32"]) == 0  # the remedy is not another preparation


@pytest.mark.parametrize("name", [archives.VAL_TAR, archives.DEVKIT])
def test_a_tar_file_that_ends_early_is_explained(official, tmp_path, main, capsys, name):
    content = (official / name).read_bytes()
    (official / name).write_bytes(content[: len(content) // 2])
    assert main(["--from", str(official), "--to", str(tmp_path / "out"), "--any"]) == 2
    said = capsys.readouterr().err
    assert name in said and said.startswith("error: ") and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda folder: None,
            "train has 15 images of 3 classes; ImageNet has 1281167 of 1000: complete the source, or give --any",
        ),
        (
            lambda folder: os.remove(folder / archives.TRAIN_TAR),
            "holds neither ILSVRC2012_img_train.tar nor a train folder",
        ),
        (lambda folder: os.remove(folder / archives.VAL_TAR), "ILSVRC2012_img_val.tar is missing"),
        (lambda folder: (folder / archives.TRAIN_TAR).write_bytes(b"no tar"), "is not a readable tar file"),
        (
            lambda folder: (folder / archives.VAL_TAR).write_bytes(tar_of([("a.JPEG", jpeg(0))])),
            "6 validation images, but there are 1",
        ),
    ],
)
def test_wrong_sources_are_explained(official, tmp_path, main, capsys, spoil, words):
    spoil(official)
    assert main(["--from", str(official), "--to", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") <= 2


def test_a_wrong_official_file_is_found_by_its_md5(official, tmp_path, main, capsys):
    assert main(["--from", str(official), "--to", str(tmp_path / "out"), "--any", "--md5"]) == 2
    assert "has MD5" in capsys.readouterr().err


def test_a_worker_that_meets_a_damaged_image_names_it_in_one_line(official, tmp_path):
    spoiled = tmp_path / "set"
    for split in ("train", "val"):
        (spoiled / split / "cat").mkdir(parents=True)
        (spoiled / split / "cat" / f"{split}.JPEG").write_bytes(jpeg(1) if split == "val" else b"damaged")
    command = ["--from", spoiled, "--to", tmp_path / "out", "--any", "--workers", "2", "--short-side", "32"]
    done = subprocess.run([sys.executable, TOOL, *command], capture_output=True, text=True)
    assert done.returncode == 2 and "train.JPEG is not a readable image" in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_a_file_system_without_locks_is_written_to(official, tmp_path, main, monkeypatch, capsys):
    def no_locks(*arguments):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert main(["--from", str(official), "--to", str(tmp_path / "out"), "--any"]) == 0
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().out


def test_a_source_image_that_cannot_be_read_is_named(official, tmp_path, main, capsys):
    folder = tmp_path / "set"
    for split in ("train", "val"):
        (folder / split / "ant").mkdir(parents=True)
        (folder / split / "ant" / "a.JPEG").write_bytes(b"no image")
    assert main(["--from", str(folder), "--to", str(tmp_path / "out"), "--any", "--short-side", "32"]) == 2
    assert "a.JPEG is not a readable image" in capsys.readouterr().err


# ---- reading shards


@pytest.fixture
def written(official, tmp_path, main):
    out = tmp_path / "shards"
    assert main(["--from", str(official), "--to", str(out), "--format", "shards", "--any"]) == 0
    return out


def test_shards_are_read_at_random_by_any_number_of_workers(written):
    source = create("imagenet_shards", root=str(written), image_size=16)
    alone = list(TrainLoader(source, 0, 6, 3).epoch(0))
    loader = TrainLoader(source, 0, 6, 3, workers=2)
    for ours, theirs in zip(loader.epoch(0), alone, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    loader.close()
    assert sum(len(batch.targets) for batch in EvalLoader(source.val, 4)) == 6


def test_shards_of_others_are_indexed(tmp_path, main):
    for split, count in (("train", 5), ("val", 3)):
        entries = [
            entry
            for i in range(count)
            for entry in ((f"{i:05d}.jpg", jpeg(i)), (f"{i:05d}.cls", str(i % 2).encode()))
        ]
        (tmp_path / f"{split}-0.tar").write_bytes(tar_of(entries[:4]))
        (tmp_path / f"{split}-1.tar").write_bytes(tar_of(entries[4:]))
    with pytest.raises(
        ValueError, match=r"train.index.npz is missing: python tools/prepare_imagenet.py --index"
    ):
        create("imagenet_shards", root=str(tmp_path))
    assert main(["--index", str(tmp_path)]) == 0
    source = create("imagenet_shards", root=str(tmp_path), image_size=16)
    assert source.classes == ["0", "1"] and source.train.labels.tolist() == [0, 1, 0, 1, 0]
    assert source.train.store.read(4).numpy().tobytes() == jpeg(4)


def test_keys_are_cut_at_the_first_dot_of_a_name(tmp_path):
    for folder in ("./", "imagenet-1.0/"):
        entries = [(f"{folder}0001.{kind}", content) for kind, content in (("jpg", jpeg(1)), ("cls", b"0"))]
        (tmp_path / "train-0.tar").write_bytes(tar_of(entries))
        assert shards.write_index(tmp_path, "train") == 1
    (tmp_path / "train-0.tar").write_bytes(tar_of([("README", b"")]))
    with pytest.raises(ValueError, match="hold no images"):
        shards.write_index(tmp_path, "train")


def test_more_shards_than_a_process_may_open(tmp_path):
    """ImageNet has 1,282, and 1,024 is a usual limit. An image that is empty is one that cannot be read."""
    for i in range(60):
        content = jpeg(i) if i else b""
        entries = [(f"{i:05d}.jpg", content), (f"{i:05d}.cls", str(i % 2).encode())]
        for split in ("train", "val"):
            (tmp_path / f"{split}-{i:03d}.tar").write_bytes(tar_of(entries))
    for split in ("train", "val"):
        shards.write_index(tmp_path, split)
    read = f"""if True:
        import resource
        from anorm.data.loaders import TrainLoader
        from anorm.data.sources import create
        resource.setrlimit(resource.RLIMIT_NOFILE, (50, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        source = create("imagenet_shards", root={str(tmp_path)!r}, image_size=16, on_error="skip")
        for workers in (0, 1):
            loader = TrainLoader(source, 0, 20, 20, workers=workers)
            batches = [batch for step in loader.epoch(0) for batch in step]
            assert sum(len(batch.targets) for batch in batches) == 60, batches
            assert list(loader.skipped) == [0], loader.skipped
            loader.close()
        assert 0 < len(source.train.store._files) <= 12
    """
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, cwd=TOOL.parents[1])
    assert done.returncode == 0, done.stderr


def test_an_index_that_no_longer_fits_is_refused(written):
    with open(written / "train-000000.tar", "ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match="of another size than when it was indexed"):
        create("imagenet_shards", root=str(written))
    assert shards.write_index(written, "train", shards.classes_of(written, "train")) == 15
    assert create("imagenet_shards", root=str(written)).classes == WNIDS


def test_a_missing_folder_and_a_missing_label_are_explained(tmp_path):
    with pytest.raises(ValueError, match="data.root=None is not a folder"):
        create("imagenet_shards")
    (tmp_path / "train-0.tar").write_bytes(tar_of([("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("b.cls", b"0")]))
    with pytest.raises(ValueError, match="a has no label"):
        shards.write_index(tmp_path, "train")


def test_shards_can_be_moved(written, tmp_path):
    identity = create("imagenet_shards", root=str(written)).identity
    shutil.move(written, tmp_path / "moved")
    assert create("imagenet_shards", root=str(tmp_path / "moved")).identity == identity
