"""EMA, checkpoints, the log, signatures, evaluation."""

import json
import os
import resource

import pytest
import torch
from torch import nn

from anorm import create_model, create_norm
from anorm.engine import checkpoint
from anorm.engine.distributed import World
from anorm.engine.ema import Ema
from anorm.engine.evaluate import evaluate, statistics_from
from anorm.engine.record import Record, final_metrics, read_metrics
from anorm.engine.settings import settings_from
from anorm.engine.signature import EXCLUDED, flatten, signature


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
    assert signed(processes=2, **{"norm.sync": True}) != signed(**{"norm.sync": True})
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
    from contextlib import nullcontext

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
    from contextlib import nullcontext

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
