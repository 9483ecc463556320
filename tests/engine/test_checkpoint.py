"""Checkpoints and the lock of a folder."""

import os
import subprocess
import sys

import pytest
import torch
from commands import environment

from anorm.engine import checkpoint


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


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path):
    """As one that another user wrote under umask 077: deleting it, which a damaged one asks for, would lose the run."""
    path = tmp_path / "last.ckpt"
    checkpoint.save(path, {"step": 1})
    path.chmod(0)
    code = (
        "import os, sys; from pathlib import Path; from anorm.engine import checkpoint\n"
        "from anorm.processes.errors import user_errors\n"
        "os.setuid(65534) if os.getuid() == 0 else None\n"
        "with user_errors() as outcome: checkpoint.load(Path(sys.argv[1]))\n"
        "sys.exit(outcome.status)"
    )
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o555)
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=environment())
    assert done.returncode == 2 and done.stderr == f"error: Permission denied: {path}\n", done.stderr
