import pytest
import torch
from pictures import picture

from anorm.data.random import stream
from anorm.data.sources import create


def test_timms_folder_reader_gives_what_imagefolder_gives(folder):
    ours = create("timm", reader="folder", root=str(folder), val="val", image_size=20)
    plain = create("imagefolder", root=str(folder), image_size=20)
    assert ours.classes == plain.classes and torch.equal(ours.train.labels, plain.train.labels)
    for i in (0, 8, 20):
        rngs = [stream(0, "augment", i)], [stream(0, "augment", i)]
        assert torch.equal(ours.train.fetch([i], rngs[0]).images, plain.train.fetch([i], rngs[1]).images)


def test_hugging_face_parquet(tmp_path):
    datasets = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    from PIL import Image

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])})
    for split, count in (("train", 6), ("validation", 4)):
        rows = {"image": [Image.fromarray(picture(i)) for i in range(count)], "label": [i % 2 for i in range(count)]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "set" / f"{split}-00000.parquet")
    source = create("timm", reader=f"hfds/{tmp_path / 'set'}", root=str(tmp_path / "cache"), image_size=16)
    assert source.classes == ["ant", "bee"] and source.train.labels.tolist() == [0, 1, 0, 1, 0, 1] and len(source.val) == 4
    assert source.val.fetch([3], None).images.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("options, words", [
    ({}, "data.reader is not set"),
    ({"reader": "wds/x"}, "only streams"), ({"reader": "hfids/a/b"}, "only streams"),
    ({"reader": "zip/x"}, "use hfds/OWNER/NAME or folder"),
    ({"reader": "folder"}, "needs data.root"),
    ({"reader": "folder", "root": "/nowhere"}, "does not exist"),
])
def test_what_cannot_be_read_exactly_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        create("timm", **options)
