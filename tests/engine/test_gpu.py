"""What the trainer promises of one GPU. ``ANORM_GPU_TESTS_ON_CPU=1`` runs what a CPU can, to try the tests themselves."""

import os
import random
import signal
import time

import pytest
import torch
from commands import ROOT, SMALL, events, run_train, start_torchrun, start_train, train, weights
from photographs import write_folder

from anorm.build import build
from anorm.config.frozen import Config
from anorm.data.loaders import EvalLoader, TrainLoader
from anorm.data.sources import create
from anorm.engine.fit import train_step
from anorm.engine.meter import Clock, Meter
from anorm.processes.world import World

HERE = "cpu" if os.environ.get("ANORM_GPU_TESTS_ON_CPU") else "gpu"
pytestmark = pytest.mark.skipif(HERE == "gpu" and not torch.cuda.is_available(), reason="no GPU")

GPU = [*SMALL, f"hardware={HERE}", "hardware.processes=1", "data.image_size=32"]
HALF = "hardware.dtype=auto" if HERE == "cpu" else "hardware.dtype=fp16"


def assert_same_run(a, b):
    one, other = weights(a)["model"], weights(b)["model"]
    assert all(torch.equal(one[key], other[key]) for key in one)
    kept = ("step", "loss", "lr", "loss_scale", "skipped_steps")
    lines = [[[line.get(key) for key in kept] for line in events(folder, "train")] for folder in (a, b)]
    assert lines[0] == lines[1]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["", "channels_last", "compile"])
def test_kills_leave_no_trace(tmp_path, form):
    """fp16, dropout, mixup, an average of weights; deterministic algorithms: the same bits."""
    arguments = [
        *GPU, HALF, "hardware.deterministic=true", f"hardware.channels_last={str(form == 'channels_last').lower()}",
        f"hardware.compile={str(form == 'compile').lower()}", "arch=mobilenetv2", "arch.dropout=0.3", "norm=an",
        "data.train_images=512", "epochs=3", "mix.mixup=0.2", "ema.decay=0.9", "checkpoint.every_steps=3", "log.every=1",
    ]  # fmt: skip
    status, _, err = run_train(*arguments, f"run_dir={tmp_path / 'whole'}")
    assert status == 0, err
    rng, folder = random.Random(0), tmp_path / "cut"
    for share in (0.1, 0.4, 0.7):
        process = start_train(*arguments, f"run_dir={folder}")
        while process.poll() is None and not any(e["step"] > 96 * share for e in events(folder, "train")):
            time.sleep(0.02)
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL if share != 0.4 else signal.SIGTERM)
        process.communicate()
    status, out, err = run_train(*arguments, f"run_dir={folder}")
    assert status == 0, err
    assert "continuing at step" in out
    assert_same_run(tmp_path / "whole", folder)


@pytest.mark.slow
def test_a_process_group_of_one(tmp_path):
    """torchrun with one process: NCCL, DDP, gathering and joining, with the result of a process alone."""
    arguments = [
        *GPU,
        HALF,
        "hardware.deterministic=true",
        "norm=an",
        "ema.decay=0.9",
        "checkpoint.every_steps=2",
    ]
    process = start_torchrun(1, *arguments, f"run_dir={tmp_path / 'group'}")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert run_train(*arguments, f"run_dir={tmp_path / 'alone'}")[0] == 0
    assert_same_run(tmp_path / "alone", tmp_path / "group")


@pytest.mark.parametrize("impl", ["auto", "foreach"])
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16", "fp16"])
def test_a_step_does_not_wait_for_the_device(tmp_path, dtype, impl):
    if HERE == "cpu":
        dtype = "fp32"
    elif dtype in ("tf32", "bf16") and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("not on this GPU")
    asked = [
        *GPU,
        f"hardware.dtype={dtype}",
        f"optim.impl={impl}",
        "norm=an",
        "optim.clip=1",
        "mix.mixup=0.2",
        "ema.decay=0.9",
    ]
    config = Config.compose(ROOT / "configs", asked).on()
    run = build(config, tmp_path, "signature", World().on(HERE), None)
    meter, steps = Meter(run, Clock(run.progress)), list(run.train.epoch(0))
    run.network.train()
    for step, batches in enumerate(steps):
        # without a fused optimizer GradScaler itself asks whether to step
        watched = step > 0 and HERE == "gpu" and not (dtype == "fp16" and impl == "foreach")
        if watched:
            torch.cuda.set_sync_debug_mode("error")
        try:
            losses, norm = train_step(run, step, batches)
            run.ema.update(run.model, 0.5)
            meter.add(step, losses, norm)
        finally:
            if watched:
                torch.cuda.set_sync_debug_mode("default")
    run.close()
    assert losses[0].isfinite() and norm.isfinite() and run.sums[1] == len(steps)


def test_precisions_agree_to_their_rounding(tmp_path):
    losses, static = {}, ["hardware.loss_scale=128"]
    wanted = [("fp32", []), ("tf32", []), ("bf16", []), ("fp16", []), ("fp16", static)]
    for number, (dtype, more) in enumerate(wanted):
        if HERE == "cpu" or dtype in ("tf32", "bf16") and torch.cuda.get_device_capability() < (8, 0):
            dtype = "fp32"
        folder = tmp_path / f"{number}"
        assert train(*GPU, f"hardware.dtype={dtype}", *more, "norm=an", f"run_dir={folder}") == 0
        lines = events(folder, "train")
        losses[(dtype, *more)] = [line["loss"] for line in lines]
        assert {line.get("loss_scale", 128.0 if more else 65536.0) for line in lines} <= {
            128.0 if more else 65536.0
        }
        assert all(line["memory_mib"] > 0 for line in lines)
    for found in losses.values():
        # 2^-8 (bf16) a rounding, twenty layers, eight steps
        assert found == pytest.approx(losses[("fp32",)], rel=0.1)


def test_a_step_that_overflows_on_the_device_changes_nothing(tmp_path):
    """A static scale that is far too large: every step is skipped, and the weights are those of the start."""
    if HERE == "cpu":
        pytest.skip("fp16 is for GPUs")
    status = train(
        *GPU, "hardware.dtype=fp16", "hardware.loss_scale=1e30", "norm=bn", f"run_dir={tmp_path / 'run'}"
    )
    assert status == 0
    assert events(tmp_path / "run", "train")[-1]["skipped_steps"] == 8
    config = Config.compose(ROOT / "configs", [*GPU, "norm=bn"]).on()
    start = build(config, tmp_path, "signature", World().on(HERE), None)
    start.close()
    ended = weights(tmp_path / "run")["model"]
    assert all(torch.equal(ended[name], p.cpu()) for name, p in start.model.named_parameters())


@pytest.mark.parametrize("loader", ["device", "dali"])
def test_feeding_a_device(tmp_path, loader):
    """The images of data.loader=torch, to the rounding of another resize and, for DALI, of the GPU's decoder."""
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="the extra anorm[dali] is not installed")
    device = World().on(HERE).device
    root = write_folder(tmp_path / "set", train=9, val=5)
    plain, other = (
        create("imagefolder", root=str(root), cache=False, image_size=24, loader=name)
        for name in ("torch", loader)
    )
    loaders = [TrainLoader(source, 3, 8, 4, workers=2, device=device) for source in (plain, other)]
    scale = torch.tensor(plain.std, device=device).view(1, 3, 1, 1) * 255
    for theirs, ours in zip(*(list(found.epoch(1)) for found in loaders), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.inputs.device == b.inputs.device and torch.equal(a.targets, b.targets)
            difference = ((a.inputs - b.inputs) * scale).abs()
            # nvJPEG's colour differs by a few levels at edges
            assert difference.mean() < (0.1 if loader == "device" else 1.5)
    whole = list(loaders[1].epoch(2))
    for ours, expected in zip(loaders[1].epoch(2, 1), whole[1:], strict=True):
        assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(ours, expected, strict=True))
    seen = torch.cat([batch.indices for batch in EvalLoader(other.val, 4, device=device)])
    assert seen.tolist() == list(range(15))
    for found in loaders:
        found.close()


def test_dry_says_what_a_run_costs(tmp_path, capsys):
    assert train(*GPU, "dry=true", f"run_dir={tmp_path / 'run'}") == 0
    assert ("GPU-hours on 1" if HERE == "gpu" else "process-hours on 1") in capsys.readouterr().out


def test_memory_that_does_not_suffice_says_what_to_lower(tmp_path):
    if HERE == "cpu":
        pytest.skip("the system would end this process")
    process = start_train(
        *GPU, "arch=resnet50", "data.image_size=224", "batch_size=8192", "optim.global_batch=8192",
        "data.train_images=8192", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1 and "out of memory: lower batch_size" in err and "Traceback" not in err
