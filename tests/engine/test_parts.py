"""EMA, checkpoints, the log, signatures, evaluation."""

import json
import os
import resource
from contextlib import nullcontext

import pytest
import torch
from processes import ROOT, SMALL
from torch import nn

from anorm import create_model, create_norm
from anorm.build import evaluator
from anorm.engine import checkpoint, meter
from anorm.engine.compose import compose
from anorm.engine.distributed import World
from anorm.engine.ema import Ema
from anorm.engine.evaluate import evaluate, statistics_from
from anorm.engine.hardware import compiled, distributed
from anorm.engine.meter import SaveTimer
from anorm.engine.record import Record, final_metrics, read_metrics
from anorm.engine.settings import settings_from
from anorm.engine.signature import EXCLUDED, flatten, signature
from anorm.options import accepted, complete, resolve


def test_ema_averages_floats_and_copies_integers():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), create_norm("bn", 4))
    ema = Ema(model, 0.9)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(30):
        model(torch.randn(8, 3, 5, 5))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update(model, step / 30)
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = (
                decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
            )
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)  # 30 float32 roundings
    assert ema.model[1].num_batches_tracked == 30


def test_ema_obeys_the_limits_of_norms():
    model = (
        nn.Sequential(create_norm("bin", 4))
        if "bin" in __import__("anorm").list_norms()
        else pytest.skip("no BIN here")
    )
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model[0].gate.fill_(5.0)
    ema.update(model, 0.5)
    assert ema.model[0].gate.max() <= 1


def test_a_checkpoint_survives_a_failing_write_and_older_ones_are_kept(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    for step in range(5):
        checkpoint.save(path, {"step": step}, keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-1.ckpt", "last-2.ckpt", "last.ckpt"]
    assert [
        checkpoint.load(tmp_path / name)["step"] for name in ("last.ckpt", "last-1.ckpt", "last-2.ckpt")
    ] == [4, 3, 2]

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(path, {"step": 5}, keep=3)
    assert checkpoint.load(path)["step"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last-1.ckpt", "last-2.ckpt", "last.ckpt"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        checkpoint.save(disk / "last.ckpt", {"x": torch.zeros(10_000)})
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(disk / "last.ckpt", {"x": torch.zeros(100_000)})
        assert len(checkpoint.load(disk / "last.ckpt")["x"]) == 10_000
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_damaged_checkpoints_and_checkpoints_with_code_are_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {"x": torch.arange(1000)})
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-10], b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="truncated or damaged"):
            checkpoint.load(path)

    class Code:
        def __reduce__(self):
            return os.system, ("touch /tmp/never",)

    torch.save({"x": Code()}, path)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path)


def test_a_log_spoiled_by_a_loss_of_power_is_read_to_there(tmp_path):
    lines = b'{"event": "start", "step": 0}\n{"event": "train", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(lines + b"\0" * 30 + b"\n" + lines)
    assert [line["event"] for line in read_metrics(tmp_path)] == ["start", "train"]
    assert final_metrics(tmp_path) is None


def test_a_line_of_the_log_is_written_whole_or_not_at_all(tmp_path):
    record = Record(tmp_path, tensorboard=False)
    record.write("start", step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (record.offset + 10, hard))  # as a disk with ten bytes left
    try:
        with pytest.raises(OSError, match="No space left"):
            record.write("train", step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    record.write("train", step=2)
    record.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 2]


def test_a_file_system_without_locks_or_links(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    monkeypatch.setattr(
        os, "link", lambda *paths: (_ for _ in ()).throw(OSError(95, "Operation not supported"))
    )
    for step in range(3):
        checkpoint.save(path, {"step": step}, keep=2)
    assert [checkpoint.load(tmp_path / name)["step"] for name in ("last.ckpt", "last-1.ckpt")] == [2, 1]

    def no_locks(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoint.fcntl, "lockf", no_locks)
    lock = checkpoint.FolderLock(tmp_path)
    with pytest.raises(ValueError, match="cannot be locked .No locks available."):
        lock.take_all()
    lock.close()


def test_a_log_that_was_shortened_is_gone_on_with(tmp_path):
    record = Record(tmp_path, tensorboard=False, offset=1000)
    record.write("final", top1=1.0)
    record.close()
    assert final_metrics(tmp_path)["top1"] == 1.0


def test_a_resumed_run_keeps_its_points_of_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start in (0, 2):
        record = Record(tmp_path, step=start)
        for step in (start + 1, start + 2):
            record.write("train", step=step, loss=float(step))
        record.write("eval", step=start + 2, top1=1.0)
        if not start:
            record.write("train", step=3, loss=9.0)  # of the part that the kill took
        record.close()
    read = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in read.Scalars("train/loss")] == [(s, s) for s in (1, 2, 3, 4)]
    assert [point.step for point in read.Scalars("eval/top1")] == [2, 4]


def test_the_log_loses_what_a_kill_cut_off_and_continues_without_a_gap(tmp_path):
    record = Record(tmp_path, tensorboard=False)
    record.write("train", step=1, loss=1.0)
    kept = record.offset
    record.write("train", step=2, loss=float("nan"))
    record.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "tra')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2]
    assert final_metrics(tmp_path) is None
    record = Record(tmp_path, tensorboard=False, offset=kept)
    record.write("train", step=2, loss=0.5)
    record.write("final", top1=1.0)
    record.close()
    assert [line.get("step") for line in read_metrics(tmp_path)] == [1, 2, None]
    assert final_metrics(tmp_path)["top1"] == 1.0
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


CONFIG = {
    "arch": {"name": "resnet50", "zero_init": False},
    "norm": {"name": "an", "sync": False},
    "data": {"name": "imagenet", "root": "/a"},
}


def full_config(**changes):
    import dataclasses

    flat = flatten(dataclasses.asdict(settings_from({})) | CONFIG)
    flat |= changes
    tree = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = tree
        for word in path:
            node = node.setdefault(word, {})
        node[last] = value
    return tree


def signed(processes=1, identity="data", **changes):
    return signature(full_config(**changes), identity, processes)


def test_what_changes_the_mathematics_changes_the_signature():
    """Every key is changed in turn: excluded ones leave the signature as it is, all others do not."""
    flat = flatten(full_config())
    for key, value in flat.items():
        if key == "weights":
            continue  # needs a file, below
        other = {
            bool: lambda v: not v,
            int: lambda v: v + 1,
            float: lambda v: v + 0.5,
            str: lambda v: v + "x",
        }.get(type(value), lambda v: "something")(value)
        excluded = any(key == word or key.startswith(word + ".") for word in EXCLUDED)
        assert (signed(**{key: other}) == signed()) == excluded, key


def test_data_weights_and_synced_processes_count(tmp_path):
    assert signed(identity="other") != signed()
    assert signed(processes=2) == signed()
    for key, value in (("norm.sync", True), ("eval.stats", "batch")):
        assert signed(processes=2, **{key: value}) != signed(**{key: value})
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    (tmp_path / "c").write_bytes(b"other")
    a, b, c = (signed(weights=str(tmp_path / name)) for name in "abc")
    assert a == b != c and a != signed()


def test_evaluation_counts_every_image_once_and_its_columns_agree():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7)).double()
    images, labels = torch.randn(23, 3, 2, 2, dtype=torch.float64), torch.randint(7, (23,))
    batches = [
        (images[i : i + 5], labels[i : i + 5], torch.arange(i, min(i + 5, 23))) for i in range(0, 23, 5)
    ]
    result = evaluate(model, batches, World(), nullcontext)
    logits = model(images)
    assert result.images == 23
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert result.top5 == pytest.approx(
        100 * (logits.topk(5).indices == labels[:, None]).any(1).double().mean().item()
    )
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-12)
    assert torch.equal(result.index, torch.arange(23)) and torch.equal(
        result.first, logits.argmax(1) == labels
    )
    assert torch.equal(result.label, labels) and torch.equal(result.predicted, logits.argmax(1))
    torch.testing.assert_close(result.confidence, logits.softmax(1).amax(1))


def test_a_process_without_images_has_columns_of_the_same_types():
    """Columns of all processes are put together: one of another type would change that of the whole."""
    class Two(World):
        """Another process has four images, of which one is right."""

        def sum(self, values):
            values += torch.tensor([1, 4, 2.0, 4], dtype=values.dtype)

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 7))
    batch = (torch.randn(4, 3, 2, 2), torch.randint(7, (4,)), torch.arange(4))
    some, none = evaluate(model, [batch], World(), nullcontext), evaluate(model, [], Two(), nullcontext)
    assert (none.images, none.top1, none.top5, none.loss) == (4, 25.0, 100.0, 0.5)
    for name in ("index", "label", "predicted", "first", "among_five", "confidence"):
        assert len(getattr(none, name)) == 0 and getattr(none, name).dtype == getattr(some, name).dtype, name


def test_an_evaluation_tunes_nothing_and_puts_back_what_it_finds(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []

    class Watching(nn.Linear):
        def forward(self, x):
            seen.append((torch.backends.cudnn.benchmark, self.training))
            return super().forward(x)

    model = nn.Sequential(nn.Flatten(), Watching(12, 7)).train()
    evaluate(model, [(torch.randn(4, 3, 2, 2), torch.randint(7, (4,)), torch.arange(4))], World(), nullcontext)
    assert seen == [(False, False)] and torch.backends.cudnn.benchmark and model.training


def test_a_data_set_that_loses_an_image_is_noticed():
    from anorm.data import sources
    from anorm.data.loaders import EvalLoader

    val = sources.create("synthetic", image_size=8, val_images=10).val

    class Losing(type(val)):
        def fetch(self, indices, rngs):
            found = super().fetch(indices, rngs)
            return found._replace(images=found.images[1:]) if 7 in indices else found

    val.__class__ = Losing
    with pytest.raises(AssertionError):
        list(EvalLoader(val, 4))


@pytest.mark.parametrize("norm", [["norm=bn"], ["norm=afn", "norm.dropout=0.3"]], ids=lambda n: n[0])
def test_recalibration_takes_so_many_plain_training_batches_and_no_dropout(norm):
    """Repeated, as after a kill, it gives the same: functional dropout is off too, a norm's own is seeded."""
    asked = [
        *SMALL,
        "arch=wrn_16_4",
        "arch.widen=1",
        "arch.dropout=0.5",
        *norm,
        "mix.mixup=0.4",
        "eval.stats=recalibrated",
        "eval.recalibrate_batches=5",
    ]
    found = evaluator(resolve(complete(compose(ROOT / "configs", asked, accepted).config)))
    inputs, counts = [], []
    first = next(m for m in found.model.modules() if hasattr(m, "running_mean"))
    found.model.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    first.register_forward_pre_hook(lambda module, given: counts.append(int(module.num_batches_tracked)))
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        results.append(found())
    assert results[0].loss == results[1].loss and torch.equal(results[0].confidence, results[1].confidence)
    assert counts[: len(counts) // 2] == [0, 1, 2, 3, 4, 5, 5, 5]  # 21 images in batches of 8
    plain = [batch.images for step in found.train.epoch(found.unused_epoch) for batch in step][:5]
    assert all(torch.equal(a, b) for a, b in zip(inputs[:5], plain, strict=True))
    assert int(first.num_batches_tracked) == 0


def test_torchs_own_norms_are_recalibrated_and_not_passed_over_by_batch_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3), create_norm("bn", 3))
    batches = [torch.randn(8, 3, 4, 4) * 2 + 1 for _ in range(3)]

    def recalibrate():
        model.train()
        for batch in batches:
            model(batch)
        model.eval()

    with statistics_from(model, "recalibrated", recalibrate):
        mean = torch.stack([batch.mean((0, 2, 3)) for batch in batches]).mean(0)
        torch.testing.assert_close(model[0].running_mean, mean)
    assert model[0].momentum == 0.1 and torch.equal(model[0].running_mean, torch.zeros(3))
    with (
        pytest.raises(ValueError, match="eval.stats=batch does not reach a BatchNorm2d"),
        statistics_from(model, "batch", recalibrate),
    ):
        pass


def test_each_process_keeps_its_own_statistics_under_ddp():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        network = distributed(create_model("convnet", "bn", 4), torch.device("cpu"))
        overwriting = "forward_sync_buffers" if hasattr(network, "forward_sync_buffers") else "broadcast_buffers"
        assert getattr(network, overwriting) is False
    finally:
        torch.distributed.destroy_process_group()


def test_compiling_that_changes_a_network_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model: lambda images: 1.001 * model(images))
    model = create_model("convnet", "bn", 4)
    with pytest.raises(ValueError, match=r"changes this network's outputs by 0\.1 %"):
        compiled(model, 2, 32, torch.device("cpu"), nullcontext, settings_from({}).hardware)


def test_a_checkpoint_is_asked_for_once(monkeypatch):
    """Several processes save a step after rank 0 asked: asking again meanwhile would be a second checkpoint."""
    now = [0.0]
    monkeypatch.setattr(meter.time, "monotonic", lambda: now[0])
    timer = SaveTimer(settings_from({"checkpoint": {"every_minutes": 1}}))
    due = []
    for step in range(1, 10):
        now[0] += 20
        due.append(timer.now(step))
    assert [step for step, asked in enumerate(due, 1) if asked] == [4, 8]


def test_recalibrated_statistics_are_those_of_the_batches_and_are_put_back():
    model = create_model("convnet", "bn", 4).double()
    norm = next(m for m in model.modules() if hasattr(m, "running_mean"))
    batches = [torch.randn(16, 3, 32, 32, dtype=torch.float64) * 3 for _ in range(4)]
    before = {name: value.clone() for name, value in model.named_buffers()}
    seen = []
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].mean((0, 2, 3))))

    def recalibrate():
        model.train()
        with torch.no_grad():
            for batch in batches:
                model(batch)
        model.eval()

    with statistics_from(model, "recalibrated", recalibrate):
        torch.testing.assert_close(norm.running_mean, torch.stack(seen).mean(0))
    hook.remove()
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name
