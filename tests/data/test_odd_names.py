"""Names are bytes: whatever stands in them is listed, read, cached, printed, put into shards, JSON and text, and read again."""

import json
import os
import tarfile

import pytest
from photographs import age, picture
from PIL import Image

from anorm.data import shards
from anorm.data.loaders import EvalLoader, TrainLoader
from anorm.data.sources import create
from anorm.words import printable

BYTES = [bytes([value]) for value in range(1, 256) if value != ord("/")]
CLASSES = [b"caf\xe9", b"caf\xc3\xa9", b"a b=c", b"-n", b"off", b"2012", b"x\ny", b"\xff\xfe"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A class with a file for each byte that a name may hold, and classes with odd names; a file a class in val."""
    root = tmp_path_factory.mktemp("odd") / "s\xe9t"
    path = root.parent / "image.jpg"
    Image.fromarray(picture(0, 12, 12)).save(path)
    content = path.read_bytes()
    for split in ("train", "val"):
        for name in CLASSES:
            folder = os.path.join(os.fsencode(root / split), name)
            os.makedirs(folder)
            files = (
                [b"x" + byte + b".JPEG" for byte in BYTES]
                if (split, name) == ("train", b"off")
                else [b"1.jpg"]
            )
            for file in [*files, b"n" * 250 + b".jpg"]:
                with open(os.path.join(folder, file), "wb") as out:
                    out.write(content)
    age(root)
    return root


def assert_plain(text):
    """It goes into a text file of lines, to a terminal and into JSON."""
    assert (
        text.isprintable() and text.encode("utf-8").decode() == text and json.loads(json.dumps(text)) == text
    )


def test_every_byte_in_a_name_is_listed_read_and_printed(root):
    first = create("imagefolder", root=str(root), image_size=8)
    again = create("imagefolder", root=str(root), image_size=8)  # from the cache
    plain = create("imagefolder", root=str(root), image_size=8, cache=False)
    assert len(first.train) == len(BYTES) + 2 * len(CLASSES) - 1
    assert first.identity == again.identity == plain.identity
    fetched = again.train.fetch(range(len(again.train)), None)
    assert len(fetched.indices) == len(again.train) and not fetched.bad
    for text in (*first.classes, *(again.train.store.name(i) for i in range(len(again.train)))):
        assert_plain(text)
    assert again.classes == sorted(map(printable, map(os.fsdecode, CLASSES)), key=again.classes.index)
    assert "caf\\xe9" in again.classes and "caf\xe9" in again.classes and "x\\ny" in again.classes


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("loader", ["torch", "device", "dali"])
def test_a_bad_file_of_any_name_is_skipped_and_named(root, tmp_path, loader, workers, caplog):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="the extra anorm[dali] is not installed")
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(3):
            Image.fromarray(picture(i, 12, 12)).save(tmp_path / split / "a" / f"{i}.jpg")
        for name in (b"caf\xe9.JPEG", b"a\nb\x1b[31m.JPEG"):
            with open(os.path.join(os.fsencode(tmp_path / split / "a"), name), "wb") as out:
                out.write(b"\xff\xd8\xff damaged")
    source = create("imagefolder", root=str(tmp_path), image_size=8, on_error="skip", loader=loader)
    train, val = TrainLoader(source, 0, 5, 5, workers=workers), EvalLoader(source.val, 2, workers=workers)
    assert sum(len(batch.indices) for step in train.epoch(0) for batch in step) == 5
    assert sum(len(batch.indices) for batch in val) == 3
    for found in (train, val):
        assert len(found.skipped) == 2
        assert all("readable image" in message for message in found.skipped.values())
        assert {"caf\\xe9.JPEG" in message for message in found.skipped.values()} == {True, False}
        for message in found.skipped.values():
            assert_plain(message)
        found.close()
    assert "caf\\xe9.JPEG" in caplog.text and "\x1b" not in caplog.text


def test_shards_hold_keys_of_any_length_and_bytes(tmp_path):
    keys = [os.fsdecode(b"x" + byte) for byte in BYTES if byte != b"."]  # which ends WebDataset's key
    keys += ["n" * length for length in (96, 97, 100, 101, 155, 156, 250)]
    content = b"\xff\xd8\xff image"
    for split in ("train", "val"):
        path = tmp_path / f"{split}-000000.tar"
        shards.write_shard(path, [(key, content + str(i).encode(), i % 3) for i, key in enumerate(keys)])
        assert shards.write_index(tmp_path, split) == len(keys)
    store = shards.ShardStore(tmp_path, "train")
    for i, key in enumerate(keys):
        assert os.fsdecode(store.key[i]) == key and int(store.labels[i]) == i % 3
        assert store.read(i).numpy().tobytes() == content + str(i).encode()
        assert_plain(store.name(i))
    assert len(store.digest()) == 32


def test_shards_of_ordinary_keys_have_the_bytes_they_always_had(tmp_path):
    """A preparation that an earlier version began goes on: plain ustar headers, where these hold the name."""
    samples = [(f"n01440764_{i}", bytes([i]) * 700, i) for i in range(5)]
    shards.write_shard(tmp_path / "a.tar", samples)
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, encoded, label in samples:
            for name, content in ((f"{key}.jpg", encoded), (f"{key}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                (tmp_path / "content").write_bytes(content)
                with open(tmp_path / "content", "rb") as file:
                    tar.addfile(member, file)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    def samples():
        yield "a", b"content", 0
        raise ValueError("bad source")

    with pytest.raises(ValueError, match="bad source"):
        shards.write_shard(tmp_path / "train-000000.tar", samples())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name, shown",
    [
        (b"plain name.jpg", "plain name.jpg"),
        ("caf\xe9 \u4e2d\U0001f600".encode(), "caf\xe9 \u4e2d\U0001f600"),
        (b"caf\xe9", "caf\\xe9"),
        (b"a\nb\tc\x07", "a\\nb\\tc\\x07"),
        ("a\u2028b\xa0c".encode(), "a\\u2028b\\xa0c"),  # what str.splitlines, or nobody, sees
    ],
)
def test_printable(name, shown):
    assert printable(os.fsdecode(name)) == shown
