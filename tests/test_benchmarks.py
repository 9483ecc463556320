"""benchmarks/: equal twins, contenders that take turns, no figures where results are wrong."""

import json
import re

import pytest
import torch
from torch import nn

import anorm
from anorm import ops
from benchmarks import layers as run
from benchmarks import loop, naive, timing
from benchmarks.report import goals, gpu_table, markdown


@pytest.mark.parametrize("law", ["bn", "an", "gn", "sn", "se"])
@pytest.mark.parametrize("training", [True, False])
def test_a_naive_twin_computes_the_same(law, training):
    torch.manual_seed(0)
    ours = anorm.create_norm(law, 16, act="relu").double()
    twin = naive.naive(ours).double()
    x, r, dy = (torch.randn(5, 16, 6, 4, dtype=torch.double) for _ in range(3))
    for layer in (ours, twin):  # the same running statistics
        layer(x + 1)
        layer.train(training)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(leaf, r) for layer, leaf in zip((ours, twin), leaves, strict=True)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.backward(dy)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for a, b in zip(ours.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad.flatten(), b.grad.flatten())


def test_a_law_without_a_twin_is_refused_in_words():
    with pytest.raises(ValueError, match="benchmarks/naive.py"):
        naive.naive(anorm.create_norm("bin", 8))


def test_contenders_take_turns_and_the_first_is_the_unit():
    order = []

    def job(name, seconds):
        def run():  # works, so that either clock sees it
            order.append(name)
            begin = timing.clock()()
            while timing.clock()() - begin < seconds:
                pass

        return timing.Contender(run)

    found = timing.interleaved(
        {"unit": job("unit", 0.002), "slow": job("slow", 0.01)}, rounds=5, least_ms=0
    )
    assert order == ["unit", "slow"] * 7
    assert found["unit"].ratio == 1 and found["slow"].ms >= 10 and found["slow"].ratio > 1
    low, high = found["slow"].ratio_quartiles
    assert low <= found["slow"].ratio <= high


def test_the_backend_is_chosen_for_each_contender():
    seen = []
    contender = timing.Contender(lambda: seen.append(ops.resolve("cpu").__name__), "reference")
    timing.interleaved({"one": contender}, rounds=2, least_ms=0)
    assert set(seen) == {"anorm.ops.reference"}


def test_bytes_kept_for_backward():
    """BN + in-place ReLU keeps its output, a fused law only small tensors beside its input."""
    x = torch.randn(4, 8, 32, 32, requires_grad=True)
    unit = x.numel() * 4
    eager = naive.WithAct(nn.BatchNorm2d(8), "relu")
    ours = anorm.create_norm("an", 8, act="relu")
    kept = [
        timing.kept_bytes(lambda m=m: m(x), (x, *m.parameters(), *m.buffers())) / unit
        for m in (eager, ours)
    ]
    assert 1.0 <= kept[0] < 1.05 and kept[1] < 0.05


def test_the_rise_of_memory_is_seen():
    rise = timing.peak_bytes(lambda: torch.ones(2**24).sum())
    if rise is None:
        pytest.skip("no /proc or no glibc")
    assert 60e6 < rise < 100e6  # 67 MB


@pytest.mark.parametrize("law", ["an", "gn"])
def test_right_results_pass_and_wrong_ones_do_not(law, monkeypatch):
    assert run.wrong(law, "reference", "NHWC", torch.float32) is None
    right = run.layer

    def slightly_off(*arguments):
        layer = right(*arguments)
        with torch.no_grad():
            next(layer.parameters()).mul_(1.001)
        return layer

    twin = run.naive
    monkeypatch.setattr(run, "naive", lambda layer: twin(right(law, 64)))
    monkeypatch.setattr(run, "layer", slightly_off)
    assert "relative error" in run.wrong(law, "reference", "NHWC", torch.float32)


@pytest.mark.slow
def test_as_a_user_runs_it(tmp_path, capsys, monkeypatch):
    """One small map stands for ResNet-50's; a law that is wrong has no figure and fails the command."""
    monkeypatch.setattr(run, "MAPS", [(16, 7, 4)])
    monkeypatch.setattr(
        run, "wrong", lambda law, *rest: "by order of this test" if law == "sn" else None
    )
    arguments = [
        "--quick",
        "--only",
        "layers",
        "memory",
        "exactness",
        "--malloc",
        "system",
        "--out",
        str(tmp_path),
    ]
    assert run.main(arguments) == 1
    (file,) = tmp_path.glob("*.json")
    report = json.loads(file.read_text())
    assert {"hardware", "threads", "torch", "allocator", "cpu_backend"} <= report["machine"].keys()
    assert set(report["layers"]) == {
        f"16x7x7 {layout} {kind}" for layout in ("NCHW", "NHWC") for kind in ("fp32", "bf16")
    }
    for row in report["layers"].values():
        assert (
            row["BN + ReLU"]["ratio"] == 1
            and "naive SN" in row
            and not any(name.startswith("sn ") for name in row)
        )
    text = file.with_suffix(".md").read_text()
    assert "by order of this test" in text and report["machine"]["hardware"] in text
    assert "| SN, cpu: times faster than naive SN | >= 5 | not measured |" in text
    capsys.readouterr()


def test_every_goal_is_in_the_table_with_what_decides_it():
    layer = {"ms": 1.0, "ms_quartiles": [1, 1], "ratio_quartiles": [1, 1]}
    names = {
        "BN + ReLU": 1,
        "an cpu": 0.5,
        "naive AN": 8,
        "an reference": 2,
        "sn cpu": 1,
        "naive SN": 9,
        "gn cpu": 0.4,
        "nn.GroupNorm": 5,
        "se cpu": 1,
    }
    row = {name: {**layer, "ratio": ratio} for name, ratio in names.items()}
    slow = {**row, "an cpu": {**layer, "ratio": 0.97}}
    facts = {
        name: "x"
        for name in (
            "hardware",
            "threads",
            "torch",
            "onnxruntime",
            "python",
            "libc",
            "cpu_backend",
            "capability",
            "cores",
            "clock",
            "fresh_write_gb_s",
            "warm_copy_gb_s",
        )
    } | {"load": 0.0, "allocator": {}}
    report = {
        "machine": facts,
        "quick": True,
        "seconds": 1,
        "wrong": {},
        "layers_inference": {},
        "compiled_layers": {},
        "layers": {"64x56x56 NHWC bf16": row, "256x14x14 NCHW fp32": slow, "512x7x7 NCHW bf16": row},
        "memory": {"64x56x56 NCHW fp32": {"BN + ReLU": 1.0, "an cpu": 0.01}},
        "onnx": {},
        "training": {
            "NHWC fp32": {
                "AN, eager BN elsewhere": {**layer, "ratio": 1.02},
                "AN, everything fused": {**layer, "ratio": 1.0},
            },
            "NCHW fp32": {
                "AN, eager BN elsewhere": {**layer, "ratio": 1.0},
                "AN, everything fused": {**layer, "ratio": 0.9},
            },
        },
    }
    by_name = {goal.what: goal for goal in goals(report)}
    missed = by_name["AN + ReLU, cpu, maps of 14x14 and larger"]
    assert (missed.value, missed.where, missed.met) == (0.97, "256x14x14 NCHW fp32", False)
    assert by_name["AN, cpu: times faster than naive AN"].value == pytest.approx(8 / 0.97)
    assert by_name[
        "GN, cpu: times faster than nn.GroupNorm, bf16 NHWC, 28x28 and larger"
    ].value == pytest.approx(12.5)
    assert by_name["ResNet-50 step, AN, everything fused, bf16 or NCHW"].value == 0.9
    assert by_name["maps kept for backward, more than BN + ReLU keeps (small tensors count)"].met
    assert by_name["AN-ResNet-50 in onnxruntime, batch 1 / BN folded"].value is None
    text = markdown(report)
    assert all(f"| {name} |" in text for name in by_name) and "No GPU was at hand." in text


def test_a_gpus_figures_stand_beside_them():
    entry = {"value": 0.9, "goal": 0.85, "missed": False}
    gpu = {
        "machine": {"device": "a GPU"},
        "seconds": 3,
        "passes": {"moments": entry, "copy, GB/s": {**entry, "goal": None}},
    }
    text = gpu_table(gpu)
    assert "| passes: moments | 0.85 | 0.900 | yes |" in text and "copy" not in text


def test_the_loop_is_measured_beside_a_bare_one(monkeypatch, capsys):
    monkeypatch.setattr(loop, "ROUNDS", 2)
    small = [
        "arch=convnet",
        "data.image_size=32",
        "data.num_classes=10",
        "hardware=cpu",
        "hardware.threads=1",
    ]
    assert loop.main(small) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    ratio, low, high = map(float, re.search(r"bare loop: (\S+) \[(\S+), (\S+)\]$", line).groups())
    assert 0 < low <= ratio <= high
    assert loop.main(["arch=resnet5"]) == 2
