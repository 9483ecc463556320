"""table.py --weights: files in the authors' naming fill the rows of their networks, with a protocol."""

import csv
import dataclasses
import io
import json

import pytest
import torch
from commands import SMALL, script
from published_weights import NAMES, state
from small_imagenet import SYNSETS, picture, write_classes

from anorm.study import grid, published, records, tally
from anorm.tasks.classification import Classification

table, TOP1 = script("tools/table.py"), Classification.metrics["top1"]

ROWS = {  # of table 2, for the files' names do not matter
    "mobilenetv2_bn": "MobileNetV2-BN",
    "mobilenetv2_an": "MobileNetV2-AN",
    "resnet50_an": "ResNet50-AN",
    "resnet101_an": "ResNet101-AN",
    "densenet121_an": "DenseNet121-AN",
    "resnet34_an_bn2": "ResNet34+AN",
    "resnet50_se_bn3": "†ResNet50-SE",  # the row under it is of the same network and recipe
}


def empty(name):
    """The names and shapes of a published file."""
    entries = [*NAMES[name]["params"], *NAMES[name]["buffers"]]
    return {key: torch.empty(shape, device="meta") for key, shape in entries}


@pytest.fixture(scope="module")
def table2():
    return grid.open_grid("table2")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder of files that hold nothing, and what reading them gives."""
    known = {}
    monkeypatch.setattr(published, "read_state", lambda path: known[path.relative_to(tmp_path).as_posix()])

    def make(**named):
        for path, name in named.items():
            path = path.replace("__", "/") + ".pth"
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
            known[path] = empty(name)
        return tmp_path

    return make


def test_each_file_finds_the_row_of_its_network(table2, files):
    folder = files(**{f"file{i}": name for i, name in enumerate(ROWS)})
    (folder / "README.md").write_text("not weights")
    found = {m.file.stem: (m.line.label, m.line.group) for m in published.match(table2, folder)}
    assert found == {f"file{i}": (label, "The Vanilla Setup") for i, label in enumerate(ROWS.values())}


def test_the_deep_stem_is_the_state_of_the_art_setup(table2, files):
    (found,) = published.match(table2, files(a="resnet50_an_deepstem"))
    assert (found.line.label, found.line.group) == ("ResNet50-AN", "The State-of-the-Art Setup")


def test_one_network_in_two_setups_is_told_apart_by_a_word_of_the_path(table2, files):
    with pytest.raises(
        ValueError,
        match=r"a.pth could be of any of .*AOGNet12M-AN \(The Vanilla Setup\), AOGNet12M-AN \(The State",
    ):
        published.match(table2, files(a="aognet12m_an"))
    only = grid.select(table2, "the vanilla setup")
    assert published.match(only, files(a="aognet12m_an"))[0].line.group == "The Vanilla Setup"
    folder = files(**{"sota__a": "aognet12m_an", "aog-vanilla": "aognet12m_an"})
    (folder / "a.pth").unlink()
    found = {m.file.relative_to(folder).as_posix(): m.line.group for m in published.match(table2, folder)}
    assert found == {"sota/a.pth": "The State-of-the-Art Setup", "aog-vanilla.pth": "The Vanilla Setup"}


def test_a_network_that_no_row_has(table2, files):
    folder = files(a="resnet34_an_bn1")  # the published one: the code has AN at another place than the paper
    (found,) = published.match(table2, folder)
    assert found.line is None
    notes = table.with_misfits(table2, [found], "paper").notes
    assert "a.pth: fits no row of this table after the paper; --faithful code has other networks" in notes[0]
    (found,) = published.match(grid.open_grid("table2", "code"), folder)
    assert found.line.label == "ResNet34+AN"


def test_two_files_of_one_row_and_none(table2, files, tmp_path):
    with pytest.raises(ValueError, match=r"a.pth and .*b.pth both are the network of ResNet50-AN"):
        published.match(table2, files(a="resnet50_an", b="resnet50_an"))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none holds no weights: files that end in .pth"):
        published.match(table2, tmp_path / "none")
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        published.match(table2, tmp_path / "nowhere")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """MobileNetV2 with BN and AN in the published naming; the classifiers say the same of every image: class
    7 first, and class 11.
    """
    folder = tmp_path_factory.mktemp("weights")
    for name, favourite in (("mobilenetv2_bn", 7), ("mobilenetv2_an", 11)):
        found = {
            key: value.float()
            for key, value in state([*NAMES[name]["params"], *NAMES[name]["buffers"]]).items()
        }
        (classifier,) = {key.rpartition(".")[0] for key, value in found.items() if value.shape[:1] == (1000,)}
        found[f"{classifier}.weight"].zero_()
        found[f"{classifier}.bias"] = -(torch.arange(1000.0) - favourite).abs()
        torch.save({"state_dict": found}, folder / f"{name}.pth")
    (folder / "notes.txt").write_text("where they are from")
    return folder


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """An image of each of the 1,000 classes, and two more of class 7."""
    root = tmp_path_factory.mktemp("imagenet")
    write_classes(root / "val")
    for name in ("1.png", "2.png"):
        picture(7).save(root / "val" / SYNSETS[7] / name)
    return root


def arguments(imagenet, weights, runs, *more):
    data = [
        "data=imagefolder",
        f"data.root={imagenet}",
        "data.train=val",
        "data.val=val",
        "data.image_size=32",
    ]
    where = ["data.cache=false", "hardware=cpu", "hardware.workers=0", "hardware.threads=1", "batch_size=64"]
    where += ["optim.global_batch=64"]
    return [
        "table2",
        "--only",
        "mobilenet",
        "--weights",
        str(weights),
        "--runs",
        str(runs),
        *more,
        *data,
        *where,
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_published_weights_fill_the_table(imagenet, weights, runs, capsys):
    assert table.main(arguments(imagenet, weights, runs, "--format", "csv")) == 0
    out, err = capsys.readouterr()
    rows = {row["method"]: row for row in csv.DictReader(io.StringIO(out))}
    # 1,002 images, three of them of class 7; among five of 7: 5, 6, 7, 8, 9; of 11: 9 to 13
    assert float(rows["MobileNetV2-BN"]["top1"]) == pytest.approx(100 - 100 * 3 / 1002, abs=1e-4)
    assert float(rows["MobileNetV2-BN"]["top5"]) == pytest.approx(100 - 100 * 7 / 1002, abs=1e-4)
    assert float(rows["MobileNetV2-AN"]["top1"]) == pytest.approx(100 - 100 * 1 / 1002, abs=1e-4)
    assert float(rows["MobileNetV2-AN"]["top5"]) == pytest.approx(100 - 100 * 5 / 1002, abs=1e-4)
    for row in rows.values():
        assert "1,002 images of imagefolder-" in row["protocol"] and "published weights" in row["protocol"]
        assert (row["missing"], row["images_per_second"], row["gpu_hours"]) == ("", "", "")
        assert row["verdict"] == "run"  # of these images nothing is printed
    assert (
        "1 of 2: " in err
        and "mobilenetv2_bn.pth: MobileNetV2-BN (The Vanilla Setup), top-1 0.30 % top-5 0.70 % of 1002 images" in err
    )

    results = sorted((runs / ".published").glob("*/result.json"))
    before = [path.stat().st_mtime_ns for path in results]
    assert len(results) == 2 and json.loads(results[0].read_text())["images"] == 1002
    page = runs / "page.html"
    assert table.main(arguments(imagenet, weights, runs, "--format", "markdown", "--html", str(page))) == 0
    assert [path.stat().st_mtime_ns for path in results] == before  # kept, not evaluated again
    out = capsys.readouterr().out
    assert "* accuracy of published weights (--weights)" in out and "one pair of runs" in out
    assert "published weights" in page.read_text()


def test_images_of_published_weights_can_be_compared(runs):
    images = [
        records.open_images(path.with_name("predictions.npz")) for path in sorted((runs / ".published").glob("*/result.json"))
    ]
    assert not images[0].difference(images[1])
    assert sorted(int(found["predicted"][0]) for found in images) == [7, 11] and sorted(
        found["top1"].sum() for found in images
    ) == [1, 3]


def test_they_never_share_a_column_with_runs(trained):
    """Of one row there are own runs and published weights, of the same network and recipe."""
    run = records.open_run(trained / "bn-0")
    reading = records.Reading("top1")
    protocol = dataclasses.replace(run.stamp(reading), weights=published.PUBLISHED, epoch="published")
    found = {"top1": 50.0, "top5": 100.0, "images": 21}
    other = published.Published(
        run.likeness, {("val", "running"): published.Kept(trained / "elsewhere", found, protocol)}
    )
    line = grid.Line("bn", "g", tuple(SMALL))
    assert line.likeness == run.likeness
    both = tally.tally(grid.Grid("t", "t", (line,)), [run, records.open_run(trained / "bn-1"), other], 2)
    assert both.stamp == protocol and both.entries[0].value.mean == 50.0 and len(both.entries[0].runs) == 1
    assert any("not shown, another protocol: 2 runs" in note for note in both.notes)
    ours = tally.tally(
        grid.Grid("t", "t", (line,)), [run, records.open_run(trained / "bn-1"), other], 2, stamp=1
    )
    assert ours.stamp == run.stamp(reading) and set(ours.entries[0].runs) == {0, 1}
    with pytest.raises(
        ValueError, match="weights: published weights and plain weights|weights: plain weights and published"
    ):
        records.one_stamp([protocol, run.stamp(reading)])


def test_the_verdict_on_published_weights():
    assert tally.same_weights(0.1, TOP1) == tally.same_weights(-0.1, TOP1) == "as printed"
    assert tally.same_weights(0.11, TOP1) == "off (better)" and tally.same_weights(-0.11, TOP1) == "off (worse)"


def test_a_dry_look_evaluates_nothing(imagenet, weights, tmp_path, capsys):
    assert table.main(arguments(imagenet, weights, tmp_path / "runs", "--dry")) == 0
    assert "mobilenetv2_an.pth: MobileNetV2-AN (The Vanilla Setup)" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_wrong_requests(weights, tmp_path, capsys):
    assert table.main(["table2", "--weights", str(weights), "--run"]) == 2
    assert "leave out --run" in capsys.readouterr().err
    assert table.main(["table2", "--weights", str(tmp_path)]) == 2
    assert "holds no weights" in capsys.readouterr().err
    (tmp_path / "a.pth").write_bytes(b"<html>")
    assert table.main(["table2", "--weights", str(tmp_path)]) == 2
    assert "a.pth is damaged" in capsys.readouterr().err
