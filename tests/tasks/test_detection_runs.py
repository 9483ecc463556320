"""Detectors on the loop that trains classifiers: runs, kills, processes, evaluation; what a detection task says."""

import json
import signal
import time

import pytest
import torch
from commands import events, run_train, script, start_train, train, weights

from anorm.data.loaders import EvalLoader
from anorm.data.sources import create
from anorm.detection import coco_eval
from anorm.tasks import find
from anorm.tasks.detection import Detection

SMALL = [
    "data=shapes",
    "data.image_size=48",
    "data.train_images=16",
    "data.val_images=6",
    "arch=resnet20",
    "norm=gn",
    "task.width=16",
    "task.hidden=16",
    "task.rois=8",
    "task.proposals=30",
    "task.detections=5",
    "epochs=2",
    "batch_size=2",
    "optim.global_batch=4",
    "schedule.warmup_epochs=0",
    "hardware=cpu",
    "hardware.threads=1",
    "log.tensorboard=false",
    "log.every=1",
]
FAMILIES = ["mask_rcnn", "cascade_mask_rcnn", "htc"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detection") / "run"
    assert train("task=mask_rcnn", *SMALL, f"run_dir={folder}") == 0
    return folder


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_a_run_leaves(finished):
    [last] = events(finished, "final")
    for kind in ("box", "mask"):
        for number in coco_eval.NUMBERS:
            assert -1 <= last[f"{kind}_{number}"] <= 100
    steps = events(finished, "train")
    assert len(steps) == 8 and all(set(Detection.losses) <= set(step) for step in steps)
    found = json.loads((finished / "predictions.json").read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} <= set(found[0])
    card = json.loads((finished / "data.json").read_text())
    assert (card["geometry"], card["resize"], card["classes"][0]) == ("modern", "antialias", "disc")
    assert (finished / "best.ckpt").is_file() and (finished / "weights.safetensors").is_file()


def test_validate_prints_the_numbers_of_the_run(finished, capsys):
    assert script("tools/validate.py").main([str(finished)]) == 0
    out, [last] = capsys.readouterr().out, events(finished, "final")
    assert f"box AP {last['box_ap']:.4f} %" in out and f"mask AP small {last['mask_ap_small']:.4f} %" in out


@pytest.mark.parametrize("family", FAMILIES[1:])
def test_the_other_detectors_run(family, tmp_path):
    assert train(f"task={family}", *SMALL, "epochs=1", f"run_dir={tmp_path / 'run'}") == 0
    [step, *_] = events(tmp_path / "run", "train")
    assert set(find(family).losses) <= set(step)
    assert len(events(tmp_path / "run", "final")) == 1


@pytest.mark.slow
def test_kills_leave_no_trace(finished, tmp_path):
    folder = tmp_path / "run"
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = start_train("task=mask_rcnn", *SMALL, "checkpoint.every_steps=2", f"run_dir={folder}")
        before = len(events(folder, "train")) if folder.is_dir() else 0
        while process.poll() is None and not (
            (folder / "metrics.jsonl").is_file() and len(events(folder, "train")) > before + 2
        ):
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate()
    status, _, err = run_train("task=mask_rcnn", *SMALL, "checkpoint.every_steps=2", f"run_dir={folder}")
    assert status == 0, err
    # the fixture ran in one go, in another process, without checkpoints on the way
    assert same(weights(folder)["model"], weights(finished)["model"])
    assert (folder / "predictions.json").read_bytes() == (finished / "predictions.json").read_bytes()


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one(finished, tmp_path):
    """The micro-batches, and the draws of their samplers, are the same; sums are taken in another order."""
    status, _, err = run_train(
        "task=mask_rcnn", *SMALL, "hardware.processes=2", f"run_dir={tmp_path / 'run'}"
    )
    assert status == 0, err
    one, two = events(finished, "train"), events(tmp_path / "run", "train")
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-3)
    [first], [second] = events(finished, "final"), events(tmp_path / "run", "final")
    assert first.keys() == second.keys()
    # every image's detections are there once
    ids = [found["image_id"] for found in json.loads((tmp_path / "run" / "predictions.json").read_text())]
    assert ids == sorted(ids)


def test_a_network_that_finds_everything_scores_a_hundred():
    """Ground truth as detections, through the judge, the rows and COCO's numbers."""
    source = create("shapes", val_images=24)
    task = find("mask_rcnn")(source.classes)
    judge = task.judge(source.val)
    for batch in EvalLoader(source.val, 5):
        outputs = []
        for index in batch.indices.tolist():
            _, labels, masks, crowd = source.val.draw(index)
            scene = source.val.fetch([index], None).scenes[0]
            boxes = task.geometry.from_xywh(scene.xywh)
            found = {"boxes": boxes, "labels": labels[~crowd], "masks": masks[~crowd]}
            outputs.append(found | {"scores": torch.ones(len(boxes))})
        judge.add(outputs, batch)
    sums, rows = judge.done()
    values = task.metrics_of(sums, rows)
    assert set(values) == set(task.metrics)
    assert {values[f"{kind}_{n}"] for kind in ("box", "mask") for n in ("ap", "ap50", "ap75", "ar100")} == {
        100.0
    }


def test_seeds_of_the_samplers_come_from_the_micro_batch():
    source = create("shapes", train_images=4)
    task = find("mask_rcnn")(source.classes)
    batch = task.example(3, source)
    (images, targets, _, seeds), _ = task.prepare(batch, torch.Generator().manual_seed(1))
    assert len(images) == len(targets) == len(set(seeds)) == 3
    again = task.prepare(batch, torch.Generator().manual_seed(1))[0][3]
    assert seeds == again


def test_mixed_images_are_refused(capsys):
    assert train("task=mask_rcnn", *SMALL, "mix.mixup=0.2") == 2
    assert "mix.mixup=0.2" in capsys.readouterr().err


@pytest.mark.slow
def test_detectors_learn(tmp_path):
    """A few hundred steps find most discs and squares: a tenth of the full default's."""
    options = [
        "arch=resnet18",
        "norm=gn",
        "task.rois=32",
        "epochs=2",
        "data.train_images=400",
        "data.val_images=40",
    ]
    assert (
        train("task=mask_rcnn", "data=shapes", *options, "hardware=cpu", f"run_dir={tmp_path / 'run'}") == 0
    )
    losses = [step["loss"] for step in events(tmp_path / "run", "train")]
    assert losses[-1] < 0.7 * losses[0]
    [last] = events(tmp_path / "run", "final")
    assert last["box_ap50"] > 5


def test_predict_lists_and_draws_what_a_detector_finds(finished, tmp_path, capsys):
    from PIL import Image

    image = create("shapes", image_size=48, val_images=6).val.draw(1)[0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "scene.png")
    arguments = [
        str(finished),
        str(tmp_path / "scene.png"),
        "--least",
        "0.0",
        "--draw",
        str(tmp_path / "out.png"),
    ]
    assert script("tools/predict.py").main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    scores = [float(line.split()[0]) for line in lines]
    assert 0 < len(lines) <= 5 and scores == sorted(scores, reverse=True)
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == (48, 48)
    assert script("tools/predict.py").main([*arguments, "--least", "1.1"]) == 0
    with Image.open(tmp_path / "out.png") as drawn, Image.open(tmp_path / "scene.png") as scene:
        assert drawn.tobytes() == scene.tobytes()


def test_a_drawing_shows_mask_box_and_name():
    from anorm.detection.draw import COLOURS, draw

    image = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    masks[0, 20:30, 20:40] = True
    boxes = torch.tensor([[20.0, 20, 40, 30]])
    found = {"boxes": boxes, "labels": torch.tensor([1]), "scores": torch.tensor([0.9]), "masks": masks}
    drawn = draw(image, found, ["disc"])
    wanted = tuple(round(0.5 * 100 + 0.5 * c) for c in COLOURS[1])
    assert drawn.getpixel((30, 25)) == wanted and drawn.getpixel((50, 35)) == (100, 100, 100)
    assert drawn.getpixel((20, 25)) == COLOURS[1]  # the box's edge
    # the name stands in white on the class's colour
    above = [drawn.getpixel((x, y)) for x in range(18, 60) for y in range(4, 22)]
    assert COLOURS[1] in above and any(min(pixel) > 200 for pixel in above)
