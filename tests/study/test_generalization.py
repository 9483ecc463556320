"""Tables over domains, levels and backbones: their files, and what a small one says of real runs."""

import csv
import io

import numpy as np
import pytest
import yaml
from commands import ROOT, events, script
from PIL import Image

from anorm.data.corruptions import CORRUPTIONS, MAIN
from anorm.study import generalization as g
from anorm.study.printed import names

SUITES = sorted(
    path for folder in ("table", "grid") for path in (ROOT / "configs" / folder).glob("afn_*.yaml")
)
PAPER = [path for path in SUITES if path.parent.name == "table"]


def test_there_are_the_papers_six_tables():
    assert [path.stem for path in PAPER] == [f"afn_table{n}" for n in range(1, 7)]
    assert not {path.stem for path in SUITES} & set(names())


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_a_table_composes_and_its_mean_is_the_mean_of_its_columns(path):
    suite = g.open_suite(path)
    first = suite.rows[0]
    for row in suite.rows:
        config = suite.line(row, next(iter(suite.runs))).config
        assert (config.settings.eval.stats == ["running", "batch"]) == row.both
        assert config.norm.name in row.overrides[-1]
        if suite.mean and row.printed:
            mean = np.mean([row.printed[column.name] for column in suite.columns])
            assert row.printed[suite.mean] == pytest.approx(mean, abs=0.11), (
                row.label
            )  # printed with one digit
    assert first.both and suite.line(first, next(iter(suite.runs))).config.norm.name == "bn"


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_printed_numbers_stand_in_the_text_of_the_table(path):
    """A control of the transcription that needs no paper: AFN is the best row wherever the paper says so."""
    suite = g.open_suite(path)
    rows = {row.label.replace("RSC+", ""): row.printed for row in suite.rows if row.printed}
    gains = {"afn_table1": 0.9, "afn_table2": 1.3, "afn_table3": 1.6, "afn_table4": 0.2}
    if path.stem in gains:  # the last row of the printed tables
        gap = rows["AFN"][suite.mean] - rows["ASRNorm"][suite.mean]
        assert gap == pytest.approx(gains[path.stem], abs=0.051)
    else:
        for name, value in rows["AFN"].items():
            assert value > rows["BatchNorm"][name] and value > rows["ASRNorm"].get(name, 0)


def test_columns_take_the_sets_that_their_patterns_name():
    level = g.Column("Level 1", "cifar10_c*-1")
    sets = [f"cifar10_c_like-{name}-{s}" for name in CORRUPTIONS for s in range(1, 6)]
    assert sum(level.takes("CIFAR-10", images) for images in ("test", *sets)) == 19
    photo = g.Column("Photo", run="Photo")
    assert [photo.takes(*key) for key in (("Photo", "art"), ("Photo", "val"), ("Art", "photo"))] == [
        True,
        False,
        False,
    ]


def test_mean_corruption_error_is_relative_to_the_baseline():
    def numbers(factor):
        sets = {(f"x-{name}-{s}"): 100 - factor * (k + s) for k, name in enumerate(MAIN) for s in (1, 5)}
        return {("r", images): (value, 10) for images, value in sets.items()}

    assert g.mean_corruption_error(numbers(1.5), numbers(2.0)) == pytest.approx(75)
    some = {key: value for key, value in numbers(1.5).items() if "fog" not in key[1]}
    assert g.mean_corruption_error(some, numbers(2.0)) is None


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three domains of tiny images, two sources, two norms, two seeds: eight runs of one epoch, made by the table itself."""
    root = tmp_path_factory.mktemp("suite")
    rng = np.random.default_rng(0)
    for tone, domain in ((0, "dark"), (60, "mid"), (120, "light")):
        for shade, name in ((0, "a"), (70, "b")):
            (root / "set" / domain / name).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 60, (8, 8, 3)) + tone + shade
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(
                    root / "set" / domain / name / f"{i}.png"
                )
    table = {
        "title": "Tones",
        "overrides": ["data=domains", f"data.root={root / 'set'}", "data.image_size=8", "arch=resnet20", "arch.depth=8",
                      "batch_size=7", "optim.global_batch=7", "epochs=1", "schedule.warmup_epochs=0", "hardware=cpu",
                      "hardware.threads=1", "log.tensorboard=false"],
        "runs": {"Dark": {"overrides": ["data.train=[dark]"], "images": 14},
                 "Light": {"overrides": ["data.train=[light]"], "images": 14}},
        "columns": [{"name": "mid", "set": "mid"}, {"name": "from dark", "run": "Dark"}],
        "mean": "Avg.",
        "rows": [{"label": "BN", "overrides": ["norm=bn"], "both": True, "printed": [50, 60.5, 55.25]},
                 {"label": "IN", "overrides": ["norm=in"]}],
        "classes": 2, "pixels": 8, "seeds": 2, "notes": ["a note"],
    }  # fmt: skip
    (root / "tones.yaml").write_text(yaml.safe_dump(table))
    status = script("tools/table.py").main([str(root / "tones.yaml"), "--runs", str(root / "runs"), "--run"])
    assert status == 0
    return root


def found(root, row, run, seed, images, stats="running"):
    """top-1 from the log of the run, told by its configuration."""
    for folder in (root / "runs").iterdir():
        if not (folder / "config.yaml").is_file():
            continue
        config = yaml.safe_load((folder / "config.yaml").read_text())
        if (config["norm"]["name"], config["data"]["train"], config["seed"]) == (row, [run], seed):
            (event,) = [e for e in events(folder, "eval") if e["set"] == images and e["stats"] == stats]
            return event["top1"]
    raise AssertionError("no such run")


@pytest.mark.slow
def test_the_numbers_are_means_over_runs_and_sets_with_their_interval_over_seeds(small, capsys):
    command = [str(small / "tones.yaml"), "--runs", str(small / "runs")]
    assert script("tools/table.py").main([*command, "--format", "csv"]) == 0
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows[0] == ["", "accuracy in percent", "mid", "from dark", "Avg.", "pooled", "worst"]
    assert rows[1][:5] == ["BN", "printed", "50", "60.5", "55.25"]
    assert [row[1].split(" (")[0] for row in rows[2:]] == [
        "ours, running statistics",
        "ours, batch statistics",
        "ours, running statistics",
    ]
    assert "batches of 7, shuffled by seed 0" in rows[3][1] and "shuffled" not in rows[2][1] + rows[4][1]
    for line, norm, stats in ((2, "bn", "running"), (3, "bn", "batch"), (4, "in", "running")):
        mid = [
            np.mean([found(small, norm, run, s, "mid", stats) for run in ("dark", "light")]) for s in (0, 1)
        ]
        dark = [
            np.mean([found(small, norm, "dark", s, images, stats) for images in ("mid", "light")])
            for s in (0, 1)
        ]
        for cell, values in (
            (rows[line][2], mid),
            (rows[line][3], dark),
            (rows[line][4], (np.array(mid) + dark) / 2),
        ):
            mean, half = (float(x) for x in cell.split(" ± "))
            assert mean == pytest.approx(np.mean(values), abs=0.006)
            # the 97.5 % point of Student's t with one degree of freedom is 12.706
            assert half == pytest.approx(12.706 * np.std(values, ddof=1) / 2**0.5, abs=0.02)


@pytest.mark.slow
def test_the_words_say_sizes_comparisons_and_what_is_missing(small, capsys):
    command = [str(small / "tones.yaml"), "--runs", str(small / "runs")]
    assert script("tools/table.py").main(command) == 0
    out = capsys.readouterr().out
    assert "IN - BN, both with running statistics:" in out and "2 seeds, paired" in out
    assert "BN: 0.0" in out and "a note" in out and "Missing" not in out
    assert script("tools/table.py").main([*command, "--seeds", "3", "--dry"]) == 0
    assert "4 runs, " in capsys.readouterr().out
    assert script("tools/table.py").main([*command, "--format", "markdown", "--only", "IN"]) == 0
    assert "| IN | ours, running statistics |" in capsys.readouterr().out
    assert script("tools/table.py").main([*command, "--weights", str(small)]) == 2
    assert "--weights is not for tones" in capsys.readouterr().err


def test_wrong_files_are_said(tmp_path):
    data = yaml.safe_load(PAPER[0].read_text())
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(data | {"colums": []}))
    with pytest.raises(ValueError, match="colums is none of"):
        g.open_suite(tmp_path / "a.yaml")
    data["rows"][0]["printed"].pop()
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ValueError, match="BatchNorm has 4 printed numbers for 5 columns"):
        g.open_suite(tmp_path / "a.yaml")
