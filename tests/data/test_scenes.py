"""Images with objects: MMDetection's pipeline as stored, COCO files with everything wrong in them, shapes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from anorm.data import bilinear
from anorm.data.loaders import TrainLoader
from anorm.data.scenes import Resize, nearest
from anorm.data.sources import create
from anorm.data.sources.coco import bitmap, learnable, read_annotations
from anorm.data.sources.shapes import boxes_of, run_lengths
from anorm.detection.geometry import GEOMETRIES

ARRAYS = Path(__file__).parents[1] / "detection" / "arrays"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_published_pipeline(number):
    """Resize to at most 200 x 120, mirror, pad to 32: images to a grey level, masks and boxes exactly."""
    case = json.loads((ARRAYS / "pipeline.json").read_text())[number]
    with np.load(ARRAYS / "pipeline.npz") as file:
        key = f"img{number}."
        stored = {k.removeprefix(key): torch.from_numpy(file[k]) for k in file if k.startswith(key)}
    height, width, flipped = case["height"], case["width"], case["flip"]
    resize = Resize(120, 200, "opencv")
    size = resize.size(height, width)
    assert list(size) == stored["legacy.img_shape"].tolist()
    assert resize.scale(height, width) == pytest.approx(float(stored["legacy.scale_factor"]), rel=1e-12)
    made = resize(stored["rgb"].permute(2, 0, 1)).permute(1, 2, 0)
    assert (made.int() - stored["resized_rgb"].int()).abs().max() <= 1
    used = [a for a in case["annotations"] if learnable(a)]
    masks = nearest(torch.stack([bitmap(a, height, width) for a in used]).to(torch.uint8), size)
    masks = masks.flip(-1) if flipped else masks
    kept = torch.from_numpy(np.unpackbits(stored["gt_masks"].numpy(), axis=-1))
    assert torch.equal(kept[:, : size[0], : size[1]], masks)
    semantic = nearest(stored["semantic_in"], size)
    semantic = semantic.flip(-1) if flipped else semantic
    canvas = torch.zeros(stored["legacy.pad_shape"].tolist(), dtype=torch.uint8)
    canvas[: size[0], : size[1]] = semantic
    assert torch.equal(canvas[::8, ::8], stored["semantic_out"])
    xywh = torch.tensor([a["bbox"] for a in used], dtype=torch.float64)
    for name, tolerance in (("legacy", 1e-4), ("modern", 1e-9)):
        boxes = GEOMETRIES[name].ground_truth(
            xywh, (height, width), size, resize.scale(height, width), flipped
        )
        torch.testing.assert_close(boxes, stored[f"{name}.gt_bboxes"].double(), rtol=0, atol=tolerance)


def test_a_resize_to_the_same_size_changes_nothing():
    image = torch.randint(256, (3, 9, 13), dtype=torch.uint8)
    assert torch.equal(bilinear.resize(image, (9, 13)), image)
    assert torch.equal(nearest(image, (9, 13)), image)


GOOD = {
    "images": [
        {"id": 7, "file_name": "a.png", "height": 40, "width": 50},
        {"id": 3, "file_name": "b.png", "height": 60, "width": 40},
    ],
    "annotations": [
        {
            "id": 1,
            "image_id": 7,
            "category_id": 5,
            "bbox": [2, 3, 10, 20],
            "area": 200,
            "iscrowd": 0,
            "segmentation": [[2, 3, 12, 3, 12, 23, 2, 23]],
        },
        {
            "id": 2,
            "image_id": 3,
            "category_id": 90,
            "bbox": [5, 5, 20, 30],
            "area": 600,
            "iscrowd": 0,
            "segmentation": {"size": [60, 40], "counts": [305, 30, 30, 30, 2005]},
        },
        {
            "id": 3,
            "image_id": 3,
            "category_id": 5,
            "bbox": [0, 0, 40, 60],
            "area": 2400,
            "iscrowd": 1,
            "segmentation": {"size": [60, 40], "counts": [0, 2400]},
        },
    ],
    "categories": [{"id": 90, "name": "late"}, {"id": 5, "name": "early"}],
}


def write(root, change=lambda split, content: None, sizes=None):
    from PIL import Image

    for split in ("train2017", "val2017"):
        content = json.loads(json.dumps(GOOD))
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / "annotations").mkdir(exist_ok=True)
        for image in content["images"]:
            size = (sizes or {}).get(image["file_name"], (image["width"], image["height"]))
            Image.new("RGB", size, (90, 120, 30)).save(root / split / image["file_name"])
        change(split, content)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def coco(root, **options):
    return create("coco", str(root), short_side=64, long_side=96, **options)


def test_coco_files(tmp_path):
    source = coco(write(tmp_path))
    # labels go by the order of the ids, whatever the ids are; images likewise
    assert source.classes == ["early", "late"] and source.train.categories == [5, 90]
    assert source.train.shapes.tolist() == [[60, 40], [40, 50]]
    image, boxes, labels, masks, semantic = source.train.read(0, masks=True)
    assert labels.tolist() == [2] and boxes.tolist() == [[5, 5, 20, 30]] and semantic is None  # no crowd
    assert masks.shape == (1, 60, 40) and masks.sum() == 60
    entry, annotations = source.val.truth(0)
    assert entry["id"] == 3 and [a["iscrowd"] for a in annotations] == [0, 1]
    [[batch]] = TrainLoader(source, 0, 2, 2).epoch(0)
    assert [image.dtype for image in batch.inputs] == [torch.uint8] * 2
    assert sorted(tuple(image.shape[1:]) for image in batch.inputs) == [(64, 80), (96, 64)]


def test_the_geometry_chooses_the_resize(tmp_path):
    write(tmp_path)
    assert coco(tmp_path).train.resize.kind == "antialias"
    assert coco(tmp_path, geometry="legacy").train.resize.kind == "opencv"
    assert coco(tmp_path, geometry="legacy", resize="antialias").train.resize.kind == "antialias"


BAD = {
    "an empty box": (lambda c: c["annotations"][0].update(bbox=[2, 3, 0, 5]), "annotation 1 .*a.png.*is empty"),
    "a box of less than nothing": (lambda c: c["annotations"][0].update(bbox=[2, 3, -4, 5]), "is empty"),
    "a box outside": (lambda c: c["annotations"][0].update(bbox=[50, 3, 4, 5]), "outside the image of 50 x 40"),
    "no box": (lambda c: c["annotations"][0].pop("bbox"), "annotation 1 .*not x, y, width, height"),
    "no number": (lambda c: c["annotations"][0].update(bbox=[1, 2, None, 5]), "not x, y, width, height"),
    "two points": (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "less than three points"),
    "no polygon": (lambda c: c["annotations"][0].update(segmentation=[]), "no polygon"),
    "no mask": (lambda c: c["annotations"][0].pop("segmentation"), "neither polygons nor run lengths"),
    "a mask of another size": (
        lambda c: c["annotations"][1]["segmentation"].update(size=[40, 60]), "annotation 2 .*b.png.*mask is of",
    ),
    "runs that do not fill": (
        lambda c: c["annotations"][1]["segmentation"].update(counts=[3, 4]), "do not fill the image",
    ),
    "an unknown category": (lambda c: c["annotations"][0].update(category_id=6), "no category 6"),
    "an unknown image": (lambda c: c["annotations"][0].update(image_id=99), "annotation 1 of image 99: there is no"),
    "an id twice": (lambda c: c["annotations"][1].update(id=1), "annotation 1 .*stands before it"),
    "an image's id twice": (lambda c: c["images"][1].update(id=7), r"image 7 \(b.png\): an image of this id"),
    "a file twice": (lambda c: c["images"][1].update(file_name="a.png"), "image 7 is the same file"),
    "a missing file": (lambda c: c["images"][0].update(file_name="z.png"), "z.png does not exist"),
    "an image of no size": (lambda c: c["images"][0].update(height=0), "height 0 and width 50 are no size"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_is_named_or_passed_over(what, tmp_path, caplog):
    spoil, message = BAD[what]

    def change(split, content):
        # the other image still trains
        extra = {"id": 9, "file_name": "c.png", "height": 40, "width": 40}
        content["images"].append(extra)
        content["annotations"].append(content["annotations"][0] | {"id": 9, "image_id": 9})
        if split == "train2017":
            spoil(content)

    from PIL import Image

    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / split / "c.png")
    write(tmp_path, change)
    with pytest.raises(ValueError, match=f"things are wrong(.|\n)*{message}"):
        coco(tmp_path)
    source = coco(tmp_path, on_error="skip")
    assert len(source.train.annotations.problems) >= 1 and "passed over" in caplog.text
    assert 9 in {source.train.truth(i)[0]["id"] for i in range(len(source.train))}
    for index in range(len(source.train)):
        source.train.read(index, masks=True)


def test_annotations_under_a_pixel_are_passed_over_as_published(tmp_path):
    def change(split, content):
        content["annotations"].append(content["annotations"][0] | {"id": 9, "bbox": [3, 3, 0.6, 12]})
        # one pixel is an object
        content["annotations"].append(content["annotations"][0] | {"id": 10, "bbox": [3, 3, 1, 1]})

    write(tmp_path, change)
    found = read_annotations(tmp_path / "annotations" / "instances_train2017.json", tmp_path / "train2017")
    assert found.problems == [] and found.small == 1
    source = coco(tmp_path)
    assert len(source.train.read(1, masks=True)[1]) == 2
    assert len(source.val.truth(1)[1]) == 3  # evaluation counts all


def test_an_image_of_another_size_than_the_json_says(tmp_path):
    source = coco(write(tmp_path, sizes={"a.png": (51, 40)}))
    with pytest.raises(ValueError, match=r"a.png \(image 7\) is of 51 x 40 pixels, and of 50 x 40"):
        source.train.fetch([1], None)
    source = coco(tmp_path, on_error="skip")
    fetched = source.train.fetch([0, 1], None)
    assert fetched.indices.tolist() == [0] and fetched.bad[0][0] == 1
    # in training the next good one stands in
    fetched = source.train.fetch([1], [torch.Generator()])
    assert fetched.indices.tolist() == [0]


def test_images_without_objects_train_only_when_asked_for(tmp_path):
    def change(split, content):
        content["annotations"] = [a for a in content["annotations"] if a["id"] != 2]  # image 3: a crowd alone

    write(tmp_path, change)
    assert len(coco(tmp_path).train) == 1 and len(coco(tmp_path).val) == 2
    source = coco(tmp_path, empty=True)
    assert len(source.train) == 2
    _, boxes, labels, masks, _ = source.train.read(0, masks=True)
    assert boxes.shape == (0, 4) and masks.shape == (0, 60, 40) and len(labels) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "no JSON"), (b"[]", "no images, annotations, categories"), (b'{"images": []}', "COCO's format")],
)
def test_a_file_of_another_format(content, message, tmp_path):
    write(tmp_path)
    (tmp_path / "annotations" / "instances_train2017.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        coco(tmp_path)


def test_what_a_user_may_get_wrong(tmp_path):
    with pytest.raises(ValueError, match="instances_train2017.json"):
        coco(tmp_path)
    write(tmp_path)
    for options, message in (
        ({"on_error": "stop"}, "error .*skip"),
        ({"resize": "pil"}, "antialias, opencv"),
        ({"semantic_classes": 183}, "stuffthingmaps.*task.semantic_classes=0"),
    ):
        with pytest.raises(ValueError, match=message):
            coco(tmp_path, **options)


def test_semantic_maps(tmp_path):
    from PIL import Image

    write(tmp_path)
    folder = tmp_path / "stuffthingmaps" / "train2017"
    folder.mkdir(parents=True)
    for name, size, value in (("a", (50, 40), 17), ("b", (40, 60), 255)):
        Image.new("L", size, value).save(folder / f"{name}.png")
    source = coco(tmp_path, semantic_classes=183)
    scene = source.train.fetch([1], [torch.Generator()]).scenes[0]
    assert scene.semantic.shape == scene.image.shape[1:] and scene.semantic.unique().tolist() == [17]
    assert source.val.fetch([0], None).scenes[0].semantic is None


def test_steps_hold_the_same_images_in_groups_of_one_aspect():
    shapes = torch.tensor([[30, 40], [40, 30], [40, 30], [30, 40]] * 8)
    scenes = create("shapes", train_images=32, val_images=1).train
    scenes.shapes = shapes
    order = scenes.order(torch.Generator().manual_seed(2), 8)
    plain = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    assert sorted(order.tolist()) == list(range(32))
    for step, mixed in zip(order.split(8), plain.split(8), strict=True):
        assert set(step.tolist()) == set(mixed.tolist())
        wide = (shapes[step, 1] > shapes[step, 0]).tolist()
        assert wide in (sorted(wide), sorted(wide, reverse=True))
    # neither kind always comes first, so no process sees one kind alone
    starts = {int(shapes[step[0], 1] > shapes[step[0], 0]) for step in order.split(8)}
    assert starts == {0, 1}


def test_shapes_are_the_same_at_every_call_and_differ_between_splits():
    source = create("shapes", train_images=40, val_images=20)
    for index in range(3):
        one, other = source.train.draw(index), source.train.draw(index)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(source.train.draw(0)[0], source.val.draw(0)[0])
    assert source.train.identity != create("shapes", train_images=40, val_images=20, most=3).train.identity


def test_shapes_hold_what_detection_meets():
    train = create("shapes", train_images=150).train
    drawn = [train.draw(i) for i in range(150)]
    areas = torch.cat([masks.sum((1, 2)) for _, _, masks, _ in drawn])
    assert any(len(labels) == 0 for _, labels, _, _ in drawn) and any(crowd.any() for *_, crowd in drawn)
    assert areas.min() >= 12 and areas.min() < 40 and areas.max() > 96 * 96 / 5
    assert {int(label) for _, labels, _, _ in drawn for label in labels} == {1, 2, 3, 4, 5}
    # masks hold what is seen, so none overlap; boxes are around them
    for _, _, masks, _ in drawn:
        assert masks.sum(0).max() <= 1 if len(masks) else True
        for mask, (x, y, w, h) in zip(masks, boxes_of(masks).int().tolist(), strict=True):
            assert mask[y : y + h, x : x + w].sum() == mask.sum()
            assert mask[y].any() and mask[y + h - 1].any() and mask[:, x].any() and mask[:, x + w - 1].any()


def test_run_lengths_of_shapes_are_cocos():
    from anorm.detection.coco_eval import decode_mask

    for _, _, masks, _ in (create("shapes").train.draw(i) for i in range(4)):
        for mask in masks:
            assert torch.equal(decode_mask({"size": list(mask.shape), "counts": run_lengths(mask)}), mask)
    assert run_lengths(torch.tensor([[True, False], [True, False]])) == [0, 2, 2]


def test_scenes_without_objects_and_semantic_maps_of_shapes():
    train = create("shapes", semantic_classes=6).train
    for index in range(40):
        image, boxes, labels, masks, semantic = train.read(index, masks=True)
        assert len(boxes) == len(labels) == len(masks) and semantic.shape == image.shape[1:]
        if len(masks):
            assert set(labels.tolist()) <= set(semantic.unique().tolist())
    with pytest.raises(ValueError, match="semantic_classes=3"):
        create("shapes", semantic_classes=3)


def test_the_report_of_a_data_set(tmp_path):
    import subprocess
    import sys

    def run(*arguments):
        program = Path(__file__).parents[2] / "tools" / "check_coco.py"
        done = subprocess.run([sys.executable, program, tmp_path, *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    def change(split, content):
        if split == "val2017":
            content["annotations"][0]["bbox"] = [2, 3, 0, 5]

    write(tmp_path, change, sizes={"b.png": (41, 60)})
    code, text = run("train2017")
    assert code == 0 and "2 images, 0 of them without objects" in text and "2 objects" in text
    assert "1 crowds" in text and "0 things are wrong" in text
    code, text = run("--images")
    assert code == 1 and "its box [2, 3, 0, 5] is empty" in text and "is of 41 x 60 pixels" in text
    code, text = run("test2017")
    assert code != 0 and "instances_test2017.json" in text and "Traceback" not in text
