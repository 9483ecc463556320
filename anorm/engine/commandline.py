"""The shell's side of train.py and the tools: arguments, help, errors in words, exit statuses."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from anorm.engine.compose import GROUPS, choices
from anorm.engine.names import nearest

OWN_CODE = (
    str(Path(__file__).resolve().parents[1]),
    str(Path(__file__).resolve().parents[2] / "train.py"),
    str(Path(__file__).resolve().parents[2] / "tools"),
)
FLAGS = ("-h", "--help", "-m", "--multirun", "--cfg", "--config", "--submit")


@dataclass
class Arguments:
    overrides: list[str] = field(default_factory=list)
    help: bool = False
    multirun: bool = False
    print_config: bool = False
    frozen: Path | None = None
    submit: bool = False
    slurm: list[str] = field(default_factory=list)


def parse(argv: list[str]) -> Arguments:
    """train.py's arguments. Raises ValueError in words."""
    arguments, rest = Arguments(), list(argv)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            arguments.help = True
        elif word in ("-m", "--multirun"):
            arguments.multirun = True
        elif word == "--cfg":
            if not rest or rest.pop(0) != "job":
                raise ValueError("--cfg takes one word: --cfg job prints the composed configuration")
            arguments.print_config = True
        elif word == "--config":
            if not rest:
                raise ValueError("--config needs a file, such as the config.yaml of a run folder")
            arguments.frozen = Path(rest.pop(0))
        elif word == "--submit":
            if not rest or rest.pop(0) != "slurm":
                raise ValueError(
                    "--submit takes one word: --submit slurm makes each run a job of a Slurm cluster"
                )
            arguments.submit = True
        elif word.startswith("slurm."):
            arguments.slurm.append(word)
        elif word.startswith("-"):
            raise ValueError(f"unknown option {word}{nearest(word, FLAGS, 'options')}")
        else:
            arguments.overrides.append(word)
    if arguments.slurm and not arguments.submit:
        raise ValueError(f"{arguments.slurm[0]} is for jobs of a Slurm cluster: add --submit slurm")
    if arguments.print_config and (arguments.multirun or arguments.submit):
        raise ValueError("--cfg job prints one configuration: leave out -m and --submit")
    if arguments.frozen and (arguments.overrides or arguments.multirun):
        raise ValueError("--config runs a frozen configuration as it is: leave out the other arguments")
    return arguments


def help_text(story: str, configs: Path) -> str:
    """``story``, then the groups with their choices and the top-level keys of train.yaml."""
    lines = [story.strip(), "", "Groups and choices:"]
    lines += [f"    {group:<10}{' '.join(choices(configs, group))}" for group in GROUPS]
    yaml = (configs / "train.yaml").read_text().split("\n\n")[1]
    lines += [
        "",
        "Top-level keys (configs/train.yaml and configs/setup/vanilla.yaml hold the others):",
        *(f"    {line}" for line in yaml.splitlines()),
    ]
    lines += [
        "    epochs, batch_size        (of a process: the images that batch statistics are taken over); "
        "optim.global_batch is the step's"
    ]
    return "\n".join(lines)


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
_NO_ANSWER = re.compile(r"Timed out waiting \d+ms|collective operation timeout")  # gloo's words, NCCL's
_NO_MEMORY = re.compile(
    "(CUDA|CUBLAS|CUDNN|NCCL).*(out of memory|ALLOC_FAILED)|can't allocate memory"
)  # besides OutOfMemoryError


def _explain(error: BaseException, trace: TracebackType | None) -> tuple[int, str] | None:
    """(status, message) of what is known, else None."""
    from anorm.engine.interrupt import Interrupted

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
