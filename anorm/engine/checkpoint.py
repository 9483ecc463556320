"""Checkpoints: written whole or not at all, read without running anything that they contain."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from anorm.files import write_atomic


def save(path: Path, state: dict[str, Any], keep: int = 1) -> None:
    """Write ``state`` (tensors and plain values) to ``path``; keep the ``keep - 1`` checkpoints before it as NAME-1.ckpt,
    NAME-2.ckpt, ...
    """
    content = io.BytesIO()
    torch.save(state, content)
    fresh = path.with_name(f"{path.stem}-new{path.suffix}")
    with content.getbuffer() as encoded:
        write_atomic(fresh, encoded)
    older = [path, *(path.with_name(f"{path.stem}-{age}{path.suffix}") for age in range(1, keep))]
    for newer, old in reversed(list(zip(older, older[1:], strict=False))):
        if newer.exists():
            # never without a last.ckpt: the new name first, the old content goes when it is replaced
            if newer == path:
                old.unlink(missing_ok=True)
                try:
                    os.link(newer, old)
                except OSError:  # a file system without links
                    shutil.copyfile(newer, old)
            else:
                os.replace(newer, old)
    os.replace(fresh, path)


def load(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state, on the CPU. Raises ValueError, which names the older checkpoints, for a damaged file."""
    path.open("rb").close()  # raises, before anything is called damaged, where it may not be read
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has many types for a damaged file: RuntimeError, EOFError, UnpicklingError, ...
        others = sorted(p.name for p in path.parent.glob(f"{path.stem}-[0-9]*{path.suffix}"))
        way_out = f"put {others[0]} in its place" if others else "start again with resume=never, or delete it"
        raise ValueError(f"{path} is truncated or damaged: {way_out} ({_first_line(error)})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


class FolderLock:
    """Marks a run folder as in use: each process holds a byte of its lock file, and the system lets go when it ends.

    Rank 0 takes all bytes, and so finds a process that outlived its launcher; then it keeps its own. A process's record
    locks are not inherited by the workers that its loader forks.
    """

    BYTES = 1 << 20

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._file = open(folder / ".lock", "a+b")  # held until close()

    def take_all(self) -> None:
        """Lock every byte. Raises ValueError when another process holds one."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, self.BYTES, 0)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise ValueError(
                    f"{self.folder} cannot be locked ({error.strerror}): mount its file system with locks, or set "
                    "run_dir to another"
                ) from error
            raise ValueError(
                f"{self.folder} is in use by another process: wait for it, stop it, or set another run_dir"
            ) from error

    def keep(self, rank: int) -> None:
        """Lock this rank's byte and release all others."""
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        for first, beyond in ((0, rank), (rank + 1, self.BYTES)):
            if beyond > first:
                fcntl.lockf(self._file, fcntl.LOCK_UN, beyond - first, first)

    def close(self) -> None:
        self._file.close()
