"""fp16 with loss scaling, on a CPU, which the configuration refuses for its slowness: the arithmetic is the same."""

import math
import os
import signal

import pytest
import torch
from commands import SMALL, events, train, weights

from anorm.config import machine


@pytest.fixture
def fp16_on_a_cpu(monkeypatch):
    monkeypatch.setattr(machine, "_dtype", lambda asked, gpu, machine: asked.dtype)


class Overflow(torch.autograd.Function):
    """The identity, with a gradient that is infinite at some calls of its backward."""

    calls, bad, stop = 0, (), None

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        Overflow.calls += 1
        if Overflow.calls == Overflow.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return gradient * math.inf if Overflow.calls in Overflow.bad else gradient


class Norm(torch.nn.BatchNorm2d):
    def forward(self, x):
        return Overflow.apply(super().forward(x))


OVERFLOWING = ["norm=module", f"norm.target={__name__}.Norm", "batch_size=16"]


def fp16(folder, *more):
    return train(*SMALL, "hardware.dtype=fp16", f"run_dir={folder}", *more)


def test_the_losses_are_those_of_fp32_to_the_precision_of_fp16(tmp_path, fp16_on_a_cpu):
    assert fp16(tmp_path / "half") == 0 and train(*SMALL, f"run_dir={tmp_path / 'single'}") == 0
    half, single = (events(tmp_path / name, "train") for name in ("half", "single"))
    # 2^-11 a rounding, twenty layers, eight steps; measured 0.003
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in single], rel=0.02)
    assert [line["loss"] for line in half] != [line["loss"] for line in single]
    assert {line["loss_scale"] for line in half} == {65536.0}
    assert half[-1]["skipped_steps"] == 0


def test_a_static_scale_stays(tmp_path, fp16_on_a_cpu):
    assert fp16(tmp_path / "run", "hardware.loss_scale=128") == 0
    assert {line["loss_scale"] for line in events(tmp_path / "run", "train")} == {128.0}


def test_overflows_are_skipped_and_counted(tmp_path, fp16_on_a_cpu, monkeypatch):
    layers = 19
    first_and_third_step = {*range(1, layers + 1), *range(2 * layers + 1, 3 * layers + 1)}
    monkeypatch.setattr(Overflow, "calls", 0)
    monkeypatch.setattr(Overflow, "bad", first_and_third_step)
    assert fp16(tmp_path / "run", *OVERFLOWING) == 0
    lines = events(tmp_path / "run", "train")
    assert [line["skipped_steps"] for line in lines] == [1, 2, 2, 2]
    assert [line["loss_scale"] for line in lines] == [32768.0, 16384.0, 16384.0, 16384.0]


def test_a_run_that_was_stopped_continues_at_its_scale(tmp_path, fp16_on_a_cpu, monkeypatch):
    """Its first step overflows; it is stopped in the third."""
    layers = 19
    monkeypatch.setattr(Overflow, "bad", range(1, layers + 1))
    for folder, stop in (("whole", None), ("cut", 2 * layers + 5)):
        monkeypatch.setattr(Overflow, "calls", 0)
        monkeypatch.setattr(Overflow, "stop", stop)
        status = fp16(tmp_path / folder, *OVERFLOWING)
        assert status == (128 + signal.SIGTERM if stop else 0)
    assert weights(tmp_path / "cut")["step"] == 3
    assert fp16(tmp_path / "cut", *OVERFLOWING) == 0
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one["scaler"] == other["scaler"] and one["scaler"]["scale"] == 32768.0
    assert all(torch.equal(one["model"][key], other["model"][key]) for key in one["model"])
    kept = ("step", "loss", "loss_scale", "skipped_steps")
    lines = [
        [[line[key] for key in kept] for line in events(tmp_path / name, "train")]
        for name in ("whole", "cut")
    ]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_a_run_that_only_overflows_is_given_up(tmp_path, fp16_on_a_cpu, monkeypatch, capsys):
    monkeypatch.setattr(Overflow, "calls", 0)
    monkeypatch.setattr(Overflow, "bad", range(10**9))
    assert fp16(tmp_path / "run", *OVERFLOWING, "data.train_images=1024", "epochs=1") == 1
    said = capsys.readouterr().err
    assert "gradients of the last 50 steps overflowed" in said and "nothing is learned" in said
    assert "the gradient at the output of" in said and "hardware.dtype=fp32" in said
