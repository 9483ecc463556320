"""train.py and the tools, run for real."""

import gc
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from commands import ROOT, SMALL, environment, run_train, script, start_train, train
from PIL import Image

from anorm.engine.record import read_metrics


def events(folder, kind):
    return [line for line in read_metrics(folder) if line["event"] == kind]


def weights(folder, name="last.ckpt"):
    return torch.load(folder / name, weights_only=True)


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_help_names_everything_and_loads_no_heavy_package():
    code = (
        f"import sys, runpy; sys.argv = ['train.py', '--help']; sys.path.insert(0, {str(ROOT)!r})\n"
        f"try: runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print([m for m in ('torchvision', 'timm', 'hydra', 'sklearn', 'tensorboard') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment()
    ).stdout
    assert out.rstrip().endswith("[]")
    assert out.count("    python train.py") == 3
    for group in ("arch", "norm", "setup", "data", "hardware"):
        line = next(line for line in out.splitlines() if line.split()[:1] == [group])
        assert line.split()[1:] == sorted(path.stem for path in (ROOT / "configs" / group).glob("*.yaml"))


def test_cfg_job_prints_every_key_with_its_value(capsys):
    assert train("norm=an", "arch=resnet18", "norm.k=[1,2,3,4]", "data=digits", "--cfg", "job") == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["norm"]["k"] == [1, 2, 3, 4] and config["norm"]["attention"] == "a2"
    assert config["arch"] == {"name": "resnet18", "stem": "7x7", "shortcut": "conv", "zero_init": False}
    assert config["optim"]["global_batch"] == 64 and config["data"]["max_shift"] == 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of two epochs on real digits."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert (
        train(
            "data=digits",
            "arch=resnet18",
            "norm=an",
            "hardware=cpu",
            "hardware.threads=1",
            "epochs=2",
            "optim.lr=0.2",
            "schedule.warmup_epochs=0",
            "log.every=4",
            f"run_dir={folder}",
        )
        == 0
    )
    return folder


def test_the_loss_of_a_digits_run_falls(finished):
    losses = [line["loss"] for line in events(finished, "train")]
    assert losses[-1] < 0.5 * losses[0]
    final = read_metrics(finished)[-1]
    assert (
        final["event"] == "final"
        and {"top1", "top5", "best_top1", "seconds", "images_per_second"} <= final.keys()
    )
    evals = events(finished, "eval")
    assert final["top1"] == evals[-1]["top1"] and final["best_top1"] == max(line["top1"] for line in evals)


def test_what_a_run_folder_holds(finished):
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "last.ckpt",
        "best.ckpt",
        "weights.safetensors",
        "predictions.npz",
        "tensorboard",
    } <= names
    assert not [name for name in names if name.endswith(".tmp") or "new" in name]
    start = events(finished, "start")[0]
    assert {"command", "torch", "git", "machine"} <= start["environment"].keys()
    assert (start["environment"]["processor"] or "") in Path("/proc/cpuinfo").read_text()
    steps = [line["step"] for line in events(finished, "train")]
    assert steps == sorted(set(steps)) and steps[-1] == 44
    for line in events(finished, "train"):
        assert {"loss", "lr", "images_per_second", "data_wait", "memory_mib"} <= line.keys()
    saved = numpy.load(finished / "predictions.npz")
    assert list(saved["index"]) == list(range(359))
    assert 100 * saved["top1"].mean() == pytest.approx(read_metrics(finished)[-1]["top1"], abs=1e-9)
    assert numpy.array_equal(saved["top1"], saved["label"] == saved["predicted"])
    assert str(saved["data"]) == json.loads((finished / "data.json").read_text())["images"]


def test_the_same_command_says_that_it_is_finished(finished, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train("--config", str(finished / "config.yaml")) == 0
    assert "is finished" in capsys.readouterr().out
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("target", [".", "last.ckpt", "weights.safetensors"])
def test_validate_prints_the_numbers_of_the_run(finished, capsys, target):
    final, last = read_metrics(finished)[-1], events(finished, "eval")[-1]
    assert script("tools/validate.py").main([str(finished / target)]) == 0
    top1, top5, loss, images = re.search(
        r"top-1 (\S+) % top-5 (\S+) % loss (\S+) \((\d+) images", capsys.readouterr().out
    ).groups()
    assert float(top1) == pytest.approx(final["top1"], abs=5e-5) and float(top5) == pytest.approx(
        final["top5"], abs=5e-5
    )
    assert float(loss) == pytest.approx(last["loss"], abs=1e-6) and int(images) == 359


def test_validate_under_other_statistics(finished, capsys):
    losses = {}
    for stats in ("running", "batch", "recalibrated"):
        assert (
            script("tools/validate.py").main(
                [str(finished), f"eval.stats={stats}", "eval.recalibrate_batches=10"]
            )
            == 0
        )
        losses[stats] = re.search(r"loss (\S+)", capsys.readouterr().out).group(1)
    assert len(set(losses.values())) == 3


def test_predict_names_the_five_likeliest_classes(finished, capsys, tmp_path):
    from anorm.data import sources

    image, label = sources.create("digits").val.sample(0, None)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "digit.png")
    assert script("tools/predict.py").main([str(finished), str(tmp_path / "digit.png")]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 5
    shares = [float(line.split()[0]) for line in lines]
    assert shares == sorted(shares, reverse=True) and {line.split()[2] for line in lines} <= {
        str(d) for d in range(10)
    }


DROPOUT = [
    *SMALL,
    "arch=mobilenetv2",
    "arch.dropout=0.3",
    "epochs=2",
    "data.train_images=256",
    "mix.mixup=0.2",
    "ema.decay=0.9",
    "checkpoint.every_steps=3",
]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    status, _, err = run_train(*DROPOUT, f"run_dir={folder}")
    assert status == 0, err
    return folder


def assert_same_run(a, b):
    """Weights bit for bit, and a log with the same steps and values."""
    for name in ("model", "ema"):
        assert_same_tensors(weights(a)[name], weights(b)[name])
    for name in ("predictions.npz", "predictions_ema.npz"):
        one, other = numpy.load(a / name), numpy.load(b / name)
        assert all(numpy.array_equal(one[key], other[key]) for key in one)
    for kind, keys in (
        ("train", ("step", "epoch", "loss", "lr")),
        ("eval", ("step", "epoch", "top1", "top5", "loss", "ema_top1")),
    ):
        assert [[line[key] for key in keys] for line in events(a, kind)] == [
            [line[key] for key in keys] for line in events(b, kind)
        ]
    assert len(events(b, "final")) == 1


def test_what_the_average_of_weights_made_of_each_image(uninterrupted):
    last = events(uninterrupted, "eval")[-1]
    saved, plain = (numpy.load(uninterrupted / f"predictions{of}.npz") for of in ("_ema", ""))
    assert 100 * saved["top1"].mean() == pytest.approx(last["ema_top1"], abs=1e-9)
    assert list(saved["index"]) == list(plain["index"])
    assert not numpy.array_equal(saved["confidence"], plain["confidence"])


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_trace(uninterrupted, tmp_path):
    folder, rng = tmp_path / "run", random.Random(0)
    for _ in range(10):
        process = start_train(*DROPOUT, f"run_dir={folder}")
        # let it get somewhere: the start takes a few seconds of which nothing can be said in general
        before = _progress(folder)
        deadline = time.monotonic() + 120
        while (
            process.poll() is None
            and _progress(folder) <= before + rng.randrange(2)
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
        time.sleep(rng.random() * 0.3)
        process.kill()
        process.communicate()
    status, _, err = run_train(*DROPOUT, f"run_dir={folder}")
    assert status == 0, err
    assert_same_run(uninterrupted, folder)


def _progress(folder):
    """Bytes of the log, which grow with every few steps."""
    path = folder / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_signal_saves_at_a_step_boundary_and_the_run_continues_from_there(uninterrupted, tmp_path):
    """One run of 32 steps, stopped in three ways on its way."""
    folder, step = tmp_path / "run", 0
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        process = start_train(*DROPOUT, "checkpoint.every_steps=0", f"run_dir={folder}")
        while process.poll() is None and not any(e["step"] > step for e in events(folder, "train")):
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        out, err = process.communicate(timeout=240)
        assert process.returncode == 128 + getattr(signal, name), err
        assert "everything is saved" in err
        assert step == 0 or f"continuing at step {step} of" in out
        assert weights(folder)["step"] > step
        step = weights(folder)["step"]
    status, out, err = run_train(*DROPOUT, f"run_dir={folder}")
    assert status == 0, err
    assert f"continuing at step {step} of" in out
    assert_same_run(uninterrupted, folder)


def test_resume_never_starts_again(tmp_path, capsys):
    arguments = [*SMALL, "epochs=1", f"run_dir={tmp_path / 'run'}"]
    assert train(*arguments) == 0
    first = weights(tmp_path / "run")["model"]
    capsys.readouterr()
    assert train(*arguments, "resume=never") == 0
    assert "resume=never: what is finished in" in capsys.readouterr().out
    assert [line["step"] for line in events(tmp_path / "run", "start")] == [0]
    assert_same_tensors(first, weights(tmp_path / "run")["model"])


def test_a_job_that_slurm_started_again_continues_whatever_it_was_told_first(tmp_path, monkeypatch, capsys):
    arguments = [*SMALL, "epochs=1", f"run_dir={tmp_path / 'run'}", "resume=never"]
    assert train(*arguments) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    assert train(*arguments) == 0
    assert "is finished" in capsys.readouterr().out
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert train("--config", str(tmp_path / "run")) == 0  # nor does a frozen configuration begin again
    assert "is finished" in capsys.readouterr().out


def test_the_run_folder_is_named_by_the_signature(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train(*SMALL, "epochs=1") == 0
    assert train(*SMALL, "epochs=1", "hardware.workers=3", "log.every=1") == 0
    assert "is finished" in capsys.readouterr().out
    [folder] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"resnet20-bn-synthetic-vanilla-s0-[0-9a-f]{10}", folder.name)


def test_a_frozen_configuration_belongs_to_the_folder_that_it_lies_in(tmp_path, monkeypatch, capsys):
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert train(*SMALL, "epochs=1", "run_dir=run") == 0 and train(*SMALL, "epochs=1", "seed=1") == 0
    [derived] = (tmp_path / "here" / "runs").iterdir()
    monkeypatch.chdir(tmp_path / "there")
    moved = tmp_path / "moved"
    derived.rename(moved)
    for folder in (tmp_path / "here" / "run", moved, moved / "config.yaml"):
        capsys.readouterr()
        assert train("--config", str(folder)) == 0
        assert "is finished" in capsys.readouterr().out
    assert not list((tmp_path / "there").iterdir())


class Disturbed(torch.nn.BatchNorm2d):
    """At its 30th call asks the run to stop, on a disk that takes no large file any more; looks at the collector."""

    calls, collecting = 0, set()

    def forward(self, x):
        Disturbed.calls += 1
        Disturbed.collecting.add(gc.isenabled())
        if Disturbed.calls == 30:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            os.kill(os.getpid(), signal.SIGTERM)
        return super().forward(x)


def test_a_signal_on_a_full_disk_does_not_say_that_all_is_saved(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Disturbed, "calls", 0)
    monkeypatch.setattr(Disturbed, "collecting", set())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        status = train(
            *SMALL, "norm=module", f"norm.target={__name__}.Disturbed", f"run_dir={tmp_path / 'run'}"
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr()
    assert status == 128 + signal.SIGTERM
    assert "no checkpoint at step" in said.out and "could not be saved" in said.err
    assert (
        "is saved" not in said.err
        and "earlier" not in said.err
        and not (tmp_path / "run" / "last.ckpt").exists()
    )
    assert Disturbed.collecting == {False} and gc.isenabled()  # no process stops at a moment of its own


def test_a_loss_that_is_not_finite_stops_with_the_step_and_the_layer(tmp_path, capsys):
    status = train(*SMALL, f"run_dir={tmp_path / 'run'}", "optim.lr=1e30")
    message = capsys.readouterr().err
    assert status == 1
    found = re.search(
        r"not finite at step (\d+) .*first: the (output|gradient at the output) of (\S+) ", message
    )
    assert found and int(found.group(1)) >= 1
    assert len(message.strip().splitlines()) <= 2


@pytest.mark.slow
def test_a_sweep_runs_every_job_and_reports_the_one_that_fails(tmp_path):
    status, out, err = run_train("-m", *SMALL, "epochs=1", "seed=0,1", "norm=bn,attn", cwd=tmp_path)
    assert status == 1
    assert err.count("unknown norm 'attn'") == 2 and re.search(r"job 2 of 4: .*seed=0 norm=attn", err)
    assert len(re.findall(r"^  done", out, re.M)) == 2 and len(re.findall(r"^  failed", out, re.M)) == 2
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_setups_differ_as_the_paper_says(capsys):
    configs = {}
    for name, arguments in {"vanilla": [], "sota": ["setup=sota"], "code": ["faithful=code"]}.items():
        assert train("arch=resnet50", "norm=an", *arguments, "--cfg", "job") == 0
        configs[name] = yaml.safe_load(capsys.readouterr().out)
    vanilla, sota, code = configs["vanilla"], configs["sota"], configs["code"]
    assert vanilla["epochs"] == 120 and sota["epochs"] == 200
    assert vanilla["optim"] == sota["optim"]
    rate = vanilla["optim"]["lr"] * vanilla["optim"]["global_batch"] / vanilla["optim"]["lr_batch"]
    assert (
        math.isclose(rate, 0.4)
        and vanilla["optim"]["weight_decay"] == 1e-4
        and vanilla["optim"]["momentum"] == 0.9
    )
    assert vanilla["schedule"] == sota["schedule"]
    asked = {"name": "cosine", "warmup_epochs": 5.0, "floor": 0.0}
    assert asked.items() <= vanilla["schedule"].items()
    assert sota["mix"] == {"mixup": 0.2, "cutmix": 0.0, "label_smoothing": 0.1}
    assert vanilla["arch"] == {"name": "resnet50", "stem": "7x7", "shortcut": "conv", "zero_init": False}
    assert sota["arch"] == {"name": "resnet50", "stem": "deep", "shortcut": "avgpool", "zero_init": True}
    assert code["arch"]["zero_init"] is True and vanilla["batch_size"] == 128


def test_validate_says_what_it_evaluates(finished, tmp_path, capsys):
    validate = script("tools/validate.py").main
    assert validate([str(tmp_path / "nowhere")]) == 2
    assert f"there is no {tmp_path / 'nowhere'}" in capsys.readouterr().err
    cut = tmp_path / "cut"
    shutil.copytree(finished, cut)
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    (cut / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    for folder, words in (
        (finished, "running statistics)"),
        (cut, "statistics, of a run that is not finished)"),
    ):
        assert validate([str(folder)]) == 0
        assert words in capsys.readouterr().out
    assert validate([str(finished), "eval.batch_size=50"]) == 0
    assert "running statistics, eval.batch_size=50)" in capsys.readouterr().out


def test_a_dry_run_that_is_stopped_leaves_nothing(tmp_path):
    (tmp_path / "tmp").mkdir()
    process = start_train(
        *SMALL,
        "arch=resnet18",
        "data.image_size=224",
        "dry=true",
        f"run_dir={tmp_path / 'run'}",
        TMPDIR=f"{tmp_path}/tmp",
    )
    while process.poll() is None and not list((tmp_path / "tmp").glob("anorm-dry-*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM" in err
    assert not list((tmp_path / "tmp").glob("anorm-dry-*")) and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep_that_is_stopped_says_what_it_did_not_run(tmp_path):
    process = start_train("-m", *SMALL, "epochs=500", "log.every=1", "seed=0,1", cwd=tmp_path)
    while process.poll() is None and not any(events(f, "train") for f in tmp_path.glob("runs/*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "everything is saved" in err
    assert re.search(r"^  stopped  .*seed=0$", out, re.M) and re.search(r"^  not run  .*seed=1$", out, re.M)
    assert "job 2" not in out


def test_metrics_are_one_json_object_a_line(finished):
    for line in (finished / "metrics.jsonl").read_text().splitlines():
        assert "event" in json.loads(line)


def test_a_dry_run_reports_costs_and_leaves_nothing(tmp_path, capsys):
    assert train(*SMALL, "dry=true", f"run_dir={tmp_path / 'run'}") == 0
    out = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for word in (
        "parameters 269,",
        "multiply-adds",
        "images/s",
        "waiting for data",
        "bottleneck",
        "the whole run",
        "process-hours on 1",
        "disk",
    ):
        assert word in out
    assert out.index("multiply-adds") < out.index("run folder")  # from the meta device


def test_a_dry_run_says_what_is_missing_before_it_is(tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    assert train(*SMALL, "dry=true", f"run_dir={tmp_path / 'run'}") == 2
    said = capsys.readouterr()
    assert "0.0 GiB free" in said.err and "checkpoint.keep" in said.err
    assert train("data=imagefolder", "data.root=nowhere", "hardware=cpu", "dry=true") == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arch", "macs"), [("resnet50", 4.089), ("densenet121", 2.835), ("aognet12m", 2.108)]
)
def test_the_outline_takes_no_memory(arch, macs):
    """25.76 million parameters of ResNet-50 with AN, 4.089 G multiply-adds: those of tools/audit.py."""
    from anorm.build import create_source, outline

    found = script("train.py").composed(
        script("train.py").Arguments([f"arch={arch}", "norm=an", "data=synthetic"])
    )
    said = outline(found, create_source(found))
    assert f"{macs:.3f} G" in said and ("25,755,420" in said) == (arch == "resnet50")


@pytest.mark.slow
def test_a_compiled_run_equals_a_plain_one_to_rounding(tmp_path):
    plain, fast = tmp_path / "plain", tmp_path / "fast"
    small = [*SMALL, "arch=convnet", "data.image_size=32", "norm=an", "epochs=1"]
    assert train(*small, f"run_dir={plain}") == 0
    assert train(*small, f"run_dir={fast}", "hardware.compile=true") == 0
    a, b = weights(plain)["model"], weights(fast)["model"]
    for key in a:
        # float32 sums in another order, over four steps
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4)


def test_weights_of_another_head_start_a_run_and_are_said(finished, tmp_path, capsys):
    assert (
        train(
            *SMALL,
            "arch=resnet18",
            "norm=an",
            "epochs=1",
            f"weights={finished / 'weights.safetensors'}",
            "freeze=mixtures",
            "optim.lr=0.001",
            f"run_dir={tmp_path / 'run'}",
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "the classifier is new" in out and "frozen by mixtures" in out
    old, new = weights(finished)["model"], weights(tmp_path / "run")["model"]
    assert torch.equal(old["layer1.0.bn1.weight"], new["layer1.0.bn1.weight"])
    assert not torch.equal(old["layer1.0.bn1.attention.fc.weight"], new["layer1.0.bn1.attention.fc.weight"])
    assert new["fc.weight"].shape == (4, 512)


def test_python_without_docstrings_and_asserts(tmp_path):
    command = [sys.executable, "-OO", str(ROOT / "train.py")]
    told = subprocess.run([*command, "--help"], capture_output=True, text=True, env=environment())
    assert told.returncode == 0 and told.stdout.startswith("Train a network with a normalization")
    ran = [*command, *SMALL, f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(ran, capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and "finished" in done.stdout, done.stderr


def test_data_on_a_path_with_equals_signs_and_blanks(tmp_path):
    root = tmp_path / "a=b" / "my pictures, (2) 'all'"
    for split in ("train", "val"):
        for k, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (40, 40), (60 * k, 50 * i, 99)).save(root / split / name / f"{i}.png")
    small = [a for a in SMALL if not a.startswith("data.") and not a.startswith("data=")]
    arguments = ["data=imagefolder", f"data.root={root}", "data.image_size=32", "batch_size=2", "optim.global_batch=4"]
    run = tmp_path / "x=1 y"
    assert train(*small, *arguments, "epochs=1", f"run_dir={run}") == 0
    assert train(*small, *arguments, "epochs=1", f"run_dir={run}") == 0  # finished
    assert train("--config", str(run)) == 0
    held = yaml.safe_load((run / "config.yaml").read_text())
    assert (held["data"]["root"], held["run_dir"]) == (str(root), str(run))
