"""Metrics by name in tables, pages and comparisons; several evaluation sets and statistics in one run."""

import csv
import dataclasses
import io
import re

import numpy as np
import pytest
import yaml
from commands import SMALL, script, train

from anorm.inside.page import html as of_run
from anorm.study import compare, formats, grid, records, statistics, tally
from anorm.study.page import html
from anorm.study.records import Reading
from anorm.study.statistics import mean_interval
from anorm.tasks import Metric
from anorm.tasks.classification import Classification

table, judge = script("tools/table.py"), script("tools/judge.py")
ECE, TOP1 = Classification.metrics["ece"], Classification.metrics["top1"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A grid of the runs in ``trained``."""
    path = tmp_path_factory.mktemp("grid") / "tiny.yaml"
    overrides = [word for word in SMALL if not word.startswith("norm=")]
    path.write_text(yaml.safe_dump({"title": "Tiny", "overrides": overrides, "axes": {"norm": ["bn", "gn"]}}))
    return path


@pytest.fixture(scope="module")
def two_statistics(tmp_path_factory):
    """Runs that were evaluated under running and under batch statistics."""
    folder = tmp_path_factory.mktemp("pairs")
    for norm in ("bn", "gn"):
        words = [*SMALL, f"norm={norm}", "eval.stats=[running,batch]", f"run_dir={folder}/{norm}"]
        assert train(*words) == 0
    return {norm: records.open_run(folder / norm) for norm in ("bn", "gn")}


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("top1", Reading("top1")),
        ("ece@photo", Reading("ece", "photo")),
        ("top1@photo/batch", Reading("top1", "photo", "batch")),
        ("top1@/recalibrated", Reading("top1", None, "recalibrated")),
        ("top1@a/b", Reading("top1", "a/b")),
        ("top1@a/b/running", Reading("top1", "a/b", "running")),
    ],
)
def test_how_a_number_is_named(word, expected):
    assert Reading.of(word) == expected and str(expected) == word


def test_other_columns_of_a_table(own, trained, capsys):
    arguments = [str(own), "--seeds", "2", "--runs", str(trained), "--metric", "ece,mean_class_accuracy,loss"]
    assert table.main([*arguments, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert "top1" not in rows[0] and [row["method"] for row in rows] == ["bn", "gn"]
    for row in rows:
        finals = [records.open_run(trained / f"{row['method']}-{seed}").final for seed in (0, 1)]
        for name in ("ece", "mean_class_accuracy", "loss"):  # as they are: none of these is shown as an error
            assert float(row[name]) == pytest.approx(np.mean([f[name] for f in finals]), abs=1e-4)
        whole = mean_interval([f["ece"] for f in finals])
        ends = float(row["ece_low"]), float(row["ece_high"])
        assert ends == pytest.approx((whole.low, whole.high), abs=1e-4)
    assert table.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "calibration error, mean class accuracy in percent; loss, ± the 95 %" in shown
    assert "Compared (points of calibration error, lower is better)" in shown
    assert "calibration error of the last epoch (--epoch)" in shown


def test_a_table_names_its_columns_itself(own, trained):
    chosen = own.with_name("chosen.yaml")
    chosen.write_text(own.read_text() + "metrics: [mean_class_accuracy, top1]\n")
    found = tally.tally(grid.open_grid(str(chosen)), records.find_runs(trained), 2)
    assert [column.name for column in found.columns] == ["mean_class_accuracy", "top1"]
    names = list(formats.columns(found))
    assert names.index("ours mean class accuracy") < names.index("ours top-1")
    run = records.open_run(trained / "bn-0")
    assert found.entries[0].runs[0].value(Reading("top1")) == run.final["top1"]


def test_the_page_draws_the_metric(own, trained):
    opened = grid.open_grid(str(own))
    found = tally.tally(opened, records.find_runs(trained), 2, columns=tally.columns_of(opened, ["ece"]))
    page = html(found)
    assert 'aria-label="calibration error on the evaluation images, percent by epoch"' in page
    assert "In points of calibration error, lower is better, against the baseline" in page
    values = [run.evaluations()[0]["ece"] for run in found.entries[0].runs.values()]
    assert f"bn, epoch 1: {np.mean(values):.2f}" in page
    run = records.open_run(trained / "bn-0")
    page = of_run(run, metric="ece")
    assert "calibration error on the evaluation images" in page and "mean class accuracy" in page
    with pytest.raises(ValueError, match="--metric ec: did you mean ece"):
        of_run(run, metric="ec")


def test_judged_over_seeds_where_a_metric_is_no_mean_over_images(trained, capsys):
    sides = [[trained / f"{norm}-{seed}" for seed in (0, 1)] for norm in ("bn", "gn")]
    words = ["--a", *map(str, sides[0]), "--b", *map(str, sides[1])]
    assert judge.main([*words, "--metric", "ece"]) == 0
    said = capsys.readouterr().out
    values = [[records.open_run(folder).final["ece"] for folder in side] for side in sides]
    assert f"gn - bn = {np.mean(values[1]) - np.mean(values[0]):+.2f} points" in said
    assert "metric: points of calibration error, lower is better" in said
    assert "calibration error is no mean over images: the runs are compared over seeds alone" in said
    assert "McNemar" not in said and "seeds resampled" not in said and "gain most" not in said
    assert judge.main([*words, "--metric", "top1"]) == 0 and "McNemar" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("top-1", r"--metric top-1: did you mean top1"),
        ("accuracy", r"--metric accuracy: did you mean mean_class_accuracy"),
        ("top1@photo", r"bn-0 has no top1@photo: it has top1, top5, loss, mean_class_accuracy, ece on val/running"),
    ],
)
def test_a_metric_that_is_not_there(own, trained, capsys, metric, said):
    assert judge.main([str(trained / "bn-0"), str(trained / "gn-0"), "--metric", metric]) == 2
    assert re.search(said, capsys.readouterr().err)
    if "@" not in metric:
        assert table.main([str(own), "--runs", str(trained), "--metric", metric]) == 2
        assert re.search(said, capsys.readouterr().err)


def test_the_better_of_two_depends_on_the_metric():
    less = statistics.compare_methods([9.0, 9.1, 9.2], [7.0, 7.1, 7.3], same_seeds=True)
    assert "an is better" in statistics.words(less, "bn", "an", ECE)
    assert "an is worse" in statistics.words(less, "bn", "an", TOP1)
    loss = statistics.words(less, "bn", "an", Classification.metrics["loss"])
    assert "an - bn = -1.9667 [-2" in loss and "points" not in loss


def test_nothing_is_said_about_seeds_where_their_spread_is_unknown():
    alone = statistics.compare_methods([9.0], [7.0], same_seeds=True, small=None)
    assert alone.detectable is None and alone.seeds_for is None
    assert statistics.words(alone, "a", "b", ECE).endswith("which says nothing about the methods")
    column = tally.Column(Reading("ece"), ECE)
    assert tally.verdict(mean_interval([9.0]), 5.0, [[9.0]], column) == "run"  # no noise to judge by


def test_off_and_selected_follow_the_direction(own):
    lower = tally.Column(Reading("ece"), ECE)
    narrow = [[9.0, 9.1, 9.2]] * 4
    assert tally.verdict(mean_interval([9.0] * 3), 2.0, narrow, lower) == "off (worse)"
    assert tally.verdict(mean_interval([9.0] * 3), -2.0, narrow, lower) == "off (better)"
    line = grid.open_grid(str(own)).lines[0]
    entries = [
        tally.Entry(
            grid.Line("bn", "g", line.overrides, rate=rate, tuned="bn"),
            None, {0: None}, (), {"ece": mean_interval([value])}, None, "run",
        )
        for rate, value in ((0.1, 9.0), (0.2, 7.0))
    ]  # fmt: skip
    assert tally.select_rates(entries, ECE)[0].best.line.rate == 0.2
    assert tally.select_rates(entries, TOP1)[0].best.line.rate == 0.1


def test_errors_are_shown_where_papers_show_errors():
    value = mean_interval([79.0, 79.2])
    assert formats.shown(value, TOP1).startswith("20.90 ± ") and formats.shown(value, ECE).startswith("79.10 ± ")
    assert formats.shown(None, TOP1) == "-"
    plain = Metric("loss", unit="", higher_is_better=False, digits=4)
    assert formats.shown(mean_interval([0.5]), plain) == "0.5000"


def test_statistics_of_one_run_are_kept_apart(two_statistics):
    run = two_statistics["bn"]
    assert run.pairs == [("val", "running"), ("val", "batch")]
    running, batch = (Reading("top1", stats=stats) for stats in ("running", "batch"))
    events = [e for e in run.events if e["event"] == "eval" and e["epoch"] == 2]
    assert [run.value(r) for r in (running, batch)] == [e["top1"] for e in events]
    assert run.value(Reading("top1")) == run.value(running) == run.final["top1"]
    assert run.stamp(Reading("top1")) == run.stamp(running) != run.stamp(batch)
    assert run.stamp(batch).statistics == "batch statistics"
    assert run.stamp(batch).batches == "batches of 8, shuffled by seed 0" and run.stamp(running).batches == ""
    for reading in (running, batch):  # what is stored is of the same evaluation
        assert 100 * run.images(reading)["top1"].mean() == pytest.approx(run.value(reading))
    # group norm's answers depend on no batch: its number stands beside that of any
    other = two_statistics["gn"].stamp(batch)
    assert other.batches == "" and records.one_stamp([other, run.stamp(batch)]) == run.stamp(batch)
    longer = dataclasses.replace(run.stamp(batch), batches="batches of 16, shuffled by seed 0")
    with pytest.raises(ValueError, match="batches: batches of 8, shuffled by seed 0 and batches of 16"):
        records.one_stamp([run.stamp(batch), longer])
    with pytest.raises(ValueError, match="statistics: running statistics and batch statistics"):
        records.one_stamp([run.stamp(running), run.stamp(batch)])


def test_a_table_and_a_comparison_of_several_statistics(two_statistics, own, capsys):
    chosen = own.with_name("pairs.yaml")
    held = yaml.safe_load(own.read_text())
    held["overrides"].append("eval.stats=[running,batch]")
    chosen.write_text(yaml.safe_dump(held | {"metrics": ["top1@/batch", "top1"]}))
    runs = str(two_statistics["bn"].folder.parent)
    assert table.main([str(chosen), "--seeds", "1", "--runs", runs, "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    for row in rows:
        run = two_statistics[row["method"]]
        batch = run.value(Reading.of("top1@/batch"))
        assert float(row["top1@/batch"]) == pytest.approx(100 - batch, abs=1e-4)
        assert float(row["top1"]) == pytest.approx(100 - run.final["top1"], abs=1e-4)
        assert "batch statistics (batches of 8, shuffled by seed 0)" in row["protocol"]
    said = compare.report([two_statistics["bn"]], [two_statistics["gn"]], "top1@val/batch")
    assert "metric: points of top-1 accuracy on val (batch statistics)" in said and "McNemar" in said
