"""anorm/study/shift.py and validate.py --shift: small folders, networks with known answers, accuracies by hand."""

import json
import re
from contextlib import nullcontext

import numpy
import pytest
import torch
from commands import ROOT, script
from PIL import Image
from small_imagenet import SIDE, SYNSETS, Rule, indices, picture, right_among_five, right_first, write_classes

from anorm.config.frozen import Config
from anorm.config.settings import Eval
from anorm.data.loaders import EvalLoader
from anorm.data.sources.base import IMAGENET_MEAN, IMAGENET_STD
from anorm.engine.evaluate import Evaluator
from anorm.processes.world import World
from anorm.registry import create_model
from anorm.study import shift
from anorm.tasks.classification import Classification

CONFIG = Config.compose(
    ROOT / "configs",
    [
        "data=imagefolder",
        f"data.image_size={SIDE}",
        f"data.eval_resize={SIDE}",
        "data.cache=false",
        "hardware=cpu",
        "hardware.dtype=fp32",
    ],
)


RUNNING = Eval()


def on(images, settings=RUNNING):
    model = Rule(IMAGENET_MEAN, IMAGENET_STD)
    loaders = {name: EvalLoader(of_set, 64) for name, of_set in images.items()}
    return Evaluator(Classification(SYNSETS), model, None, loaders, World(), nullcontext, settings, 1)


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    """A folder with all 1,000 classes, by their WordNet ids."""
    return write_classes(tmp_path_factory.mktemp("every") / "sketch")


@pytest.mark.parametrize("name", ["a", "r"])
def test_logits_of_other_classes_are_left_out(name, tmp_path):
    labels = indices(name)
    folder = write_classes(tmp_path / "set", labels)
    (folder / "README.txt").write_text("as in the published archive")
    found = shift.shifted(f"imagenet_{name}", folder, CONFIG, on)
    first = [right_first(label, set(labels)) for label in labels]
    assert found.found["top1"] == pytest.approx(100 * sum(first) / 200)
    assert found.found["top5"] == pytest.approx(100 * sum(map(right_among_five, labels)) / 200)
    assert sum(first) > sum(right_first(label, range(1000)) for label in labels)  # it matters
    assert sorted(found.found.rows["label"].tolist()) == labels
    said = found.words(CONFIG)
    assert "200 images of 200 classes, the logits of the other 800 left out; 8 px of 8, bilinear" in said


def test_all_classes_by_wordnet_id(every):
    found = shift.shifted("imagenet_sketch", every, CONFIG, on).found
    # even classes, and none of the odd; among five the odd ones without the factor 3 (167 of 500 have it)
    assert (found["top1"], found["top5"], found.images) == (50.0, pytest.approx(83.3), 1000)
    assert "left out" not in shift.Shifted("imagenet_sketch", every, 1000, found).words(CONFIG)


def test_numbered_folders_are_numbers(tmp_path):
    """ImageNet-V2 as published: sorted as words 10 comes before 2, and every label would be wrong."""
    found = shift.shifted("imagenet_v2", write_classes(tmp_path / "v2", name=str), CONFIG, on).found
    assert found["top1"] == 50.0 and sorted(found.rows["label"].tolist()) == list(range(1000))


def test_folders_with_other_classes_are_refused(tmp_path, every):
    with pytest.raises(ValueError, match=r"200 class folders of imagenet_r: 800 unknown \(n01440764, "):
        shift.shifted("imagenet_r", every, CONFIG, on)
    few = write_classes(tmp_path / "few", indices("a")[:-2])
    with pytest.raises(ValueError, match=rf"imagenet_a: 2 missing \({SYNSETS[indices('a')[-2]]}, "):
        shift.shifted("imagenet_a", few, CONFIG, on)
    with pytest.raises(ValueError, match="1,000 class folders of imagenet_v2: 802 missing"):
        shift.shifted("imagenet_v2", few, CONFIG, on)
    with pytest.raises(ValueError, match="imagenet_v2: .*nowhere is not a folder"):
        shift.shifted("imagenet_v2", tmp_path / "nowhere", CONFIG, on)


@pytest.fixture(scope="module")
def corruptions(tmp_path_factory, every):
    """noise/gaussian_noise as published in groups, and saturate, which does not count. Severity 5 of the
    former shows the picture of the next class.
    """
    root = tmp_path_factory.mktemp("c")
    bad = root / "severe"
    for label, synset in enumerate(SYNSETS):
        (bad / synset).mkdir(parents=True)
        picture((label + 1) % 1000).save(bad / synset / "0.png")
    for place in (root / "set" / "noise" / "gaussian_noise", root / "set" / "saturate"):
        place.mkdir(parents=True)
        for severity in (1, 2, 3, 4):
            (place / str(severity)).symlink_to(every)
    (root / "set" / "noise" / "gaussian_noise" / "5").symlink_to(bad)
    (root / "set" / "saturate" / "5").symlink_to(every)
    return root / "set"


def test_corruptions(corruptions):
    found = shift.corrupted(corruptions, CONFIG, on)
    # severity 5: the rule says k + 1 where that is even, so it is never right, as k is then odd; else k + 2
    assert found.top1 == {"gaussian_noise": [50.0, 50.0, 50.0, 50.0, 0.0], "saturate": [50.0] * 5}
    assert found.images == 10_000 and found.counted == ["gaussian_noise"] and found.mce is None
    said = found.words(CONFIG)
    assert "top-1 40.0000 %" in said and "mean of 1 corruptions at 5 severities" in said
    assert re.search(r"gaussian_noise +50.00 +50.00 +50.00 +50.00 +0.00 +40.00\n", said)
    assert re.search(r"saturate .* 50.00  not in the means\n", said)
    assert (
        "mCE: not given, as 14 of 15 corruptions are missing (shot_noise, impulse_noise, defocus_blur, ...)"
        in said
    )


def test_images_of_imagenet_c_are_not_enlarged(tmp_path):
    """They are 224 x 224 already: enlarging and cropping them would cut their borders off."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=numpy.uint8)
    for severity in range(1, 6):
        folder = write_classes(tmp_path / "fog" / str(severity))
        Image.fromarray(pixels).save(folder / SYNSETS[0] / "0.png")
    seen = []

    def listen(images):
        seen.append(next(iter(images.values())).sample(0, None)[0])
        return on(images)

    shift.corrupted(tmp_path, CONFIG.having(data={"eval_resize": 2 * SIDE}), listen)
    assert len(seen) == 5
    for image in seen:
        assert numpy.array_equal(image.permute(1, 2, 0).numpy(), pixels)


def test_mce_is_relative_to_alexnet():
    accuracy = {name: [100 - error / 2] * 5 for name, error in shift.ALEXNET_ERRORS.items()}
    found = shift.Corrupted("c", accuracy | {"saturate": [0.0] * 5}, accuracy, 1)
    assert len(accuracy) == 15 and found.mce == pytest.approx(50)
    alexnet = shift.Corrupted(
        "c", {name: [100 - error] * 5 for name, error in shift.ALEXNET_ERRORS.items()}, accuracy, 1
    )
    assert alexnet.mce == pytest.approx(100)
    # fog at 100 percent error by hand: 14 corruptions at half of AlexNet's, one at 100 / 81.9324 of it
    foggy = shift.Corrupted("c", accuracy | {"fog": [0.0] * 5}, accuracy, 1)
    assert foggy.mce == pytest.approx((14 * 50 + 100 * 100 / 81.9324) / 15)
    assert f"mCE {foggy.mce:.2f} %" in foggy.words(CONFIG)


def test_incomplete_corruptions_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="holds no corruption of ImageNet-C: expected folders such as gaussian_noise"
    ):
        shift.corrupted(tmp_path, CONFIG, on)
    (tmp_path / "fog" / "2").mkdir(parents=True)
    with pytest.raises(ValueError, match="fog lacks the severities 1, 3, 4, 5"):
        shift.corrupted(tmp_path, CONFIG, on)


def official(label):
    return f"ILSVRC2012_val_{label + 1:08d}.png"


@pytest.fixture(scope="module")
def validation(tmp_path_factory):
    """The 1,000 classes, whose validation images have their official names: number k + 1 is of class k."""
    root = tmp_path_factory.mktemp("own")
    write_classes(root / "val", file=official)
    return root


def real_config(root):
    return CONFIG.having(data={"root": str(root), "train": "val", "val": "val"})


def test_real_labels(validation, tmp_path):
    """Images 1 to 600 have no label; the odd ones of the others have a second: the next class."""
    labels = [[] if k < 600 else [k] if k % 2 == 0 else [k, (k + 1) % 1000] for k in range(1000)]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    found = shift.real(tmp_path / "real.json", real_config(validation), on)
    assert (found.top1, found.top5, found.images) == (100.0, 100.0, 400)
    assert (found.original["top1"], found.original.images) == (50.0, 1000)
    only_odd = [[k] if k % 2 else [] for k in range(1000)]  # 167 of the 500 come last
    (tmp_path / "real.json").write_text(json.dumps(only_odd))
    found = shift.real(tmp_path / "real.json", real_config(validation), on)
    assert (found.top1, found.top5, found.images) == (0.0, pytest.approx(100 * 333 / 500), 500)
    assert "of the 500 images with ReaL labels" in found.words(CONFIG)


def test_shuffled_batches_are_not_judged_in_the_order_of_the_images(validation, tmp_path):
    (tmp_path / "real.json").write_text(json.dumps([[k] for k in range(1000)]))
    with pytest.raises(ValueError, match="shuffled batches: set eval.stats=running"):
        shift.real(tmp_path / "real.json", real_config(validation), lambda sets: on(sets, Eval(stats="batch")))


def test_of_several_statistics_the_first_is_reported(every):
    several = Eval(stats=["running", "batch"])
    found = shift.shifted("imagenet_sketch", every, CONFIG, lambda sets: on(sets, several)).found
    assert (found["top1"], found.images) == (50.0, 1000)


def test_wrong_real_labels_are_refused(validation, every, tmp_path):
    config, file = real_config(validation), tmp_path / "real.json"
    with pytest.raises(ValueError, match="timm ships is of another number of images than the 1000"):
        shift.real(None, config, on)
    with pytest.raises(ValueError, match=r"there is no file .*real.json"):
        shift.real(file, config, on)
    for content, said in (
        ("[[1]]", "another number of images"),
        ("{", "no JSON file"),
        (json.dumps([[]] * 1000), "no label at all"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=said):
            shift.real(file, config, on)
    file.write_text(json.dumps([[0]] * 1000))
    plain = real_config(every.parent).having(data={"train": every.name, "val": every.name})
    with pytest.raises(ValueError, match="official names of the validation images, and .*0.png has none"):
        shift.real(file, plain, on)


@pytest.fixture(scope="module")
def constant(tmp_path_factory):
    """Weights of a network that says the same of every image: class 999 first, then 998, ..."""
    torch.manual_seed(0)
    model = create_model("convnet", "bn", 1000)
    state = model.state_dict()
    state["fc2.weight"].zero_()
    state["fc2.bias"].copy_(torch.arange(1000) / 100)
    path = tmp_path_factory.mktemp("weights") / "constant.pth"
    torch.save(state, path)
    return path


ARGUMENTS = [
    "arch=convnet",
    "norm=bn",
    "data.image_size=32",
    "hardware=cpu",
    "hardware.workers=0",
    "hardware.threads=1",
    "data.cache=false",
]


def validate(*arguments):
    return script("tools/validate.py").main(list(map(str, arguments)))


def test_as_a_user(constant, tmp_path, capsys):
    """Without own data. The likeliest class of -R is its last one: 1 of 200 images is right, 5 among five."""
    assert SYNSETS[indices("r")[-1]] != SYNSETS[999]  # without the mask nothing would be right
    folder = write_classes(tmp_path / "r", indices("r"))
    assert validate(constant, *ARGUMENTS, "--shift", f"imagenet_r={folder}", "batch_size=64") == 0
    out = capsys.readouterr().out
    assert "imagenet_r (" in out and "top-1 0.5000 % top-5 2.5000 %" in out and "32 px of 37" in out
    assert validate(constant, *ARGUMENTS, "--shift", f"imagenet_a={folder}") == 2
    assert "does not hold the 200 class folders of imagenet_a" in capsys.readouterr().err


def test_wrong_requests(constant, trained, capsys):
    for words, said in (
        (["--shift", "imagenet_q=/x"], "unknown --shift 'imagenet_q': did you mean"),
        (["--shift", "imagenet_r"], "needs a folder: --shift imagenet_r=FOLDER"),
    ):
        assert validate(constant, *ARGUMENTS, *words) == 2
        assert said in capsys.readouterr().err
    assert validate(trained / "bn-0", "--shift", "imagenet_r=/x") == 2
    assert "ImageNet's 1,000 classes, and this one has 4" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sorted by their WordNet ids"):
        shift.check_classes(SYNSETS[::-1])
    shift.check_classes([f"readable {k}" for k in range(1000)])
