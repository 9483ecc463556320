"""tools/table.py: grids, what has been run of them, formats, and running what is missing."""

import csv
import dataclasses
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import fake_slurm
import pytest
import torch
import yaml
from commands import ROOT, SMALL, children_of, environment, script

from anorm.config.frozen import Config
from anorm.config.machine import Machine
from anorm.study import cells, formats, grid, records, tally
from anorm.study.generalization import is_suite
from anorm.study.printed import load, names
from anorm.study.statistics import Interval, mean_interval
from anorm.tasks.classification import Classification

table = script("tools/table.py")
TOP1 = tally.Column(records.Reading("top1"), Classification.metrics["top1"])

OF_ALL = [a for a in SMALL if not a.startswith("norm=")]


def written(folder, axes, overrides=(), **more):
    path = folder / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {"title": "Tiny", "overrides": [*OF_ALL, *overrides], "axes": axes, "seeds": 2} | more,
            sort_keys=False,
        )
    )
    return path


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tools" / "table.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def events(runs, kind):
    return {
        path.parent.name: [e for e in map(json.loads, path.read_text().splitlines()) if e["event"] == kind]
        for path in runs.glob("*/metrics.jsonl")
    }


@pytest.fixture(scope="module")
def two_norms(tmp_path_factory):
    return grid.open_grid(str(written(tmp_path_factory.mktemp("grid"), {"norm": ["bn", "gn"]})))


@pytest.fixture(scope="module")
def filled(two_norms, trained):
    return tally.tally(two_norms, records.find_runs(trained), 3)


def test_the_table_holds_what_the_runs_wrote(filled, trained):
    bn, gn = filled.entries
    finals = [records.open_run(trained / f"bn-{seed}").final for seed in (0, 1)]
    assert bn.value == mean_interval([f["top1"] for f in finals]) and bn.values["top5"].mean == 100
    assert bn.images_per_second == pytest.approx(sum(f["images_per_second"] for f in finals) / 2)
    assert bn.gpu_hours is None  # they ran on a CPU
    assert (list(bn.runs), bn.missing, bn.verdict) == ([0, 1], (2,), "run")
    assert gn.line.versus == "bn" and [c.entry for c in filled.comparisons] == [gn]
    found = filled.comparisons[0]
    assert (
        found.found.difference.mean == pytest.approx(gn.value.mean - bn.value.mean) and found.p == found.found.p
    )
    assert found.found.bootstrap.n == 2
    assert bn.size.all == 269_722 - 6 * 65  # of the network that ran: 4 classes, not 10


def test_commands_of_missing_cells_are_those_of_the_row(filled, two_norms):
    command = shlex.split(formats.missing(filled)[1])
    assert command[:2] == ["python", "train.py"] and command[2:] == [*OF_ALL, "norm=gn", "seed=2"]


def test_formats_parse_back(filled):
    parsed = list(csv.DictReader(io.StringIO(formats.as_csv(filled))))
    assert [p["method"] for p in parsed] == ["bn", "gn"]
    for p, entry in zip(parsed, filled.entries, strict=True):
        assert float(p["top1"]) == pytest.approx(100 - entry.value.mean, abs=1e-4)
        assert float(p["top1_low"]) <= float(p["top1"]) <= float(p["top1_high"])
        assert (
            p["params"] == str(entry.size.all)
            and p["seeds"] == "0 1"
            and p["printed_top1"] == ""
            and p["gpu_hours"] == ""
        )
        assert p["missing"].endswith("seed=2") and p["protocol"] == str(filled.stamp)
    rows = [
        [c.strip() for c in line.strip("|").split(" | ")]
        for line in formats.markdown(filled).splitlines()
        if line.startswith("| ")
    ]
    assert rows[0] == list(formats.columns(filled)) and "printed top-1" not in rows[0]
    assert rows[2][rows[0].index("ours top-1")].startswith(f"{100 - filled.entries[0].value.mean:.2f} ±")
    shown = formats.text(filled)
    assert "inside the noise" in shown or "is better" in shown or "is worse" in shown
    assert "Missing (2 cells" in shown and str(filled.stamp) in shown


@pytest.fixture(scope="module")
def in_latex(filled):
    """A table with results and one of a paper."""
    oddly = dataclasses.replace(filled.grid, title=r"50% & a_b \ {x} #1 ~ ^ <±>")
    odd = dataclasses.replace(filled, grid=oddly)
    printed = tally.tally(grid.select(grid.open_grid("table2"), "†resnet50-gn,mobilenet"), [], 1)
    return {"own": formats.latex(odd), "printed": formats.latex(printed)}


@pytest.mark.parametrize("which", ["own", "printed"])
def test_latex_is_well_formed(in_latex, which):
    written = re.sub(r"(?m)^%.*$", "", in_latex[which])
    opened = re.findall(r"\\(begin|end)\{(\w+)\}", written)
    assert opened == [("begin", "table"), ("begin", "tabular"), ("end", "tabular"), ("end", "table")]
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", written.replace(r"\\", "")):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", written)[1])
    inside = written[written.index(r"\begin{tabular}") : written.index(r"\end{tabular}")]
    body = [line for line in inside.splitlines()[1:] if line and line != r"\hline"]
    assert len(body) > 3 and all(line.endswith(r" \\") for line in body)
    for line in body:
        spans = re.findall(r"\\multicolumn\{(\d+)\}", line)
        assert len(re.split(r"(?<!\\)&", line)) + sum(int(n) - 1 for n in spans) == columns, line
    caption = re.search(r"\\caption.*", written)[0]
    assert not re.search(r"(?<!\\)[%#_~^]", inside + caption)  # all of these do something


def test_what_latex_says(in_latex):
    assert all(words in in_latex["printed"] for words in (r"$\dagger$ResNet50-GN", r"\#Params", "23.52"))
    assert formats.tex(r"50% & a_b \ {x}") == r"50\% \& a\_b \textbackslash{} \{x\}"


LATEX = next(filter(None, map(shutil.which, ("pdflatex", "lualatex", "xelatex", "tectonic"))), None)


@pytest.mark.skipif(LATEX is None, reason="no LaTeX here (apt-get install texlive-latex-base)")
@pytest.mark.parametrize("which", ["own", "printed"])
def test_latex_compiles(in_latex, which, tmp_path):
    whole = rf"\documentclass{{article}}\begin{{document}}{in_latex[which]}\end{{document}}"
    (tmp_path / "t.tex").write_text(whole)
    options = [] if LATEX.endswith("tectonic") else ["-halt-on-error", "-interaction=nonstopmode"]
    command = [LATEX, *options, "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "t.pdf").read_bytes().startswith(b"%PDF")


def test_the_papers_table_on_a_fresh_clone(tmp_path, capsys):
    assert table.main(["table2", "--format", "csv", "--seeds", "1", "--runs", str(tmp_path / "none")]) == 0
    parsed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    rows = load("table2").rows
    assert [(p["method"], p["printed_top1"]) for p in parsed] == [(r.label, str(r.values["top1"])) for r in rows]
    assert {p["verdict"] for p in parsed} == {"not run"}
    by_name = {(p["method"], p["group"][4]): p for p in parsed}
    assert (
        by_name["ResNet50-AN", "V"]["params"] == "25755420"
        and by_name["ResNet50-AN", "S"]["params"] == "25774652"
    )
    assert by_name["ResNet50-BN", "V"]["macs"][:4] == "4089"
    assert (
        by_name["ResNet34+AN", "V"]["missing"]
        == "python train.py setup=vanilla arch=resnet34 norm=an norm.place=text seed=0"
    )
    assert not (tmp_path / "none").exists()


GRIDS = [p.stem for p in sorted((ROOT / "configs" / "grid").glob("*.yaml")) if not is_suite(p)]


@pytest.mark.parametrize("name", [*names(), *GRIDS])
def test_every_grid_composes(name):
    opened = grid.open_grid(name)
    assert opened.comparable == (name in names())
    for line in opened.lines:
        assert line.config.settings.seed == 0 and len(line.likeness) == 10
    if name == "table2":
        versus = {line.label: line.versus for line in opened.lines if line.group == "The Vanilla Setup"}
        assert (
            versus["ResNet34+AN"] == "ResNet34+BN"
            and versus["ResNet50-SE"] == "ResNet50-BN"
            and versus["ResNet50-BN"] is None
        )


def test_verdicts():
    noise = 1.959964 * 0.16 * math.sqrt(1 + 1 / 1)  # 0.443: one seed, the published deviation
    alone = mean_interval([78.0])
    assert (
        tally.verdict(None, None, [], TOP1) == "not run"
        and tally.verdict(None, None, [], TOP1, elsewhere=2) == "other protocol"
    )
    assert tally.verdict(alone, None, [[78.0]], TOP1) == "run"
    assert tally.verdict(alone, noise - 0.01, [[78.0]], TOP1) == "within noise"
    assert (
        tally.verdict(alone, noise + 0.01, [[78.0]], TOP1) == "off (better)"
        and tally.verdict(alone, -noise - 0.01, [[78.0]], TOP1) == "off (worse)"
    )
    three, narrow = mean_interval([78.0, 78.1, 78.2]), [[78.0, 78.1, 78.2]] * 4
    assert (
        tally.verdict(three, 0.05, narrow, TOP1) == "reproduced"
        and tally.verdict(three, 0.5, narrow, TOP1) == "off (better)"
    )
    wide = [[76.0, 78.0, 80.0]] * 4  # noise of several points: an agreement proves nothing
    assert tally.verdict(three, 0.05, wide, TOP1) == "within noise"


def test_gap_to_the_paper(trained):
    """Runs of a printed row are judged against it; runs of a changed protocol are not."""
    line = grid.open_grid(str(written(trained.parent, {"norm": ["bn"]}))).lines[0]
    printed = load("table2").rows[2]
    row = dataclasses.replace(line, printed=printed)
    runs = records.find_runs(trained)
    for comparable in (True, False):
        found = tally.tally(grid.Grid("t", "t", (row,), comparable=comparable), runs, 2).entries[0]
        assert found.gap == (pytest.approx(found.value.mean - (100 - printed.values["top1"])) if comparable else None)
        assert found.verdict.startswith("off" if comparable else "run")


def test_proxy_and_other_changes_are_not_the_papers_protocol():
    proxy = grid.select(grid.open_grid("table3", scale="proxy"), "(w/BN2)")
    assert not proxy.comparable and "proxy protocol" in proxy.notes[0]
    assert proxy.lines[0].config.settings.epochs == 16 and proxy.lines[0].config.data.options["image_size"] == 128
    full = grid.select(grid.open_grid("table3"), "(w/BN2)")
    assert full.lines[0].likeness != proxy.lines[0].likeness
    assert not grid.open_grid("table3", extra=("epochs=3",)).comparable
    assert grid.open_grid("table3", extra=("data.root=/x", "hardware.workers=3", "log.every=5")).comparable
    with pytest.raises(ValueError, match="there is proxy"):
        grid.open_grid("table3", scale="tiny")


def test_unlike_protocols_never_share_a_column(two_norms, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "runs")
    config = tmp_path / "runs" / "gn-0" / "config.yaml"
    config.write_text(config.read_text().replace("dtype: fp32", "dtype: bf16"))
    found = tally.tally(two_norms, records.find_runs(tmp_path / "runs"), 2)
    assert found.stamp.dtype == "fp32" and sorted(found.stamps.values()) == [1, 3]
    assert [list(e.runs) for e in found.entries] == [[0, 1], [1]]
    assert any("another protocol: 1 run of" in note and "bf16" in note for note in found.notes)
    other = tally.tally(two_norms, records.find_runs(tmp_path / "runs"), 2, stamp=2)
    assert [e.verdict for e in other.entries] == ["other protocol", "run"]
    with pytest.raises(ValueError, match="there are 2 protocols"):
        tally.tally(two_norms, records.find_runs(tmp_path / "runs"), 2, stamp=3)
    assert tally.tally(
        two_norms, records.find_runs(trained), 2, columns=tally.columns_of(two_norms, epoch="best")
    ).stamp.epoch == "best"


def test_an_axis_that_holds_for_some_choices_only():
    k = {"when": "norm=an", "values": [5, [5, 5, 10, 10]]}
    axes = {"norm": [{"values": ["bn", "an"]}], "norm.k": [k], "optim.lr": [{"values": [0.1, 0.2]}]}
    found = list(grid.combinations(axes))
    assert len(found) == 6 and found[0] == {"norm": "bn", "optim.lr": 0.1}
    assert {"norm": "an", "norm.k": [5, 5, 10, 10], "optim.lr": 0.2} in found
    assert sum("norm.k" in choice for choice in found) == 4


def test_labels_and_baselines_of_own_grids(tmp_path):
    path = written(
        tmp_path,
        {
            "norm": ["bn", "an"],
            "norm.k": {"when": "norm=an", "values": [[5, 5, 10, 10]]},
            "optim.lr": [0.1, 0.2],
        },
    )
    lines = grid.open_grid(str(path)).lines
    assert [(line.label, line.versus) for line in lines] == [
        ("bn, optim.lr=0.1", None),
        ("bn, optim.lr=0.2", None),
        ("an, norm.k=[5,5,10,10], optim.lr=0.1", "bn, optim.lr=0.1"),
        ("an, norm.k=[5,5,10,10], optim.lr=0.2", "bn, optim.lr=0.2"),
    ]
    assert lines[2].config.norm.options["k"] == [5, 5, 10, 10] and "'norm.k=[5,5,10,10]'" in lines[2].command(0)
    path.write_text("title: x\naxis: {}\n")
    with pytest.raises(ValueError, match="a grid has axes"):
        grid.open_grid(str(path))
    with pytest.raises(ValueError, match="no table 'tabel2': there are table1"):
        grid.open_grid("tabel2")
    with pytest.raises(ValueError, match="no row of tiny"):
        grid.select(dataclasses.replace(grid.Grid("tiny", "t", lines)), "resnet99")


def rates(*values, when=None):
    return {"values": list(values)} | ({"when": when} if when else {})


@pytest.mark.parametrize(
    "axis",
    [
        rates(0.1, 0.2, when="norm=gn"),
        [rates(0.1, 0.2, when="norm=gn"), rates(0.1, when="norm=bn")],
        [rates(0.1, 0.2, when="norm=gn"), rates(0.1, 0.1, when="norm=bn")],
    ],
)
def test_unlike_numbers_of_learning_rates_are_refused(tmp_path, capsys, axis):
    path = written(tmp_path, {"norm": ["bn", "gn"], "optim.lr": axis})
    with pytest.raises(ValueError, match="gn is given 2 learning rates and bn 1: the best of more is better"):
        grid.open_grid(str(path))
    assert table.main([str(path), "--dry"]) == 2 and "learning rates" in capsys.readouterr().err


def test_each_norm_may_have_its_own_learning_rates_as_many_of_them(tmp_path):
    axis = [rates(0.05, 0.1, when="norm=bn"), rates(0.2, 0.4)]
    axes = {"norm": ["bn", "gn", "an"], "norm.k": rates(5, 10, when="norm=an"), "optim.lr": axis}
    path = written(tmp_path, axes)
    lines = grid.open_grid(str(path)).lines
    assert [line.rate for line in lines] == [0.05, 0.1, *[0.2, 0.4] * 3]
    assert {(line.tuned, line.tuned_versus) for line in lines} == {
        ("bn", None),
        ("gn", "bn"),
        ("an, norm.k=5", "bn"),
        ("an, norm.k=10", "bn"),
    }
    with pytest.raises(ValueError, match="optim.lr=0.3: optim.lr is an axis of tiny.yaml already"):
        grid.open_grid(str(path), extra=("optim.lr=0.3",))


def made(folder, source, accuracies, average=None, **settings):
    """A finished run with these accuracies in its epochs, without weights. settings: of its configuration."""
    folder.mkdir(parents=True)
    config = yaml.safe_load((source / "config.yaml").read_text())
    for key, value in settings.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("data.json", "predictions.npz"):
        shutil.copy(source / name, folder)
    left, lines = list(accuracies), []
    for event in map(json.loads, (source / "metrics.jsonl").read_text().splitlines()):
        if event["event"] == "eval":
            event["top1"] = left.pop(0)
            event |= {"ema_top1": average, "ema_top5": 100.0} if average is not None else {}
        if event["event"] == "final":
            best = max(accuracies)
            event |= {"top1": accuracies[-1], "best_top1": best, "best_epoch": 1 + accuracies.index(best)}
        lines.append(json.dumps(event))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return records.open_run(folder)


@pytest.fixture
def tuned(tmp_path, trained):
    """Two norms at two learning rates and two seeds."""
    accuracy = {("bn", 0.1): (50.0, 60.0), ("bn", 0.2): (44.0, 46.0)}
    accuracy |= {("gn", 0.1): (34.0, 38.0), ("gn", 0.2): (70.0, 72.0)}
    runs = []
    for (norm, rate), values in accuracy.items():
        for seed, value in enumerate(values):
            folder = tmp_path / "runs" / f"{norm}-{rate}-{seed}"
            runs.append(made(folder, trained / f"{norm}-{seed}", [10.0, value], optim__lr=rate))
    return grid.open_grid(str(written(tmp_path, {"norm": ["bn", "gn"], "optim.lr": [0.1, 0.2]}))), runs


def test_the_best_learning_rate_of_each_norm_is_selected_in_one_way(tuned):
    opened, runs = tuned
    found = tally.tally(opened, runs, 2)
    selected = [(s.name, s.best.line.rate, len(s.tried)) for s in found.selections]
    assert selected == [("bn", 0.1, 2), ("gn", 0.2, 2)]
    (compared,) = found.comparisons  # of the selected, not of equal rates: 71 - 55
    assert (compared.base.line.label, compared.entry.line.label) == ("bn, optim.lr=0.1", "gn, optim.lr=0.2")
    assert compared.found.difference.mean == pytest.approx(16)
    for text in (formats.text(found), formats.markdown(found), formats.latex(found)):
        assert "learning rate of bn: 0.1 is the best of 2 tried, by the mean accuracy over seeds" in text
        assert "(0.1: 55.00, 0.2: 45.00)" in text
        assert "learning rate of gn: 0.2 is the best of 2 tried" in text
        assert "at the end of their range" in text
        assert "selected on the images that accuracies are of" in text
    parsed = list(csv.DictReader(io.StringIO(formats.as_csv(found))))
    assert [(p["method"], p["selected"]) for p in parsed] == [
        ("bn, optim.lr=0.1", "yes"),
        ("bn, optim.lr=0.2", "no"),
        ("gn, optim.lr=0.1", "no"),
        ("gn, optim.lr=0.2", "yes"),
    ]


def test_nothing_is_selected_before_all_rates_are_finished(tuned):
    opened, runs = tuned
    found = tally.tally(opened, [run for run in runs if run.folder.name != "gn-0.1-1"], 2)
    assert [s.best and s.best.line.rate for s in found.selections] == [0.1, None] and found.comparisons == ()
    assert any(note == "learning rate of gn: not selected, 1 of 2 are finished" for note in found.notes)
    with pytest.raises(ValueError, match=r"unlike numbers of learning rates \(bn 2, gn 1\)"):
        tally.tally(dataclasses.replace(opened, lines=opened.lines[:3]), runs, 2)


def test_averages_of_weights_have_their_own_protocol(tmp_path, trained):
    opened = grid.open_grid(str(written(tmp_path, {"norm": ["bn"]}, ["ema.decay=0.9"])))
    runs = [made(tmp_path / "runs" / "a", trained / "bn-0", [40.0, 50.0], average=61.0, ema__decay=0.9)]
    plain, averaged = (
        tally.tally(opened, runs, 1, columns=tally.columns_of(opened, average=average)) for average in (False, True)
    )
    assert plain.entries[0].value.mean == 50 and averaged.entries[0].value.mean == 61
    assert averaged.stamp.weights == "average of weights (decay 0.9)"
    with pytest.raises(ValueError, match="weights: plain weights and average of weights"):
        records.one_stamp([plain.stamp, averaged.stamp])
    without = grid.open_grid(str(written(tmp_path, {"norm": ["bn"]})))
    runs = [made(tmp_path / "runs" / "b", trained / "bn-0", [40.0, 50.0])]
    none = tally.tally(without, runs, 1, columns=tally.columns_of(without, average=True))  # runs without an average are not shown as such
    assert none.entries[0].value is None and none.entries[0].verdict == "not run"


def test_likeness_is_stable_over_order_and_machine(two_norms):
    config = two_norms.lines[0].config
    held = yaml.safe_load(config.text())
    shuffled = Config.from_text(
        yaml.safe_dump(
            {
                key: dict(reversed(value.items())) if isinstance(value, dict) else value
                for key, value in reversed(held.items())
            },
            sort_keys=False,
        )
    )
    other_machine = config.having(
        hardware={"device": "gpu", "dtype": "fp16", "processes": 8}, run_dir="/y", seed=5
    )
    assert records.likeness(config) == records.likeness(shuffled) == records.likeness(other_machine)
    for section, key, value in (
        ("optim", "lr", 0.3),
        ("norm", "sync", True),
        ("data", "image_size", 33),
        ("eval", "stats", "batch"),
    ):
        assert records.likeness(config) != records.likeness(config.having(**{section: {key: value}})), key
    assert two_norms.lines[0].likeness != two_norms.lines[1].likeness


def test_dry_says_cells_and_hours(capsys, tmp_path, filled):
    assert (
        table.main(
            ["table3", "--dry", "--only", "resnet50-an", "--seeds", "2", "--runs", str(tmp_path / "none")]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "6 cells" in out
        and "device-hours" in out
        and "rough, V100" in out
        and not (tmp_path / "none").exists()
    )
    one, origin = tally.hours(filled.entries[0], list(filled.entries))
    assert origin == "measured" and one == pytest.approx(
        sum(r.final["seconds"] for r in filled.entries[0].runs.values()) / 2 / 3600
    )
    # 1,281,167 images, 120 epochs, 800 images/s
    line = grid.select(grid.open_grid("table2"), "resnet50-bn").lines[0]
    entry = tally.tally(grid.Grid("t", "t", (line,)), [], 1).entries[0]
    assert tally.hours(entry, [])[0] == pytest.approx(1_281_167 * 120 / 800 / 3600, rel=1e-3)


def test_a_cell_is_the_run_that_train_would_make(two_norms, tmp_path, trained):
    found = cells.cells_of(two_norms, 2, tmp_path)
    assert [(c.line.label, c.seed) for c in found] == [("bn", 0), ("gn", 0), ("bn", 1), ("gn", 1)]
    for cell in found:
        assert cell.signature == records.open_run(trained / f"{cell.line.label}-{cell.seed}").signature
        assert cell.folder.parent == tmp_path and cell.folder.name.endswith(f"s{cell.seed}-{cell.signature}")


def test_rows_of_one_network_are_one_cell(two_norms, tmp_path):
    twice = dataclasses.replace(
        two_norms, lines=(two_norms.lines[0], dataclasses.replace(two_norms.lines[0], label="quoted"))
    )
    found = cells.cells_of(twice, 1, tmp_path)
    assert len(found) == 1 and found[0].labels == ("bn", "quoted")


def test_a_failed_cell_stays_visible_until_it_is_retried(two_norms, tmp_path, capsys):
    runs, only = tmp_path / "runs", dataclasses.replace(two_norms, lines=two_norms.lines[:1])
    found = cells.cells_of(only, 1, runs)
    found[0].folder.mkdir(parents=True)
    (found[0].folder / "last.ckpt").write_text("not a checkpoint")
    assert cells.run_cells(found, runs).failed == 1
    failure = cells.Book(runs).failure(found[0].signature)
    assert (
        failure["status"] == 2 and failure["error"].startswith("error:") and "config.yaml" in failure["error"]
    )
    shown = table.with_failures(tally.tally(only, records.find_runs(runs), 1), runs)
    assert any(note.startswith("failed: bn, seed 0: error:") for note in shown.notes)

    (found[0].folder / "last.ckpt").unlink()
    again = cells.run_cells(found, runs)  # not without being asked to
    assert (again.failed, again.finished, again.status) == (1, 0, 1) and "--retry" in capsys.readouterr().out
    assert cells.run_cells(found, runs, retry=True).status == 0
    assert cells.Book(runs).failure(found[0].signature) is None and len(events(runs, "final")) == 1
    assert (
        table.with_failures(tally.tally(only, records.find_runs(runs), 1), runs)
        .notes[0]
        .startswith("accuracy of the last")
    )
    assert cells.run_cells(found, runs).finished == 1 and all(
        len(e) == 1 for e in events(runs, "start").values()
    )


@pytest.mark.slow
def test_two_workers_and_a_killed_one(tmp_path):
    """Whatever dies, in the end every cell is complete and was trained once."""
    path, runs = (
        written(tmp_path, {"norm": ["bn", "gn"]}, ["epochs=20", "checkpoint.every_steps=1"]),
        tmp_path / "runs",
    )
    arguments = (path, "--run", "--seeds", 1, "--runs", runs)
    killed = start(*arguments)
    until(lambda: any(events(runs, "checkpoint").values()))
    [orphan] = children_of(killed.pid, "train.py")
    os.kill(orphan, signal.SIGSTOP)  # it shall not end before the second worker looks
    killed.kill()  # its train.py lives on, and keeps the cell
    killed.wait()
    killed.stdout.close()
    try:
        second = start(*arguments)
        until(lambda: len(events(runs, "checkpoint")) == 2 and all(events(runs, "checkpoint").values()))
        second.send_signal(signal.SIGTERM)
        out, _ = second.communicate(timeout=240)
    finally:
        os.kill(orphan, signal.SIGCONT)
    assert (
        second.returncode == 128 + signal.SIGTERM and "another worker has it" in out and "stopped" in out
    ), out

    until(lambda: not held(runs))
    workers = [start(*arguments) for _ in range(2)]
    outs = [worker.communicate(timeout=240)[0] for worker in workers]
    assert {worker.returncode for worker in workers} == {0}, outs
    for kind, times in (("final", 1), ("train", 40)):  # 20 epochs of 4 steps, every second reported
        assert {name: len(e) for name, e in events(runs, kind).items()} == dict.fromkeys(
            events(runs, kind), times
        ), kind
    # at most the one that was stopped began twice
    assert sorted(len(e) for e in events(runs, "start").values())[-1] <= 2
    # by the configuration that the worker composed when it began, whatever became of the files since
    commands = [e["environment"]["command"] for started in events(runs, "start").values() for e in started]
    assert all(command[1] == "--config" for command in commands)
    last = start(*arguments)
    out, _ = last.communicate(timeout=240)
    assert last.returncode == 0 and "2 finished, 0 failed" in out and "Missing" not in out


@pytest.mark.slow
def test_cells_as_slurm_jobs_are_submitted_once(tmp_path, monkeypatch, capsys):
    """Finished, waiting and failed ones are not submitted again; a failed one is when asked to."""
    cluster, runs = fake_slurm.Slurm(tmp_path / "cluster", monkeypatch), tmp_path / "runs"
    (cluster.folder / "hold").touch()
    path = written(tmp_path, {"norm": ["bn", "gn"]}, ["epochs=1"])
    asked = [
        str(path),
        "--run",
        "--submit",
        "slurm",
        "slurm.gpus_per_node=0",
        "--seeds",
        "1",
        "--runs",
        str(runs),
    ]
    assert table.main(asked) == 0 and "2 submitted" in capsys.readouterr().out
    first, second = cluster.jobs()
    assert table.main(asked) == 0 and cluster.jobs() == [first, second]
    out = capsys.readouterr().out
    assert f"job {first} has it" in out and f"job {second} has it" in out and "0 submitted" in out

    broken = next(
        c.folder for c in cells.cells_of(grid.open_grid(str(path)), 1, runs) if c.line.label == "gn"
    )
    broken.mkdir(parents=True)
    (broken / "last.ckpt").write_text("not a checkpoint")
    (cluster.folder / "hold").unlink()
    assert cluster.wait(first, second) == ["COMPLETED", "FAILED"]
    assert table.main(asked) == 1 and len(cluster.jobs()) == 2
    out = capsys.readouterr().out
    assert (
        "1 finished, 1 failed" in out
        and "0 submitted" in out
        and "failed: gn, seed 0: error:" in out
        and "config.yaml" in out
    )

    (broken / "last.ckpt").unlink()
    assert table.main([*asked, "--retry"]) == 0 and "1 submitted" in capsys.readouterr().out
    assert cluster.wait(cluster.jobs()[-1]) == ["COMPLETED"]
    assert table.main(asked) == 0 and len(cluster.jobs()) == 3
    assert "2 finished, 0 failed, 0 with other workers, 0 submitted" in capsys.readouterr().out


def test_cells_for_machines_with_gpus_have_their_signature(two_norms, tmp_path):
    """The precision is part of it, and is that of the machine that will train."""
    free = [a for a in OF_ALL if not a.startswith("hardware")]
    line = dataclasses.replace(two_norms.lines[0], overrides=(*free, "norm=bn", "batch_size=2"))
    there = Machine(8, 1)
    asked = dataclasses.replace(two_norms, lines=(line,))
    cell, here = (cells.cells_of(asked, 1, tmp_path, machine)[0] for machine in (there, None))
    hardware = yaml.safe_load(cell.config(there).text())["hardware"]
    assert (hardware["device"], hardware["dtype"], hardware["processes"]) == ("gpu", "fp16", "auto")
    explicit = dataclasses.replace(
        asked, lines=(dataclasses.replace(line, overrides=(*line.overrides, "hardware.dtype=fp16")),)
    )
    assert cell.signature == cells.cells_of(explicit, 1, tmp_path, there)[
        0
    ].signature and cell.folder.name.endswith(cell.signature)
    if not torch.cuda.is_available():
        assert cell.signature != here.signature


def held(runs):
    """Whether any cell is taken."""
    book = cells.Book(runs)
    for path in (runs / ".grid").glob("*.lock"):
        with book.taken(path.stem) as lock:
            if lock is None:
                return True
    return False


def until(condition):
    """Wait for what must come; the test's own time limit ends it otherwise."""
    while not condition():
        time.sleep(0.2)


def test_wrong_arguments(tmp_path, capsys):
    assert (
        table.main(["table3", "--run", "slurm.partition=a"]) == 2
        and "add --submit slurm" in capsys.readouterr().err
    )
    assert table.main(["table9"]) == 2 and "there are" in capsys.readouterr().err
    assert table.main(["table3", "--seeds", "0"]) == 2 and "--seeds 0" in capsys.readouterr().err
    assert table.main(["table3", "optim.lrr=3"]) == 2 and "optim.lrr" in capsys.readouterr().err
    assert (
        "±" in formats.shown(Interval(70, 69, 71, 3), TOP1.metric)
        and formats.shown(Interval(70, math.nan, math.nan, 1), TOP1.metric) == "30.00"
    )


@pytest.mark.parametrize(
    "bn, gn, first",
    [
        ((60.0, 60.5), (50.0, 50.5), ""),  # ten points apart, equally in both seeds but for nothing
        (
            (60.0, 50.0),
            (52.0, 58.0),
            "underpowered, the intervals cover every difference: ",
        ),  # 8 better, 8 worse
        ((20.0, 20.5), (10.0, 10.5), "underpowered, bn reaches 20.25 % top-1, less than 30 %: "),
    ],
)
def test_a_grid_that_tells_nothing_apart_says_so_first(bn, gn, first, tmp_path, trained):
    runs = [
        made(tmp_path / "runs" / f"{norm}-{seed}", trained / f"{norm}-{seed}", [10.0, value])
        for norm, values in (("bn", bn), ("gn", gn))
        for seed, value in enumerate(values)
    ]
    opened = grid.open_grid(str(written(tmp_path, {"norm": ["bn", "gn"]})))
    found = tally.tally(opened, runs, 2)
    assert formats.text(found).startswith(f"{first}{opened.name}: ")
    assert formats.markdown(found).startswith(f"## {first}{opened.name}: ")
    assert "GPU-hours" not in formats.markdown(found)  # they ran on a CPU
    assert tally.tally(opened, runs, 3).underpowered is None  # not before it is complete
