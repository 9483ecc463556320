"""Errors that the user can mend, in words and with an exit status instead of a traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from pathlib import Path
from types import TracebackType

from anorm.processes.interrupt import Interrupted

OWN_CODE = (
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[2] / "train.py"),
    str(Path(__file__).resolve().parents[2] / "tools"),
)


class user_errors:
    """Within: an error that the user can mend becomes one or two lines on stderr and a status, not a traceback.

    That is a ValueError raised by this project's own code, a package that is missing, no memory, a full disk.
    Any other exception passes. ``ANORM_TRACEBACK=1`` lets all pass. words: a file for the message, for a
    launcher to print.
    """

    def __init__(self, words: Path | None = None):
        self.words, self.status = words, 0

    def __enter__(self) -> user_errors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is None or os.environ.get("ANORM_TRACEBACK"):
            return False
        explained = _explain(error, trace)
        if explained is None:
            return False
        self.status, message = explained
        if self.words:
            self.words.write_text(message)
        else:
            print(message, file=sys.stderr, flush=True)
        return True


_LOST_WORKER = re.compile(r"DataLoader worker .*(is killed by signal|exited unexpectedly)")
# gloo's words (the second where its timer runs out first), NCCL's
_NO_ANSWER = re.compile(r"Timed out waiting \d+ms|Application timeout caused pair closure|collective operation timeout")
_NO_MEMORY = re.compile(
    "(CUDA|CUBLAS|CUDNN|NCCL).*(out of memory|ALLOC_FAILED)|can't allocate memory"
)  # besides OutOfMemoryError


def _explain(error: BaseException, trace: TracebackType | None) -> tuple[int, str] | None:
    """Return (status, message) for an error that is known here, else None."""
    name = type(error).__name__
    if isinstance(error, Interrupted):
        kept = {
            True: "; everything is saved",
            False: "; this step could not be saved",
            None: "",
        }[error.saved]
        return 128 + error.number, f"{error}{kept}: repeat the command to continue"
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped"
    if isinstance(error, FloatingPointError):
        return 1, f"error: {error}"
    if isinstance(error, ModuleNotFoundError):
        return (
            2,
            f"error: the package {error.name} is not installed: pip install "
            f"'anorm[{'slurm' if error.name == 'submitit' else 'train'}]' (or pip install {error.name})",
        )
    if isinstance(error, RuntimeError) and "torchvision::" in str(error):
        return 2, (
            "error: torch and torchvision do not belong together (a CPU build of one beside a CUDA build of "
            "the other, or two versions): pip install --force-reinstall torch torchvision, both from one index"
        )
    text = str(error)
    if _LOST_WORKER.search(text):
        return 1, (
            "error: a process that reads images was killed, most often because the machine's memory or /dev/shm was "
            "full: lower hardware.workers or batch_size, or enlarge /dev/shm (docker run --shm-size)"
        )
    if _NO_ANSWER.search(text):
        return 1, (
            "error: another process did not answer for too long and was given up: it hangs, or its disk, its machine or "
            "the link to it does. Repeat the command to continue from the last checkpoint"
        )
    if name == "OutOfMemoryError" or isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return 1, (
            "error: out of memory: lower batch_size (more micro-batches are accumulated, "
            "optim.global_batch stays), eval.batch_size or data.image_size, or use hardware.dtype=fp16"
        )
    if isinstance(error, OSError):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or error.filename is not None:
            return 1 if full else 2, f"error: {error.strerror}: {error.filename or 'the disk is full'}"
    frames = traceback.extract_tb(trace)
    if isinstance(error, ValueError) and frames and frames[-1].filename.startswith(OWN_CODE):
        return 2, f"error: {error}"
    return None
