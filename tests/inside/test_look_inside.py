"""tools/look_inside.py as a user calls it: on every law, on two runs, and its page in a real Chromium."""

import base64
import json
import re
import shutil

import chromium
import pytest
import torch
import yaml
from chromium import Parsed, in_chromium
from commands import script, train

import anorm
from anorm.algebra import Moments
from anorm.data.sources.synthetic import synthetic
from anorm.inside import landscape, subject
from anorm.inside.view import Inspection

TINY = [
    "arch=convnet",
    "arch.image_size=16",
    "data=synthetic",
    "data.image_size=16",
    "data.num_classes=3",
    "data.train_images=32",
    "data.val_images=24",
    "batch_size=8",
    "optim.global_batch=8",
    "optim.lr=0.5",
    "epochs=2",
    "schedule.warmup_epochs=0",
    "hardware=cpu",
    "hardware.threads=1",
    "log.tensorboard=false",
    "log.every=1",
    "checkpoint.every_steps=2",
]
MORE = {"module": ["norm.target=torch.nn.BatchNorm2d"]}
# what the laws of the papers have to show beside responses, gammas and the landscape
KNOWN = {
    "an": {"mixtures", "surgery"},
    "an_gn": {"mixtures", "surgery"},
    "se": {"gates", "surgery"},
    "sn": {"shares"},
    "ssn": {"shares"},
    "bin": {"gates"},
    "afn": {"gates"},
    "afn_as_released": {"gates"},
    "asrn": {"gates", "surgery"},
    "ilm": {"surgery"},
    "bn": set(),
    "gn": set(),
    "ln": set(),
    "in": set(),
    "module": set(),
}


def look(*arguments):
    return script("tools/look_inside.py").main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Norm -> a finished run of 8 steps, trained when it is asked for."""
    folder = tmp_path_factory.mktemp("runs")

    def run(norm):
        place = folder / norm
        if not place.exists():
            assert train(*TINY, f"norm={norm}", *MORE.get(norm, []), f"run_dir={place}") == 0
        return place

    return run


def parts_of(norm):
    """A law in its parts on some moments; None where it does not tell them."""
    if norm == "module":
        return None
    mean, var = torch.randn(4, 8), torch.rand(4, 8) + 0.5
    return anorm.create_norm(norm, 8).eval().parts(Moments(mean, var, 49))


def shows(norm):
    """What a law has to show, by what it tells of itself: kinds of choices, and whether its affine is the instance's."""
    if (parts := parts_of(norm)) is None:
        return set()
    found = {{"mixture": "mixtures"}.get(choice.kind, choice.kind) for choice in parts.choices.values()}
    by_instance = any(value is not None and value.dim() == 2 for value in (parts.gamma, parts.beta))
    return found | ({"surgery"} if by_instance else set())


@pytest.mark.parametrize("norm", KNOWN)
def test_the_laws_tell_what_they_are(norm):
    assert shows(norm) == KNOWN[norm]


@pytest.mark.parametrize("norm", anorm.list_norms())
def test_on_every_law(norm, runs, tmp_path, capsys):
    folder = runs(norm)
    capsys.readouterr()
    assert look(folder, "--out", tmp_path, "--images", 12, "--each", 3, "--lengths", "0.1") == 0
    out, err = capsys.readouterr()
    assert err == "", err
    numbers = json.loads((tmp_path / "inside.json").read_text())
    always = {"responses", "landscape"} | ({"gammas"} if parts_of(norm) else set())
    assert {name for name, found in numbers.items() if any(found.values())} == always | shows(norm)
    # 8 sections, each with a title and at least one line in words
    blocks = re.split(r"^(?=\S)", out, flags=re.M)[1:]
    assert len(blocks) == 9 and all(len(block.splitlines()) > 1 for block in blocks[:-1])
    apart = {
        "mixtures": "mixes affine maps",
        "shares": "weighs statistics",
        "gates": "has gates",
        "surgery": "nothing to average",
    }
    for section, words in apart.items():
        assert (words in out) == (section not in shows(norm)), section
    assert "those of one process" in out and ("do not tell their parts" in out) == (parts_of(norm) is None)
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 300_000
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(list(tmp_path.glob("*.png"))) >= 3
    parsed = Parsed(page)
    assert parsed.cells[0] == "bn1" and all(a.startswith("data:") for a in parsed.addresses)
    assert not re.search(r"<!--\w+-->", page)


def test_two_runs_side_by_side(runs, tmp_path, capsys):
    an, bn = runs("an"), runs("bn")
    assert (
        look(
            an,
            bn,
            "--out",
            tmp_path,
            "--only",
            "gammas,landscape",
            "--images",
            12,
            "--steps",
            3,
            "--lengths",
            "0.1,0.2",
        )
        == 0
    )
    numbers = json.loads((tmp_path / "inside.json").read_text())
    gammas = numbers["gammas"]
    assert {v["instances"] for v in gammas["bn"].values()} == {0.0} and all(
        v["instances"] > 0 for v in gammas["an"].values()
    )
    kept, fresh = numbers["landscape"]["landscape-checkpoints"], numbers["landscape"]["landscape-start"]
    assert set(kept) == set(fresh) == {"an", "bn"}
    for run in (an, bn):
        steps = [torch.load(path, weights_only=True)["step"] for path in run.glob("*.ckpt")]
        assert [p["step"] for p in kept[run.name]] == sorted(set(steps))
        assert [p["step"] for p in fresh[run.name]] == [0, 1, 2]
        assert all(len(p["losses"]) == 2 and p["smoothness"] > 0 for p in kept[run.name])
    assert "a run keeps no earlier ones" in capsys.readouterr().out


def test_what_runs_are_called(runs, tmp_path):
    long = tmp_path / f"{'x' * 40}-of-a-long-name"
    shutil.copytree(runs("bn"), long)
    bn, other, an = (subject.open_subject(folder) for folder in (runs("bn"), long, runs("an")))
    assert list(Inspection(bn, an).named([1, 2])) == ["bn", "an"]
    assert list(Inspection(bn, other).named([1, 2])) == ["bn", "xxxxxxxxx-of-a-long-name"]
    assert list(Inspection(other, other).named([1, 2])) == ["run 1", "run 2"]


def test_trained_again_it_is_the_run(runs):
    """The losses of the run's log are those of the fresh start: same weights, same batches, none mixed."""
    found = subject.open_subject(runs("bn"))
    found.model.fc2.bias.data += 1  # unlike every checkpoint
    before = {name: value.clone() for name, value in found.model.state_dict().items()}
    landscape.at_checkpoints(found, (0.1,))
    points = list(landscape.afresh(found, 4, lengths=(0.1,)))
    for name, value in found.model.state_dict().items():
        assert torch.equal(value, before[name]), name  # the subject itself stays as it was
    found.close()
    log = [json.loads(line) for line in (runs("bn") / "metrics.jsonl").read_text().splitlines()]
    logged = [e["loss"] for e in log if e["event"] == "train"][:4]
    assert [p.loss for p in points] == pytest.approx(logged, rel=1e-5)


def test_the_ranks_of_a_cut_run(runs, tmp_path, capsys):
    """A checkpoint of two processes whose statistics are not joined yet."""
    folder = tmp_path / "cut"
    shutil.copytree(runs("bn"), folder)
    assert look(folder, "--only", "ranks") == 0
    assert "those of one process" in capsys.readouterr().out
    state = torch.load(folder / "last.ckpt", weights_only=True)
    (buffers,) = state["processes"]["buffers"]
    for factor, words in ((1.0, "equal on all ranks"), (3.0, "at most 0.5000 of the statistic's size")):
        state["processes"] |= {
            "size": 2,
            "buffers": [buffers, [b * factor if b.is_floating_point() else b for b in buffers]],
        }
        for path in folder.glob("last*.ckpt"):
            torch.save(state, path)
        assert look(folder, "--only", "ranks") == 0
        assert words in capsys.readouterr().out  # 1 and 3 lie 1 from their mean, 2
    assert (folder / "inside" / "ranks.png").is_file()


def test_the_page_alone_needs_no_data(runs, tmp_path, capsys):
    folder = tmp_path / "moved"
    shutil.copytree(runs("bn"), folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"] = {"name": "imagefolder", "root": "nowhere"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert look(folder, "--only", "curves") == 0
    page = (folder / "inside" / "report.html").read_text()
    final = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert (
        f"Top-1 {final['top1']:.2f} %" in page
        and "24 images of imagefolder" in page
        and config["signature"] in page
    )
    assert Parsed(page).cells[:2] == [
        "1",
        f"{[e for e in events(folder) if e['event'] == 'eval'][0]['top1']:.2f}",
    ]
    assert "data:image" not in page and page.count("<figure>") == 3
    assert look(folder, "--only", "gammas") == 2
    assert "nowhere" in capsys.readouterr().err


def events(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_without_checkpoints(runs, tmp_path, capsys):
    """The weights for release suffice."""
    folder = tmp_path / "released"
    shutil.copytree(runs("bn"), folder)
    for path in folder.glob("*.ckpt"):
        path.unlink()
    assert look(folder, "--only", "ranks,landscape,gammas", "--images", 4) == 0
    out = capsys.readouterr().out
    assert "has kept no checkpoint" in out and "bn: 0 checkpoints kept" in out
    assert [path.name for path in (folder / "inside").glob("*.png")] == ["gammas.png"]


def test_a_run_that_is_not_finished(runs, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(runs("bn"), folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:4]))
    assert look(folder, "--only", "curves") == 0
    assert "Not finished: at step" in (folder / "inside" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no nowhere"),
        (["RUN", "RUN", "RUN"], "one run folder or two, not 3"),
        (["RUN", "--classes", "class 1,classy"], "there is no class 'classy': did you mean class"),
        (["RUN", "--only", "gamma"], "did you mean gammas"),
        (["RUN", "--lengths", "0.1,-1"], "give positive numbers"),
        (["RUN", "--lengths", "far"], "give positive numbers"),
        (["RUN", "--each", "0"], "--each 0 must be at least 1"),
        (["RUN", "--steps", "-1"], "--steps -1 must be at least 0"),
        (["RUN", "norm=bn"], "a run keeps its norm"),
    ],
)
def test_mistakes(arguments, words, runs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert look(*(runs("bn") if a == "RUN" else a for a in arguments)) == 2
    message = capsys.readouterr().err
    assert words in message and len(message.strip().splitlines()) <= 2


def test_classes_and_images():
    source = synthetic(image_size=8, num_classes=5, val_images=20)
    assert subject.chosen_classes(source, "class 4, 2,2") == [4, 2]
    assert subject.chosen_classes(source, None) == [0, 1, 2, 3]
    assert subject.of_classes(source.val.labels, [4, 2], 2) == [4, 9, 2, 7]
    assert subject.spread_out(10, 4) == [0, 2, 5, 7] and subject.spread_out(3, 0) == [
        0,
        1,
        2,
    ] == subject.spread_out(3, 9)
    part = subject.ImageSubset(source.val, [7, 2])
    found = part.fetch([1, 0], None)
    assert part.labels.tolist() == [2, 2] and found.indices.tolist() == [2, 7]
    assert torch.equal(found.images, source.val.fetch([2, 7], None).images)


@pytest.fixture(scope="module")
def page_file(runs):
    folder = runs("an")
    assert look(folder, "--images", 12, "--each", 3, "--lengths", "0.1") == 0
    return folder / "inside" / "report.html"


@in_chromium
def test_in_chromium(page_file, tmp_path):
    page = chromium.Page(tmp_path / "profile")
    page.open(page_file)
    assert page.run("document.title").startswith("convnet with an on synthetic: an")
    pictures = len(list(page_file.parent.glob("*.png")))
    whole = "i.complete && i.naturalWidth > 300 && i.alt.length > 10 && i.clientWidth > 200"
    drawn = f"[...document.images].map(i => {whole})"
    assert page.run(drawn) == [True] * pictures
    assert page.run("[...document.querySelectorAll('#cells tbody tr')].map(r => r.cells[0].textContent)") == [
        "bn1",
        "bn2",
    ]
    page.run(
        "(f => { f.value = 'bn2'; f.dispatchEvent(new Event('input')); })(document.getElementById('filter'))"
    )
    assert page.run("document.getElementById('count').textContent") == "1 of 2 rows"
    page.run(
        "(g => { g.value = 'stage 1'; g.dispatchEvent(new Event('change')); })"
        "(document.getElementById('group'))"
    )
    assert page.run("document.getElementById('count').textContent") == "0 of 2 rows"
    assert page.run("document.querySelectorAll('svg .curve').length") >= 4
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    page.close()


@in_chromium
@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_in_light_and_dark(page_file, tmp_path, dark):
    page = chromium.Page(tmp_path / "profile", 390, 844, dark, mobile=True)
    page.open(page_file)
    assert page.run("innerWidth") == 390 and page.run("document.documentElement.scrollWidth") == 390
    # as wide as the page: 8 pt is readable
    assert page.run("Math.min(...[...document.images].map(i => i.clientWidth))") > 300
    assert page.run("Math.max(...[...document.images].map(i => i.getBoundingClientRect().right))") <= 390
    assert (page.run("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)") == dark
    picture = base64.b64decode(page.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])
    assert picture.startswith(b"\x89PNG")
    (tmp_path / "page.png").write_bytes(picture)
    assert page.complaints == []
    page.close()
