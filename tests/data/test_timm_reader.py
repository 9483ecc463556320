import io
import json

import pytest
import torch
from photographs import difference, picture, write_folder

from anorm.data.random import stream
from anorm.data.sources import create


def test_timms_folder_reader_gives_what_imagefolder_gives(folder):
    ours = create("timm", reader="folder", root=str(folder), val="val", image_size=20)
    plain = create("imagefolder", root=str(folder), image_size=20)
    assert ours.classes == plain.classes and torch.equal(ours.train.labels, plain.train.labels)
    for i in (0, 8, 20):
        rngs = [stream(0, "augment", i)], [stream(0, "augment", i)]
        assert torch.equal(ours.train.fetch([i], rngs[0]).images, plain.train.fetch([i], rngs[1]).images)


def test_other_files_or_classes_are_another_data_set(tmp_path):
    def identity(*words):
        root = write_folder(tmp_path / words[0])
        for old, new in zip(words[1::2], words[2::2], strict=True):
            for split in ("train", "val"):
                (root / split / old).rename(root / split / new)
        source = create("timm", reader="folder", root=str(root), val="val", image_size=20)
        return source.identity, source.train.identity, source.val.identity

    one = identity("one")
    assert identity("same") == one
    name = sorted(path.name for path in (tmp_path / "one" / "train").iterdir())[0]
    for found, here in zip(identity("classes", name, f"{name}x"), one, strict=True):
        assert found != here
    first = sorted((tmp_path / "same" / "train" / name).iterdir())[0]
    first.rename(first.with_stem("another"))
    source = create("timm", reader="folder", root=str(tmp_path / "same"), val="val", image_size=20)
    assert source.identity != one[0] and source.train.identity != one[1] and source.val.identity == one[2]


def test_hugging_face_parquet(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = {"label": {"names": ["ant", "bee"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    (tmp_path / "set").mkdir()
    for split, count in (("train", 6), ("validation", 4)):
        rows = []
        for i in range(count):
            buffer = io.BytesIO()
            Image.fromarray(picture(i)).save(buffer, "PNG")
            rows.append({"image": {"bytes": buffer.getvalue(), "path": f"{i}.png"}, "label": i % 2})
        table = pyarrow.Table.from_pylist(rows)
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": names}})})
        pyarrow.parquet.write_table(table, tmp_path / "set" / f"{split}-00000.parquet")
    source = create("timm", reader=f"hfds/{tmp_path / 'set'}", root=str(tmp_path / "cache"), image_size=16)
    assert (
        source.classes == ["ant", "bee"]
        and source.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
        and len(source.val) == 4
    )
    assert difference(source.val.decoded(3).permute(1, 2, 0), picture(3)) == 0


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "data.reader is not set"),
        ({"reader": "wds/x"}, "only streams"),
        ({"reader": "hfids/a/b"}, "only streams"),
        ({"reader": "zip/x"}, "use hfds/OWNER/NAME or folder"),
        ({"reader": "folder"}, "needs data.root"),
        ({"reader": "folder", "root": "/nowhere"}, "does not exist"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        create("timm", **options)
